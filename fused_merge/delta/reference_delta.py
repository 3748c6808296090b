"""tau = theta_SFT − theta_base, the reference delta: made of two models, saved dense or sparse.

A saved delta is a plain safetensors file. Dense, it holds tau under the canonical names. Sparse, it holds
`NAME.mask` and `NAME.values` for each tensor, in the format of `fused_merge.eager.sparse`. docs/reference_delta.md has
the layout and a reader in numpy. Its metadata:

* `format`: `"pt"`.
* `fused_merge.delta.reference_delta`: version of this layout, `"1"`.
* `identity`: of the dense delta, whatever the file holds; see `ReferenceDelta.identity`.
* `method`, `reserve_rate`, `seed`: how a sparse delta was made; absent in dense ones.
* `tensors`: JSON, `[[name, dtype, shape], ...]`, dtypes by their safetensors code.
* `ordered`: `"true"` if that is the model's own order of parameters.
* `sources`: JSON, `{"base": {file name: SHA-256}, "tuned": {...}}`, the files that it was made of; absent where it
  was made of models in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fused_merge.eager.sparse import WORDS, SparseTensor, block_count, packed_nbytes
from fused_merge.eager.sparsify import SPARSIFY, sparsify_tau
from fused_merge.io.headers import CODES, DTYPES
from fused_merge.io.match import match
from fused_merge.io.sources import (
    PathLike,
    SourceLike,
    TensorSource,
    bits,
    open_files,
    open_source,
)
from fused_merge.io.writer import Manifest, SafetensorsWriter
from fused_merge.per_tensor import parse_dtype
from fused_merge.progress import progress_bar

_VERSION_KEY = "fused_merge.delta.reference_delta"
_VERSION = "1"
_MASK, _VALUES = ".mask", ".values"
_HEAD_BYTES = 4096
# Bytes of a file that are hashed at once.
_HASHED = 1 << 20


class Sparsity(NamedTuple):
    """How tau was sparsified.

    Attributes:
        method: F: a key of `fused_merge.eager.sparsify.SPARSIFY`.
        reserve_rate: p, the share of elements that F keeps.
        seed: of the random mask; without meaning for magnitudes.
    """

    method: str
    reserve_rate: float
    seed: int

    def agrees(self, other: Sparsity) -> bool:
        """Return whether both keep the same elements of a tensor."""
        return self[:2] == other[:2] and (self.method != "random" or self.seed == other.seed)


class _Spec(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size


# The tensor of a name, or the first n of its elements, in a dtype. What is stored sparse comes as it is.
_Read: TypeAlias = "Callable[[str, torch.dtype], Tensor | SparseTensor]"
_Head: TypeAlias = "Callable[[str, int, torch.dtype], Tensor]"


class ReferenceDelta:
    """The reference delta tau = theta_SFT − theta_base, by canonical tensor name.

    Made by `from_models`, `from_checkpoints` or `load`. tau is computed in fp32 (fp64 if either model is) and
    rounded once to the wider dtype of the two models. Only floating tensors have one, tied weights one
    together. Tensors come out on the CPU, are to be treated as read-only, and are refused, when read, if an
    element is NaN or infinite. Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1.

    Attributes:
        names: canonical names of the tensors.
        path: the file that it was loaded from, or None.
        sparsity: how a stored delta was sparsified; None for a dense one.
        ordered: whether `names` is known to follow the model's own order of parameters: made of modules.
        nbytes: bytes that all of tau takes, as stored; for a delta that is read lazily, would take.
    """

    def __init__(
        self,
        specs: Mapping[str, _Spec],
        read: _Read,
        head: _Head,
        *,
        ordered: bool,
        identity: str | None = None,
        files: Mapping[str, Sequence[Path]] | None = None,
        sources: str | None = None,
        path: str | None = None,
        sparsity: Sparsity | None = None,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        """Not for users: see `from_models`, `from_checkpoints` and `load`."""
        self.names = tuple(specs)
        self.ordered = ordered
        self.path = path
        self.sparsity = sparsity
        self.nbytes = sum(
            prod(shape) * dtype.itemsize if kept is None else packed_nbytes(prod(shape), kept[name], dtype.itemsize)
            for name, (dtype, shape) in specs.items()
        )
        self._specs = dict(specs)
        self._read_stored = read
        self._head = head
        self._stored_identity = identity
        # The files that tau is computed from, and what the metadata of a saved delta said of them.
        self._files = dict(files or {})
        self._sources = sources
        # How a pickle makes it again.
        self._maker: tuple[Callable[..., ReferenceDelta], tuple[Any, ...]]

    @classmethod
    def from_models(cls, base: SourceLike, tuned: SourceLike) -> ReferenceDelta:
        """Compute tau now, one tensor after the other; nothing of the two models is kept.

        Args:
            base: theta_base: a module (its parameters) or a state dict (its floating tensors), or a path.
                The order of a module's parameters is kept.
            tuned: theta_SFT: the same.

        Raises:
            ValueError: if names or shapes differ, or tau is not finite; the sentence names the tensor.
        """
        first, second = open_source(base, role="base"), open_source(tuned, role="tuned")
        specs = _specs_of(first, second)
        taus: dict[str, Tensor] = {}
        for name, (dtype, _) in specs.items():
            taus[name] = _tau(first[name], second[name], dtype)
            _check_finite(name, taus[name])

        return cls._in_memory(specs, taus, isinstance(base, nn.Module))

    @classmethod
    def _in_memory(cls, specs: Mapping[str, _Spec], taus: Mapping[str, Tensor], ordered: bool) -> ReferenceDelta:
        def read(name: str, dtype: torch.dtype) -> Tensor:
            return taus[name].to(dtype)

        def head(name: str, n: int, dtype: torch.dtype) -> Tensor:
            return taus[name].reshape(-1)[:n].to(dtype)

        delta = cls(specs, read, head, ordered=ordered)
        delta._maker = cls._in_memory, (dict(specs), dict(taus), ordered)
        return delta

    @classmethod
    def from_checkpoints(cls, base: PathLike, tuned: PathLike) -> ReferenceDelta:
        """Read headers now and each tensor of the two checkpoints when it is asked for.

        Args:
            base: theta_base: a safetensors file or a Hugging Face folder.
            tuned: theta_SFT: the same.

        Raises:
            FileNotFoundError: if a path or a shard is not there.
            ValueError: if a file is broken, or names or shapes differ; the sentence names file or tensor.
        """
        first, second = open_files(base, role="base"), open_files(tuned, role="tuned")
        specs = _specs_of(first, second)

        def read(name: str, dtype: torch.dtype) -> Tensor:
            return _tau(first[name], second[name], dtype)

        def head(name: str, n: int, dtype: torch.dtype) -> Tensor:
            return _tau(first.head(name, n), second.head(name, n), dtype)

        files = {"base": first.files(), "tuned": second.files()}
        delta = cls(specs, read, head, ordered=False, files=files)
        delta._maker = cls.from_checkpoints, (os.path.abspath(base), os.path.abspath(tuned))
        return delta

    @classmethod
    def load(cls, path: PathLike) -> ReferenceDelta:
        """Open a saved delta; headers are read now and each tensor when it is asked for.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it is not a saved delta, is broken, or contradicts itself.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder and a saved delta is one file; "
                "for two model folders use ReferenceDelta.from_checkpoints(base, tuned)"
            )
        source = open_files(path, role="path")
        metadata = source.metadata(Path(path).name)
        version = metadata.get(_VERSION_KEY)
        if version != _VERSION:
            raise ValueError(
                f"{path} is a reference delta of version {version}; load it with the release that saved it"
                if version
                else f"{path} is a safetensors file but not a saved reference delta; "
                "make one with ReferenceDelta.from_checkpoints(base, tuned).save(path)"
            )
        try:
            specs = {
                name: _Spec(DTYPES[code], torch.Size(shape)) for name, code, shape in json.loads(metadata["tensors"])
            }
            identity = metadata["identity"]
            sparsity = None
            if "method" in metadata:
                sparsity = _sparsity(float(metadata["reserve_rate"]), metadata["method"], int(metadata["seed"]))
            _check_stored(source, _manifest(specs, sparsity))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} contradicts its own metadata ({error}); save the delta again") from error

        def read(name: str, dtype: torch.dtype) -> Tensor | SparseTensor:
            if sparsity is None:
                return source[name].to(dtype)
            try:
                return SparseTensor.from_parts(source[name + _MASK], source[name + _VALUES], specs[name].shape)
            except ValueError as error:
                raise ValueError(f"{name!r} in {path} is broken: {error}; save the delta again") from error

        def head(name: str, n: int, dtype: torch.dtype) -> Tensor:
            return source.head(name, n).to(dtype)

        delta = cls(
            specs,
            read,
            head,
            ordered=metadata.get("ordered") == "true",
            identity=identity,
            sources=metadata.get("sources"),
            path=str(path),
            sparsity=sparsity,
            kept=None if sparsity is None else {name: source.shape(name + _VALUES).numel() for name in specs},
        )
        delta._maker = cls.load, (os.path.abspath(path),)
        return delta

    def save(
        self,
        path: PathLike,
        reserve_rate: float | None = None,
        method: str | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
    ) -> Path:
        """Write the delta to one safetensors file, tensor by tensor, beside `path` first and then renamed.

        Of a delta made by `from_checkpoints` the file says which files it was made of, by their SHA-256 as they are
        now. That costs one more read of both checkpoints.

        Args:
            path: the file to write; an existing one is replaced when the new one is whole.
            reserve_rate: p, the share of each tensor to keep, in (0, 1]; None or 1 saves the delta dense. A
                delta that is stored sparse is saved as it is and takes no other rate.
            method: how to choose what is kept: `"random"`, `"magnitude"` or `"soft_threshold"`.
            seed: of the random masks.
            dtype: bf16, fp16, fp32 or fp64, as a dtype or by name, of every tensor of the file; None keeps those of
                the delta. tau is rounded once from the difference in fp32 (fp64), which a delta made by
                `from_checkpoints` computes anew, and then sparsified. A delta in memory or in a file that holds
                16-bit numbers, or a sparse one, takes no other dtype.

        Returns:
            `path`.

        Raises:
            ValueError: for options that do not fit, a tau that is not finite in its dtype, or a `path` that is one
                of the files that the delta is read from.
            OSError: if the disk is full or refuses.
        """
        return self._in(dtype)._save(Path(path), reserve_rate, method, seed)

    def _save(self, path: Path, reserve_rate: float | None, method: str | None, seed: int) -> Path:
        sparsity = self._sparsity_to_save(reserve_rate, method, seed)
        hashed = [file for files in self._files.values() for file in files]
        if path.resolve() in [file.resolve() for file in hashed]:
            raise ValueError(f"{path} is a file that the delta is made of, which it would replace; choose another")
        metadata = {
            "format": "pt",
            _VERSION_KEY: _VERSION,
            "identity": self.identity,
            "tensors": json.dumps([[n, CODES[dtype], list(shape)] for n, (dtype, shape) in self._specs.items()]),
            "ordered": json.dumps(self.ordered),
        }
        if sparsity is not None:
            metadata |= {
                "method": sparsity.method,
                "reserve_rate": repr(sparsity.reserve_rate),
                "seed": str(sparsity.seed),
            }
        total = sum(prod(shape) * dtype.itemsize for dtype, shape in self._specs.values())
        total += sum(file.stat().st_size for file in hashed)
        with progress_bar("saving the reference delta", total) as advance:
            sources = self._sources
            if hashed:
                sources = json.dumps(
                    {role: {file.name: _sha256(file, advance) for file in files} for role, files in self._files.items()}
                )
            if sources is not None:
                metadata["sources"] = sources
            with SafetensorsWriter(path, _manifest(self._specs, sparsity), metadata) as writer:
                # Packed values follow one another: the widest first keeps all of them aligned.
                for name in sorted(self.names, key=lambda name: -self.dtype(name).itemsize):
                    if sparsity is None:
                        writer.write(name, self.tensor(name))
                    else:
                        packed = self.sparse(name, sparsity)
                        writer.write(name + _MASK, packed.mask)
                        writer.write(name + _VALUES, packed.values)
                    advance(prod(self.shape(name)) * self.dtype(name).itemsize)
        return path

    def _in(self, asked: torch.dtype | str | None) -> ReferenceDelta:
        """Return this delta in another dtype, rounded when it is read; itself if it is in that one."""
        dtype = parse_dtype(asked)
        others = [name for name in self.names if dtype not in (None, self.dtype(name))]
        if dtype is None or not others:
            return self
        if self.sparsity is not None:
            raise ValueError(f"{self.path} holds a sparse delta, which takes no other dtype; save the dense delta anew")
        rounded = [name for name in others if self.dtype(name).itemsize < 4]
        if rounded and not self._files:
            raise ValueError(
                f"{rounded[0]!r} was rounded to {self.dtype(rounded[0])} before and takes no other dtype; make the "
                "delta with ReferenceDelta.from_checkpoints(base, tuned) and save that"
            )

        def read(name: str, dtype: torch.dtype) -> Tensor | SparseTensor:
            tau = self._read_stored(name, dtype)
            if isinstance(tau, Tensor) and not _is_finite(tau):
                raise ValueError(
                    f"the reference delta of {name!r} has an element that is not finite in {dtype}; "
                    "check both checkpoints or choose a wider dtype"
                )
            return tau

        specs = {name: _Spec(dtype, shape) for name, (_, shape) in self._specs.items()}
        return ReferenceDelta(
            specs, read, self._head, ordered=self.ordered, files=self._files, sources=self._sources, path=self.path
        )

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the names, dtypes, shapes and first 4 KiB of every tensor of the dense delta.

        A delta and its saved forms, dense and sparse, share it. Saved in another dtype it is another delta: its
        numbers are rounded, so that a run which began with one is not resumed with the other. What it is called then
        goes by the rounded numbers, and its own dense and sparse forms share that. Computed when first asked for,
        from the heads of the tensors alone.
        """
        return self._stored_identity or _identity(self._specs, self._head)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Callable[..., ReferenceDelta], tuple[Any, ...]]:
        """Pickle a delta that was made in memory with its tensors, and one that is read from files as their paths."""
        return _remade, (*self._maker, self.identity)

    def __copy__(self) -> ReferenceDelta:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceDelta:
        return self

    def __repr__(self) -> str:
        how = "dense" if self.sparsity is None else f"{self.sparsity.method} at {self.sparsity.reserve_rate}"
        where = f", from {self.path!r}" if self.path else ""
        return f"<ReferenceDelta: {len(self)} tensors, {self.nbytes / 1e6:.3g} MB, {how}{where}>"

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor; reads no data.

        Raises:
            KeyError: if there is none of that name.
        """
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; reads no data.

        Raises:
            KeyError: if there is none of that name.
        """
        return self._spec(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, dense and unscaled; of a sparse delta with zeros where nothing was kept.

        Raises:
            KeyError: if there is none of that name.
            ValueError: if an element is NaN or infinite.
        """
        stored = self._read(name)
        return stored.unpack() if isinstance(stored, SparseTensor) else stored

    def sparse(self, name: str, sparsity: Sparsity) -> SparseTensor:
        """Return F(tau) of one tensor: as stored, or sparsified now.

        Raises:
            KeyError: if there is none of that name.
            ValueError: if an element is NaN or infinite, `sparsity` is out of range, or the delta was stored
                with another.
        """
        self._check_sparsity(sparsity)
        stored = self._read(name)
        if isinstance(stored, SparseTensor):
            return stored
        kept = sparsify_tau(stored, name=name, **sparsity._asdict())
        return SparseTensor.pack(kept, kept != 0)

    def _spec(self, name: str) -> _Spec:
        if name not in self._specs:
            raise KeyError(f"the reference delta has no tensor {name!r}; see its `names`")
        return self._specs[name]

    def _read(self, name: str) -> Tensor | SparseTensor:
        self._spec(name)
        stored = self._read_stored(name, self.dtype(name))
        _check_finite(name, stored.values if isinstance(stored, SparseTensor) else stored)
        return stored

    def _check_sparsity(self, asked: Sparsity) -> None:
        _sparsity(asked.reserve_rate, asked.method, asked.seed)
        if self.sparsity is not None and not self.sparsity.agrees(asked):
            raise ValueError(
                f"{self.path} was saved with {_describe(self.sparsity)} and {_describe(asked)} is asked for; "
                "ask for the same or save the dense delta anew"
            )

    def _sparsity_to_save(self, reserve_rate: float | None, method: str | None, seed: int) -> Sparsity | None:
        if reserve_rate is None:
            if method is not None:
                raise ValueError(f"method {method!r} needs a reserve_rate below 1; leave both out to save densely")
            return self.sparsity
        if reserve_rate == 1.0 and self.sparsity is None:
            return None
        asked = _sparsity(reserve_rate, method, seed)
        self._check_sparsity(asked)
        return asked


