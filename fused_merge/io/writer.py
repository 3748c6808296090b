"""Files that get their names when they are whole: safetensors, written tensor by tensor, and small ones."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from fused_merge.io.files import expanded, explained
from fused_merge.io.headers import CODES, Entry, encode_header
from fused_merge.io.sources import PathLike, bits
from fused_merge.names import some

# Name -> dtype and shape; the shape None is a vector whose length shows when it is written.
Manifest: TypeAlias = Mapping[str, tuple[torch.dtype, Sequence[int] | None]]


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time; memory stays at the tensor in hand.

    Used as a context manager. Everything goes to `PATH.part` beside the file, which replaces it when the block ends
    well and is removed when it does not. Room for the header is reserved from the manifest; the header is written last,
    so that the length of a vector may be left open until then. Tensors of known size lie first, widest dtype first, so
    that each is aligned; vectors of open length follow in the order in which they are written.

    Raises:
        ValueError: for a dtype that the format lacks, or tensors that are not those of the manifest, each once.
        OSError: if the disk is full or refuses; the sentence names the file.
    """

    def __init__(self, path: PathLike, manifest: Manifest, metadata: Mapping[str, str] | None = None) -> None:
        self.path = expanded(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._manifest = manifest
        self._metadata = dict(metadata or {})
        for name, (dtype, _) in manifest.items():
            if dtype not in CODES:
                raise ValueError(f"{name!r} is {dtype}, which safetensors files cannot hold; convert it first")
        self._entries: dict[str, Entry] = {}
        self._reserved: dict[str, int] = {}
        self._end = 0
        for name, (dtype, shape) in sorted(manifest.items(), key=lambda entry: -entry[1][0].itemsize):
            if shape is not None:
                self._reserved[name] = self._end
                self._end += math.prod(shape) * dtype.itemsize
        most = 2**63 - 1
        widest = {
            name: Entry(dtype, (most,) if shape is None else tuple(shape), most, most)
            for name, (dtype, shape) in manifest.items()
        }
        self._room = len(encode_header(widest, self._metadata))

    def __enter__(self) -> SafetensorsWriter:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the manifest, in any order, from any device, with any strides."""
        dtype, shape = self._manifest[name]
        if name in self._entries:
            raise ValueError(f"{name!r} is written to {self.path} a second time")
        if tensor.dtype != dtype or (tensor.ndim != 1 if shape is None else tensor.shape != torch.Size(shape)):
            raise ValueError(
                f"{name!r} is {tensor.dtype} of {list(tensor.shape)}, "
                f"but the manifest of {self.path} says {dtype} of {shape if shape is None else list(shape)}"
            )
        start = self._reserved.get(name, self._end)
        self._entries[name] = Entry(dtype, tuple(tensor.shape), start, start + tensor.nbytes)
        self._end = max(self._end, start + tensor.nbytes)
        with writing(self.path):
            self._file.seek(self._room + start)
            self._file.write(bits(tensor.detach().cpu()).contiguous().numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with writing(self.path):
                with self._file:
                    if kind is None:
                        self._finish()
                if kind is None:
                    self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        if missing := [name for name in self._manifest if name not in self._entries]:
            raise ValueError(f"{self.path} was closed without {some(map(repr, missing))} of its manifest")
        self._file.seek(0)
        self._file.write(encode_header(self._entries, self._metadata, multiple=self._room))
        self._file.flush()
        os.fsync(self._file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a small file of UTF-8 whole; see `write_whole`."""
    write_whole(path, text.encode())


def write_whole(path: Path, content: bytes | Path) -> None:
    """Write a small file whole, or copy one; its folders are made, and what has its name stays if that fails."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def writing(path: Path) -> AbstractContextManager[None]:
    """Name the file in what the operating system refuses."""
    return explained(f"cannot write {path}", "nothing of it is left, choose another place")
