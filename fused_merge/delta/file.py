"""The file of a saved reference delta: a plain safetensors file, dense or sparse.

Dense, it holds tau under the canonical names. Sparse, it holds `NAME.mask` and `NAME.values` for each tensor, in the
format of `fused_merge.eager.sparse`. docs/reference_delta.md has the layout and a reader in numpy. Its metadata:

* `format`: `"pt"`.
* `fused_merge.reference_delta`: version of this layout, `"1"`.
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
import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_merge.delta.tensors import Sparsity, TauSource, TensorSpec
from fused_merge.eager.sparse import WORDS, SparseTensor, block_count
from fused_merge.io.headers import CODES, DTYPES
from fused_merge.io.sources import FileSource, PathLike, bits, open_files
from fused_merge.io.writer import Manifest, SafetensorsWriter

_VERSION_KEY = "fused_merge.reference_delta"
_VERSION = "1"
_MASK, _VALUES = ".mask", ".values"
# Bytes of each tensor that the identity of a delta depends on.
_HEAD_BYTES = 4096
# Bytes of a file that are hashed at once.
_HASHED = 1 << 20


class SavedDelta(TauSource):
    """The tensors of a saved delta; headers are read now and each tensor when it is asked for.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is not a saved delta, is broken, or contradicts itself.
    """

    def __init__(self, path: PathLike) -> None:
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder and a saved delta is one file; "
                "for two model folders use ReferenceDelta.from_checkpoints(base, tuned)"
            )
        self._source = open_files(path, role="path")
        metadata = self._source.metadata(Path(path).name)
        version = metadata.get(_VERSION_KEY)
        if version != _VERSION:
            raise ValueError(
                f"{path} is a reference delta of version {version}; load it with the release that saved it"
                if version
                else f"{path} is a safetensors file but not a saved reference delta; "
                "make one with ReferenceDelta.from_checkpoints(base, tuned).save(path)"
            )
        self.path = str(path)
        self.origin = os.path.abspath(path)
        self.ordered = metadata.get("ordered") == "true"
        self.sources = metadata.get("sources")
        try:
            self.specs = {
                name: TensorSpec(DTYPES[code], torch.Size(shape))
                for name, code, shape in json.loads(metadata["tensors"])
            }
            self.identity = metadata["identity"]
            if "method" in metadata:
                self.sparsity = Sparsity.checked(
                    metadata["method"], float(metadata["reserve_rate"]), int(metadata["seed"])
                )
            _check_stored(self._source, _manifest(self.specs, self.sparsity))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} contradicts its own metadata ({error}); save the delta again") from error
        if self.sparsity is not None:
            self.value_counts = {name: self._source.shape(name + _VALUES).numel() for name in self.specs}

    def read(self, name: str, dtype: torch.dtype, first: int | None = None) -> Tensor | SparseTensor:
        """Return a dense tensor in a dtype or a vector of its first elements, or a sparse tensor as it is."""
        if self.sparsity is None:
            return (self._source[name] if first is None else self._source.head(name, first)).to(dtype)
        try:
            mask, values = self._source[name + _MASK], self._source[name + _VALUES]
            return SparseTensor.from_parts(mask, values, self.specs[name].shape)
        except ValueError as error:
            raise ValueError(f"{name!r} in {self.path} is broken: {error}; save the delta again") from error

    def __reduce__(self) -> tuple[Callable[..., SavedDelta], tuple[Any, ...]]:
        return SavedDelta, (self.origin,)


def delta_writer(
    path: PathLike, specs: Mapping[str, TensorSpec], sparsity: Sparsity | None, metadata: Mapping[str, str | None]
) -> SafetensorsWriter:
    """Return the writer of a saved delta, for `write_tau`; a `sparsity` of None is dense.

    `metadata` has `identity`, `ordered` and `sources`; None leaves one out.
    """
    known = {
        "format": "pt",
        _VERSION_KEY: _VERSION,
        "tensors": json.dumps([[name, CODES[dtype], list(shape)] for name, (dtype, shape) in specs.items()]),
    }
    if sparsity is not None:
        known |= {key: str(value) for key, value in sparsity._asdict().items()}
    known |= {key: value for key, value in metadata.items() if value is not None}
    return SafetensorsWriter(path, _manifest(specs, sparsity), known)


def write_tau(writer: SafetensorsWriter, name: str, tau: Tensor | SparseTensor) -> None:
    """Write one tensor, dense or sparse as the file is."""
    if isinstance(tau, SparseTensor):
        writer.write(name + _MASK, tau.mask)
        writer.write(name + _VALUES, tau.values)
    else:
        writer.write(name, tau)


def identity_of(source: TauSource, specs: Mapping[str, TensorSpec]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and first 4 KiB of the dense tensors of `source` as `specs` say."""
    digest = hashlib.sha256()
    # Sorted: the same delta read from modules and from files has its names in different orders.
    for name in sorted(specs):
        dtype, shape = specs[name]
        head = source.read(name, dtype, first=_HEAD_BYTES // dtype.itemsize)
        assert isinstance(head, Tensor)
        digest.update(json.dumps([name, CODES[dtype], list(shape)]).encode())
        digest.update(bits(head).numpy().tobytes())
    return digest.hexdigest()


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


def _check_stored(source: FileSource, manifest: Manifest) -> None:
    if odd := sorted(set(source) ^ set(manifest)):
        raise ValueError(f"{odd[0]!r} stands in one of the two only")
    for name, (dtype, shape) in manifest.items():
        stored = source.shape(name)
        if source.dtype(name) != dtype or (len(stored) != 1 if shape is None else stored != shape):
            raise ValueError(f"{name!r} is {source.dtype(name)} of {list(stored)}")


def _manifest(specs: Mapping[str, TensorSpec], sparsity: Sparsity | None) -> Manifest:
    """Return the tensors of a saved delta."""
    if sparsity is None:
        return specs
    manifest: dict[str, tuple[torch.dtype, Sequence[int] | None]] = {}
    for name, (dtype, shape) in specs.items():
        manifest[name + _MASK] = (torch.int32, torch.Size([block_count(prod(shape)) * WORDS]))
        manifest[name + _VALUES] = (dtype, None)
    return manifest
