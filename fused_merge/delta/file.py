"""The file of a saved reference delta: a plain safetensors file, dense or sparse.

Dense, it holds tau under the canonical names. Sparse, it holds `NAME.mask` and `NAME.values` for each tensor, in the
format of `fused_merge.eager.sparse`. docs/reference/delta-file.md has the layout, the metadata, and a reader in numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_merge.delta.tensors import Part, Sparsity, TauSource, TensorSpec
from fused_merge.eager.sparse import WORDS, SparseTensor, block_count, packed_nbytes
from fused_merge.io.files import expanded
from fused_merge.io.headers import CODES, DTYPES
from fused_merge.io.sources import PathLike, open_files
from fused_merge.io.writer import Manifest, SafetensorsWriter

_VERSION_KEY, _VERSION = "fused_merge.reference_delta", "1"
_MASK, _VALUES = ".mask", ".values"
# Bytes of a file that are hashed at once.
_HASHED = 1 << 20


class SavedDelta(TauSource):
    """The tensors of a saved delta; raises as `ReferenceDelta.load`."""

    def __init__(self, path: PathLike) -> None:
        path = expanded(path)
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder and a saved delta is one file; "
                "for two model folders use ReferenceDelta.from_checkpoints(base, tuned)"
            )
        self._source = open_files(path, role="path")
        metadata = self._source.metadata(path.name)
        version = metadata.get(_VERSION_KEY)
        if version != _VERSION:
            raise ValueError(
                f"{path} is a reference delta of version {version}; load it with the release that saved it"
                if version
                else f"{path} is a safetensors file but not a saved reference delta; "
                "make one with ReferenceDelta.from_checkpoints(base, tuned).save(path)"
            )
        self.path, self.origin = str(path), os.path.abspath(path)
        self.ordered = metadata.get("ordered") == "true"
        self.sources = metadata.get("sources")
        try:
            self.identity = metadata["identity"]
            tensors = json.loads(metadata["tensors"])
            self.specs = {name: TensorSpec(DTYPES[code], torch.Size(shape)) for name, code, shape in tensors}
            if "method" in metadata:
                rate, seed = float(metadata["reserve_rate"]), int(metadata["seed"])
                self.sparsity = Sparsity.checked(metadata["method"], rate, seed)
            self._check_stored()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} contradicts its own metadata ({error}); save the delta again") from error
        if self.sparsity is not None:
            self.packed_nbytes = sum(
                packed_nbytes(shape.numel(), self._source.shape(name + _VALUES).numel(), dtype.itemsize)
                for name, (dtype, shape) in self.specs.items()
            )

    def read(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor | SparseTensor:
        """Return a dense tensor in a dtype, or a sparse one as it is; of a part, nothing else is kept."""
        if self.sparsity is None:
            return (self._source[name] if part is None else self._source.part(name, *part)).to(dtype).contiguous()
        try:
            mask, values = self._source[name + _MASK], self._source[name + _VALUES]
            whole = SparseTensor.from_parts(mask, values, self.specs[name].shape)
        except ValueError as error:
            raise ValueError(f"{name!r} in {self.path} is broken: {error}; save the delta again") from error
        return whole if part is None else whole.part(*part)

    def __reduce__(self) -> tuple[Callable[..., SavedDelta], tuple[Any, ...]]:
        return SavedDelta, (self.origin,)

    def _check_stored(self) -> None:
        manifest = _manifest(self.specs, self.sparsity)
        if odd := sorted(set(self._source) ^ set(manifest)):
            raise ValueError(f"{odd[0]!r} stands in one of the two only")
        for name, (dtype, shape) in manifest.items():
            stored = self._source.dtype(name), self._source.shape(name)
            if stored[0] != dtype or (len(stored[1]) != 1 if shape is None else stored[1] != shape):
                raise ValueError(f"{name!r} is {stored[0]} of {list(stored[1])}")


class DeltaWriter(SafetensorsWriter):
    """Writes a saved delta tensor by tensor; a `sparsity` of None is dense, and None in `metadata` leaves a key out."""

    def __init__(
        self,
        path: PathLike,
        specs: Mapping[str, TensorSpec],
        sparsity: Sparsity | None,
        metadata: Mapping[str, str | None],
    ) -> None:
        listed = [[name, CODES[dtype], list(shape)] for name, (dtype, shape) in specs.items()]
        known = {"format": "pt", _VERSION_KEY: _VERSION, "tensors": json.dumps(listed)}
        if sparsity is not None:
            known |= {key: str(value) for key, value in sparsity._asdict().items()}
        known |= {key: value for key, value in metadata.items() if value is not None}
        super().__init__(path, _manifest(specs, sparsity), known)

    def write_tau(self, name: str, tau: Tensor | SparseTensor) -> None:
        """Write one tensor, dense or sparse."""
        if isinstance(tau, SparseTensor):
            self.write(name + _MASK, tau.mask)
            self.write(name + _VALUES, tau.values)
        else:
            self.write(name, tau)


def describe_files(files: Mapping[str, Sequence[Path]], advance: Callable[[int], None]) -> str:
    """Return the JSON of `sources`; `advance` is told of the bytes that were read."""
    return json.dumps({role: {path.name: _sha256(path, advance) for path in paths} for role, paths in files.items()})


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_HASHED):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()


def _manifest(specs: Mapping[str, TensorSpec], sparsity: Sparsity | None) -> Manifest:
    if sparsity is None:
        return specs
    manifest: dict[str, tuple[torch.dtype, Sequence[int] | None]] = {}
    for name, (dtype, shape) in specs.items():
        manifest[name + _MASK] = (torch.int32, torch.Size([block_count(shape.numel()) * WORDS]))
        manifest[name + _VALUES] = (dtype, None)
    return manifest
