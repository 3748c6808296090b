"""What is to be written, down to the byte, before any of it is.

A plan knows every output file: its header, and the segments of elements that fill its data, each with the place of its
inputs and the rule that makes it of them. Nothing here reads a tensor or writes a file.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fused_merge.io.headers import Entry, encode_header
from fused_merge.io.sources import SINGLE_FILE, FileRange, FileSource

# Data begin and blocks are cut where every file system can write past its cache.
ALIGNMENT = 4096


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among hundreds of thousands of small tuples, of which none is."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class AlignedSegment(NamedTuple):
    """Row-major elements of a tensor that come from the same inputs."""

    numel: int
    inputs: tuple[FileRange, ...]  # in each checkpoint, or in the only one that has them
    merged: bool  # whether all checkpoints hold them and they are floating


class AlignedTensor(NamedTuple):
    """A tensor of the output; its segments follow one another and fill it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: tuple[AlignedSegment, ...]

    @property
    def merged(self) -> bool:
        """Whether all checkpoints hold it and it is floating; rows beyond a common vocabulary are copied even so."""
        return self.segments[0].merged

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in each output."""
        return prod(self.shape) * self.dtype.itemsize


def merged_share(tensors: Sequence[AlignedTensor]) -> float:
    """Return the share of the bytes of an output that is merged and not copied."""
    segments = [(each, tensor.dtype.itemsize) for tensor in tensors for each in tensor.segments]
    whole = sum(each.numel * size for each, size in segments)
    return sum(each.numel * size for each, size in segments if each.merged) / max(1, whole)


class Rule(Protocol):
    """Makes n elements of R outputs of the same elements of the inputs: vectors, of which `outs` are written.

    `first` is the row-major index of the first element in its tensor, `impl` is "eager" or what is to compute as for
    `fused_merge.interpolate`, and `scratch` bytes that may be overwritten. A rule may read more by itself; then its
    `bytes_read` says how much.
    """

    @property
    def telling(self) -> Sequence[int]:
        """The outputs that are not all finite where any output is not."""

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Compute."""


class CopyRule(NamedTuple):
    """The rule of what is copied: output k is input `chosen[k]`, bit for bit or, if dtypes differ, converted."""

    chosen: tuple[int, ...]

    @property
    def telling(self) -> Sequence[int]:
        """One of each input."""
        return tuple(map(self.chosen.index, set(self.chosen)))

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Copy."""
        for out, chosen in zip(outs, self.chosen, strict=True):
            source = inputs[chosen]
            if source.dtype == out.dtype:
                # Of booleans a copy would keep no byte but 0 and 1.
                source, out = source.view(torch.uint8), out.view(torch.uint8)
            out.copy_(source)


class Segment(NamedTuple):
    """Row-major elements of a tensor of the output that are made alike."""

    name: str  # of the tensor, as is the dtype
    dtype: torch.dtype
    numel: int
    inputs: tuple[FileRange, ...]  # what they are made of
    rule: Rule
    first: int  # the index of the first of them in the tensor
    start: int  # the byte of the file's data at which they begin

    @property
    def bytes_read(self) -> int:
        """Bytes of what they are made of."""
        return self.numel * sum(place.dtype.itemsize for place in self.inputs) + getattr(self.rule, "bytes_read", 0)


class OutputFile(NamedTuple):
    """One safetensors file, the same in every output but for the values, or one of a single output."""

    name: str
    header: bytes  # a multiple of `ALIGNMENT`
    entries: Mapping[str, Entry]  # what the header says
    segments: tuple[Segment, ...]  # in the order of the data, without gaps
    nbytes: int  # of the data
    only: str | None = None  # the name of the output that it is in; None for every output

    @property
    def key(self) -> str:
        """What tells it from all other files of a job."""
        return self.name if self.only is None else f"{self.only}/{self.name}"

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.nbytes

    @property
    def inputs(self) -> list[Path]:
        """The files that it is made of."""
        # To hash a path takes long, and one source has one object for each.
        found = {id(place.file): place.file for segment in self.segments for place in segment.inputs}
        return sorted(set(found.values()))


RuleOf: TypeAlias = Callable[[AlignedTensor, AlignedSegment], Rule]


def lay_out_files(
    tensors: Sequence[AlignedTensor], base: FileSource, rule_of: RuleOf, max_shard_size: int | None
) -> list[OutputFile]:
    """Give tensors places in files of at most so many bytes, or in those of `base`; what it lacks goes to its last."""
    metadata = {"format": "pt"}
    if max_shard_size is not None:
        shards = _shard_by_size(tensors, max_shard_size)
        return [lay_out_file(name, shard, rule_of, metadata) for name, shard in shards.items()]
    file_of = {name: file for file, names in base.shards.items() for name in names}
    last = list(base.shards)[-1]
    of_base: dict[str, list[AlignedTensor]] = {file: [] for file in base.shards}
    for tensor in tensors:
        of_base[file_of.get(tensor.name, last)].append(tensor)
    return [
        lay_out_file(SINGLE_FILE if base.index is None else file, shard, rule_of, metadata | base.metadata(file))
        for file, shard in of_base.items()
        if shard
    ]


def lay_out_file(
    name: str, tensors: Iterable[AlignedTensor], rule_of: RuleOf, metadata: Mapping[str, str]
) -> OutputFile:
    """Give every tensor its place in one file: the widest dtype first, so that each is aligned."""
    entries: dict[str, Entry] = {}
    segments: list[Segment] = []
    place = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        first, end = 0, place + tensor.nbytes
        entries[tensor.name] = Entry(tensor.dtype, tensor.shape, place, end)
        for each in tensor.segments:
            if each.numel:
                rule, start = rule_of(tensor, each), place + first * tensor.dtype.itemsize
                segments.append(Segment(tensor.name, tensor.dtype, each.numel, each.inputs, rule, first, start))
            first += each.numel
        place = end
    return OutputFile(name, encode_header(entries, metadata, multiple=ALIGNMENT), entries, tuple(segments), place)


def _shard_by_size(tensors: Iterable[AlignedTensor], most: int) -> dict[str, list[AlignedTensor]]:
    """Return files, named as by Transformers, of at most `most` bytes; a larger tensor gets one to itself."""
    shards: list[list[AlignedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
