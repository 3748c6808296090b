"""Whole checkpoints: safetensors files written tensor by tensor, folders for many ratios from one read."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor

from fused_merge import backend
from fused_merge.interpolation import check_ratios, points_of
from fused_merge.names import some
from fused_merge.progress import progress_bar
from fused_merge.sources import (
    CODES,
    INDEX_FILE,
    SINGLE_FILE,
    FileSource,
    Match,
    PathLike,
    bits,
    match,
    open_files,
)

# Name -> dtype and shape; the shape None is a vector whose length shows when it is written.
Manifest: TypeAlias = Mapping[str, tuple[torch.dtype, Sequence[int] | None]]

_LONGEST = 2**63 - 1
# What a model folder needs beside its weights, and nothing that only its training left there.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*chat_template*",
    "*processor_config.json",
    "*.py",
)


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time; memory stays at the tensor in hand.

    Used as a context manager. Everything goes to `PATH.part` beside the file, which takes its name when the
    block ends well and is removed when it does not. The room for the header is reserved from the manifest;
    the header itself is written last, so that the length of a vector may be left open until then. Tensors of
    known size lie first, widest dtype first as in files of safetensors itself, so that each is aligned;
    vectors of open length follow in the order in which they are written.

    Args:
        path: the file to write; an existing one is replaced at the end.
        manifest: every tensor that will be written, with its dtype and shape.
        metadata: free-form strings for the header.

    Raises:
        ValueError: for a dtype that the format lacks, a tensor that contradicts the manifest, one written
            twice, or one that is missing when the block ends.
        OSError: if the disk is full or refuses; the sentence names the file.
    """

    def __init__(self, path: PathLike, manifest: Manifest, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._manifest = manifest
        self._metadata = dict(metadata or {})
        for name, (dtype, _) in manifest.items():
            if dtype not in CODES:
                raise ValueError(f"{name!r} is {dtype}, which safetensors files cannot hold; convert it first")
        # Where each tensor begins and ends, relative to the end of the header.
        self._spans: dict[str, tuple[Sequence[int], int, int]] = {}
        self._reserved: dict[str, int] = {}
        self._end = 0
        for name, (dtype, shape) in sorted(manifest.items(), key=lambda entry: -entry[1][0].itemsize):
            if shape is not None:
                self._reserved[name] = self._end
                self._end += math.prod(shape) * dtype.itemsize
        widest = [_LONGEST]
        self._room = len(
            self._header({n: (widest if s is None else s, _LONGEST, _LONGEST) for n, (_, s) in manifest.items()})
        )

    def __enter__(self) -> SafetensorsWriter:
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("wb")
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in any order.

        Args:
            name: as in the manifest.
            tensor: of the dtype and shape of the manifest; any device and strides.
        """
        dtype, shape = self._manifest[name]
        if name in self._spans:
            raise ValueError(f"{name!r} is written to {self.path} a second time")
        if tensor.dtype != dtype or (tensor.ndim != 1 if shape is None else tensor.shape != torch.Size(shape)):
            raise ValueError(
                f"{name!r} is {tensor.dtype} of {list(tensor.shape)}, "
                f"but the manifest of {self.path} says {dtype} of {shape if shape is None else list(shape)}"
            )
        start = self._reserved.get(name, self._end)
        self._spans[name] = (tensor.shape, start, start + tensor.nbytes)
        self._end = max(self._end, start + tensor.nbytes)
        with _writing(self.path):
            self._file.seek(self._room + start)
            self._file.write(bits(tensor.detach().cpu()).contiguous().numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with _writing(self.path), self._file:
                if kind is None:
                    self._finish()
            if kind is None:
                with _writing(self.path):
                    self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        missing = [name for name in self._manifest if name not in self._spans]
        if missing:
            raise ValueError(f"{self.path} was closed without {some(map(repr, missing))} of its manifest")
        self._file.seek(0)
        self._file.write(self._header(self._spans, self._room))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _header(self, spans: Mapping[str, tuple[Sequence[int], int, int]], room: int = 0) -> bytes:
        """Return the header of at least `room` bytes; the format allows spaces at its end."""
        entries: dict[str, object] = {"__metadata__": self._metadata}
        for name, (shape, start, end) in spans.items():
            code = CODES[self._manifest[name][0]]
            entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = max(-(-len(text) // 8) * 8, room - 8)
        return struct.pack("<Q", length) + text.ljust(length)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; nothing of it is left, choose another place"
        ) from error


def interpolate_checkpoints(
    base: PathLike,
    tuned: PathLike,
    ratios: Sequence[float],
    out: PathLike,
    *,
    overwrite: bool = False,
    impl: str = "auto",
    progress: bool = True,
) -> list[Path]:
    """Write theta(r) = base + r * (tuned - base) as one model folder for each ratio, reading both once.

    `out/r0.10/` and so on mirror the shards and the index of `base`, under canonical names; tied weights that
    `base` leaves out stay out. Configuration, tokenizer and chat template are copied from `tuned`. Integer
    tensors are copied from `tuned`, at r = 0 from `base`; at r = 0 and r = 1 every tensor is copied bit for
    bit. Memory: R + 2 times the largest tensor. Source: Lin et al. 2024 (arXiv 2309.06256).

    Everything is checked before the first byte is written. Each folder is built under a hidden name, and all
    are renamed when all are whole.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: the same, with the names, shapes and dtypes of `base`.
        ratios: R finite, distinct ratios; below 0 or above 1 they extrapolate.
        out: the folder to write to; made if need be.
        overwrite: replace ratio folders that exist.
        impl: `"auto"`, `"triton"` or `"eager"`.
        progress: show a progress bar where rich is installed and standard error is a terminal.

    Returns:
        The folders, in the order of `ratios`. Their names have two decimals, or as many as the ratio needs.

    Raises:
        ValueError: if checkpoints or ratios do not fit; the sentence names the tensor, file or ratio.
        FileExistsError: if a ratio folder exists and `overwrite` is false.
        OSError: if `out` cannot be written to or the disk is too small.
        RuntimeError: if `impl="triton"` cannot run here.
        TypeError: if `base` or `tuned` is not a path.
    """
    ratios = check_ratios(ratios)
    backend.resolve(impl, torch.device("cpu"))
    start, end = open_files(base, role="base"), open_files(tuned, role="tuned")
    matched = match(start, end, same_dtype=True)
    _check_tied_config(start, end)
    folders = [Path(out) / name for name in _folder_names(ratios)]
    for folder in folders:
        _check_target(folder, (start, end), overwrite)
    companions = _companions(end)
    total = sum(math.prod(start.shape(name)) * start.dtype(name).itemsize for name in start)
    _check_space(Path(out), len(ratios) * (total + sum(file.stat().st_size for file in companions)))

    parts = [folder.with_name(f".{folder.name}.part") for folder in folders]
    try:
        with _writing(Path(out)):
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                for file in companions:
                    shutil.copyfile(file, part / file.name)
                if start.index is not None:
                    index = {
                        **start.index,
                        "weight_map": {n: f for f, names in start.shards.items() for n in names},
                    }
                    (part / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        with progress_bar("interpolating", total, enabled=progress) as advance:
            for shard in start.shards:
                _write_shard(shard, start, end, matched, ratios, parts, impl, advance)
        with _writing(Path(out)):
            for part, folder in zip(parts, folders, strict=True):
                replaced = folder.with_name(f".{folder.name}.old")
                shutil.rmtree(replaced, ignore_errors=True)
                if folder.exists():
                    folder.replace(replaced)
                part.replace(folder)
                shutil.rmtree(replaced, ignore_errors=True)
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
    return folders


def _write_shard(
    shard: str,
    start: FileSource,
    end: FileSource,
    matched: Match,
    ratios: Sequence[float],
    parts: Sequence[Path],
    impl: str,
    advance: Callable[[int], None],
) -> None:
    """Write one shard into every folder of `parts`."""
    manifest = {name: (start.dtype(name), start.shape(name)) for name in start.shards[shard]}
    metadata = {"format": "pt", **start.metadata(shard)}
    file = SINGLE_FILE if start.index is None else shard
    with ExitStack() as stack:
        writers = [stack.enter_context(SafetensorsWriter(part / file, manifest, metadata)) for part in parts]
        for name in manifest:
            points = points_of(matched.resolve(name), start, end, ratios, impl)
            for writer, point in zip(writers, points, strict=True):
                writer.write(name, point)
            advance(point.nbytes)
            # Or they would stay while the next are made.
            del points, point


def _folder_names(ratios: Sequence[float]) -> list[str]:
    names: dict[str, float] = {}
    for ratio in ratios:
        # + 0.0 so that −0.0 is called 0.
        text = f"{ratio + 0.0:.2f}"
        if not math.isclose(float(text), ratio, rel_tol=1e-9):
            text = f"{ratio:.9g}"
        if f"r{text}" in names:
            raise ValueError(f"ratios {names[f'r{text}']} and {ratio} would share the folder r{text}; drop one")
        names[f"r{text}"] = ratio
    return list(names)


def _check_target(folder: Path, inputs: Sequence[FileSource], overwrite: bool) -> None:
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise FileExistsError(f"{folder} exists; pass overwrite=True to replace a folder, or choose another")
    for source in inputs:
        if folder.resolve() in (source.path.resolve(), *source.path.resolve().parents):
            raise ValueError(f"{folder} holds the input {source.origin}, which it would replace; choose another folder")


def _check_space(out: Path, needed: int) -> None:
    """Verify that `out` can be made, written to, and holds `needed` bytes more."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"cannot write to {out}: {place} is not a folder that you may write to; choose another")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(f"{out} needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB free; make room or drop ratios")


def _check_tied_config(start: FileSource, end: FileSource) -> None:
    """Refuse an output whose configuration would ask for a weight that it leaves out."""
    config = end.path / "config.json"
    left_out = sorted(set(end) - set(start))
    if not left_out or not config.is_file():
        return
    try:
        settings = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"{config} is not JSON ({error}); download it again") from error
    if isinstance(settings, dict) and settings.get("tie_word_embeddings") is False:
        raise ValueError(
            f"{start.origin} leaves out {left_out[0]!r}, which {config} does not tie; "
            "set tie_word_embeddings to true there or write the tensor into the base"
        )


def _companions(source: FileSource) -> list[Path]:
    """Return the files of a folder that a model needs beside its weights."""
    if not source.path.is_dir():
        return []
    return sorted(
        path
        for path in source.path.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COMPANIONS)
    )