def _remade(make: Callable[..., ReferenceDelta], arguments: tuple[Any, ...], identity: str) -> ReferenceDelta:
    """Unpickle a delta; the files must still hold what they held."""
    delta = make(*arguments)
    if delta.identity != identity:
        raise ValueError(
            f"{' and '.join(map(str, arguments))} changed after the reference delta was pickled; pickle it again"
        )
    return delta


def _specs_of(base: TensorSource, tuned: TensorSource) -> dict[str, _Spec]:
    """Return what tau will be, of every floating tensor that is no buffer of a module."""
    buffers = base.buffers | tuned.buffers
    ignored = {
        name
        for name in {*base, *tuned}
        if name in buffers or not any(name in source and source.is_merged(name) for source in (base, tuned))
    }
    return {
        name: _Spec(torch.promote_types(base.dtype(name), tuned.dtype(name)), base.shape(name))
        for name in match(base, tuned, ignore=ignored).names
    }


def _tau(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return tuned.to("cpu", wide, copy=True).sub_(base.cpu()).to(dtype).contiguous()


def _is_finite(tau: Tensor) -> bool:
    # The extremes carry NaN along, and take no memory.
    return not tau.numel() or all(math.isfinite(extreme) for extreme in tau.aminmax())


def _check_finite(name: str, tau: Tensor) -> None:
    if not _is_finite(tau):
        raise ValueError(f"the reference delta of {name!r} has a NaN or infinite element; check both checkpoints")


def _sha256(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(_HASHED):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()


def _identity(specs: Mapping[str, _Spec], head: _Head) -> str:
    digest = hashlib.sha256()
    # Sorted: the same delta read from modules and from files has its names in different orders.
    for name in sorted(specs):
        dtype, shape = specs[name]
        digest.update(json.dumps([name, CODES[dtype], list(shape)]).encode())
        digest.update(bits(head(name, _HEAD_BYTES // dtype.itemsize, dtype)).numpy().tobytes())
    return digest.hexdigest()


def _sparsity(reserve_rate: float, method: str | None, seed: int) -> Sparsity:
    if method is None or method == "none" or method not in SPARSIFY:
        choices = " or ".join(repr(name) for name in SPARSIFY if name != "none")
        raise ValueError(f"method must be {choices}, got {method!r}")
    if not 0.0 < reserve_rate <= 1.0:
        raise ValueError(f"reserve_rate must lie in (0, 1], got {reserve_rate}")
    return Sparsity(method, float(reserve_rate), seed)


def _describe(sparsity: Sparsity) -> str:
    seed = f", seed={sparsity.seed}" if sparsity.method == "random" else ""
    return f"method={sparsity.method!r}, reserve_rate={sparsity.reserve_rate}{seed}"


def _check_stored(source: TensorSource, manifest: Manifest) -> None:
    if odd := sorted(set(source) ^ set(manifest)):
        raise ValueError(f"{odd[0]!r} stands in one of the two only")
    for name, (dtype, shape) in manifest.items():
        stored = source.shape(name)
        if source.dtype(name) != dtype or (len(stored) != 1 if shape is None else stored != shape):
            raise ValueError(f"{name!r} is {source.dtype(name)} of {list(stored)}")


def _manifest(specs: Mapping[str, _Spec], sparsity: Sparsity | None) -> Manifest:
    """Return the tensors of a saved delta."""
    if sparsity is None:
        return specs
    manifest: dict[str, tuple[torch.dtype, Sequence[int] | None]] = {}
    for name, (dtype, shape) in specs.items():
        manifest[name + _MASK] = (torch.int32, torch.Size([block_count(prod(shape)) * WORDS]))
        manifest[name + _VALUES] = (dtype, None)
    return manifest
