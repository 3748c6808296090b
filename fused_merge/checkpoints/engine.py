"""The stream: output files made block by block, each byte of the inputs read once for all outputs.

A block is the same range of the data of one file in all R outputs. A thread reads the inputs of its block, makes the
R points of it, takes their checksums while a cache still holds them, and writes them past the page cache (O_DIRECT)
where the file system takes that. There are more threads than cores, so that some write while others compute; no more
compute at a time than there are cores, since they would only wait for each other. Memory is that of the blocks in hand,
whatever the size of the model.

Bytes per element of b bytes: reads n*b of n inputs, writes R*b.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.checkpoints.checksum import add_to, checksums, text
from fused_merge.checkpoints.disk import DirectFile, aligned, bytes_of, read_into, reading, sync_folder
from fused_merge.checkpoints.plan import ALIGNMENT, OutputFile, Segment
from fused_merge.functional import backend
from fused_merge.io.writer import writing
from fused_merge.per_tensor import parse_bytes

# On two cores five threads took 3.0 s, three 3.7, four 3.4 and six, in more memory, 2.9
# (`python bench/bench_checkpoints.py --size 0.5 --work DIR --settings`).
_THREADS_PER_CORE = 2.5
_MEMORY = 80 << 20
# In the same memory, more threads with blocks of this size took less time than fewer with larger ones.
_LARGEST_BLOCK = 1 << 20
# Temporaries that a rule is given, in bytes for each byte of a block of one output.
_SCRATCH = 5


class Resources(NamedTuple):
    """What a stream may use.

    Attributes:
        threads: that read, compute and write.
        computing: how many of them read and compute at a time.
        memory: bytes for buffers.
        device: that computes.
        impl: `"eager"`, or as for `fused_merge.interpolate`.
    """

    threads: int
    computing: int
    memory: int
    device: torch.device
    impl: str

    @classmethod
    def of(cls, threads: int | None, max_memory: int | str | None, device: str | torch.device, impl: str) -> Resources:
        """Return what options allow; see `Job.run`.

        Raises:
            ValueError: if an option is out of range.
            RuntimeError: if `impl` cannot run on `device`.
        """
        where = backend.check_device(device)
        impl = backend.check_impl(impl)
        if backend.resolve(impl, where) != "triton":
            # Compiled code would start threads of its own in each of a stream.
            impl = "eager"
        if threads is None:
            threads = math.ceil(_THREADS_PER_CORE * _cores())
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        # Those that a GPU computes for wait for its copies meanwhile.
        computing = threads if where.type == "cuda" else min(threads, _cores())
        memory = _MEMORY if max_memory is None else parse_bytes(max_memory, what="max_memory")
        return cls(threads, computing, memory, where, impl)

    @property
    def scratch(self) -> int:
        """Bytes of temporaries on the CPU for each byte of a block of one output."""
        return _SCRATCH if self.device.type == "cpu" else 0

    def block_size(self, outputs: int, input_bytes: float) -> int:
        """Return the bytes of a block of one output.

        Args:
            outputs: R.
            input_bytes: bytes of all inputs for each byte of an output, at most.

        Raises:
            ValueError: if not even the smallest block fits.
        """
        held = self.threads * outputs + self.computing * (input_bytes + self.scratch)
        most = self.memory / held
        if most < ALIGNMENT:
            needed = held * ALIGNMENT
            raise ValueError(
                f"max_memory of {self.memory} bytes is too little for {self.threads} threads and {outputs} outputs; "
                f"allow {math.ceil(needed / 1e6)} MB or take fewer threads"
            )
        return min(_LARGEST_BLOCK, int(most) // ALIGNMENT * ALIGNMENT)


def write_file(
    file: OutputFile, paths: Sequence[Path], resources: Resources, advance: Callable[[int], None]
) -> dict[str, list[str]]:
    """Write one file of every output, under their names only when all are whole and on the disk.

    Args:
        file: the plan.
        paths: where it goes in each of the R outputs; written as `PATH.part` first. What is there is removed.
        resources: what may be used.
        advance: called with the bytes just written, from any thread.

    Returns:
        For each tensor its checksum in each output.

    Raises:
        OSError: if an input vanished or changed, or an output cannot be written; nothing of the file is left.
    """
    parts = [path.with_name(path.name + ".part") for path in paths]
    input_bytes = max((_input_bytes(segment) for segment in file.segments), default=0.0)
    block = resources.block_size(len(paths), input_bytes)
    size = len(file.header) + file.nbytes
    totals: dict[str, Tensor] = {}
    try:
        for path in paths:
            with writing(path):
                # A disk need not hold both.
                path.unlink(missing_ok=True)
        with ExitStack() as stack:
            sources = {
                path: stack.enter_context(reading(path))
                for path in sorted({file_range.file for segment in file.segments for file_range in segment.inputs})
            }
            outputs = [stack.enter_context(DirectFile(path, part)) for path, part in zip(paths, parts, strict=True)]
            made, desks = _buffers(file, len(outputs), block, input_bytes, resources)
            stream = _Stream(file, sources, outputs, block, desks, resources, advance)
            with workers(resources.threads) as pool, _Shared(range(0, size, block)) as blocks:
                for own in pool.map(stream.run, [blocks] * resources.threads, made):
                    add_to(totals, own.items())
                list(pool.map(lambda output: output.finish(size), outputs))
        for part, path in zip(parts, paths, strict=True):
            with writing(path):
                part.replace(path)
                sync_folder(path.parent)
    except BaseException:
        for path in (*parts, *paths):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    # Tensors without elements are in no block.
    nothing = torch.zeros(len(paths), 2, dtype=torch.int64)
    return {name: text(totals.get(name, nothing)) for name in file.entries}


class _Clip(NamedTuple):
    """What of a segment lies in a block."""

    segment: Segment
    skipped: int  # elements of the segment before the block
    numel: int
    start: int  # byte in the block

    def joins(self) -> tuple[object, ...]:
        """Return what adjacent clips must share to be computed together."""
        return self.segment.rule, self.segment.dtype, tuple(file_range.dtype for file_range in self.segment.inputs)


class _Stream(NamedTuple):
    """One file on its way; every thread runs `run`."""

    file: OutputFile
    sources: Mapping[Path, int]
    outputs: Sequence[DirectFile]
    block: int
    desks: SimpleQueue[_Desk]  # one for each that may compute at a time
    resources: Resources
    advance: Callable[[int], None]

    def run(self, blocks: _Shared, made: Tensor) -> dict[str, Tensor]:
        """Make and write blocks until none is left.

        Args:
            blocks: where they begin, shared by all threads.
            made: uint8 `[R, block]`, room for a block of each output that is of this thread alone.

        Returns:
            The checksums of what was written.
        """
        try:
            totals: dict[str, Tensor] = {}
            for at in blocks:
                end = min(at + self.block, len(self.file.header) + self.file.nbytes)
                desk = self.desks.get()
                try:
                    add_to(totals, self._fill(at, end, desk, made))
                finally:
                    self.desks.put(desk)
                for output, block in zip(self.outputs, made, strict=True):
                    output.write(bytes_of(block), at, end - at)
                self.advance((end - at) * len(self.outputs))
            return totals
        except BaseException:
            blocks.stop()
            raise

    def _fill(self, at: int, end: int, desk: _Desk, made: Tensor) -> list[tuple[str, Tensor]]:
        """Fill `made`, a block of each output, with bytes [at, end) of the file."""
        header = len(self.file.header)
        if at < header:
            text = torch.frombuffer(bytearray(self.file.header[at:end]), dtype=torch.uint8)
            made[:, : len(text)] = text
        pieces = []
        for _, group in groupby(self._clips(at - header, end - header), _Clip.joins):
            clips = list(group)
            self._compute(clips, desk, made)
            pieces += [self._piece(clip, made) for clip in clips]
        return pieces

    def _clips(self, start: int, end: int) -> Iterator[_Clip]:
        """Yield what of the segments lies in [start, end) of the data."""
        segments = self.file.segments
        for segment in segments[max(0, bisect_right(segments, start, key=lambda segment: segment.start) - 1) :]:
            if segment.start >= end:
                return
            size = segment.dtype.itemsize
            skipped = max(0, start - segment.start) // size
            count = min(segment.numel, -(-(end - segment.start) // size)) - skipped
            if count > 0:
                yield _Clip(segment, skipped, count, segment.start + skipped * size - start)

    def _compute(self, clips: Sequence[_Clip], desk: _Desk, made: Tensor) -> None:
        """Read the inputs of clips of one kind and make their outputs."""
        segment, count = clips[0].segment, sum(clip.numel for clip in clips)
        inputs = desk.take([file_range.dtype for file_range in segment.inputs], count)
        for i, tensor in enumerate(inputs):
            view = bytes_of(tensor)
            filled = 0
            for clip in clips:
                file_range = clip.segment.inputs[i]
                nbytes = clip.numel * file_range.dtype.itemsize
                offset = file_range.offset + clip.skipped * file_range.dtype.itemsize
                read_into(self.sources[file_range.file], file_range.file, view[filled : filled + nbytes], offset)
                filled += nbytes
        place = slice(clips[0].start, clips[0].start + count * segment.dtype.itemsize)
        outs = list(made[:, place].view(segment.dtype))
        first = segment.first + clips[0].skipped
        if desk.stream is None:
            segment.rule(inputs, outs, first, self.resources.impl, desk.scratch)
            return
        # Other threads read, write and compute while this one waits for its copies.
        with torch.cuda.stream(desk.stream):
            there = [tensor.to(self.resources.device, non_blocking=True) for tensor in inputs]
            points = [torch.empty_like(out, device=self.resources.device) for out in outs]
            segment.rule(there, points, first, self.resources.impl, None)
            for out, point in zip(outs, points, strict=True):
                out.copy_(point, non_blocking=True)
            desk.stream.synchronize()

    def _piece(self, clip: _Clip, made: Tensor) -> tuple[str, Tensor]:
        """Return what a clip adds to the checksums of its tensor."""
        size = clip.segment.dtype.itemsize
        piece = made[:, clip.start : clip.start + clip.numel * size]
        return clip.segment.name, checksums(piece, (clip.segment.first + clip.skipped) * size)


class _Desk:
    """What a thread holds while it computes: the inputs of a block, and room for temporaries."""

    def __init__(self, room: Tensor, scratch: int, device: torch.device) -> None:
        self._inputs = room[scratch:]
        self.scratch = room[:scratch]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def take(self, dtypes: Sequence[torch.dtype], count: int) -> list[Tensor]:
        """Return a vector of `count` elements of each dtype; they are overwritten by the next call."""
        place = 0
        taken = []
        for dtype in dtypes:
            nbytes = count * dtype.itemsize
            taken.append(self._inputs[place : place + nbytes].view(dtype))
            place += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return taken


class _Shared:
    """An iterator that many threads take from, until one of them stops it."""

    def __init__(self, values: range) -> None:
        self._values = iter(values)
        self._lock = threading.Lock()

    def __enter__(self) -> _Shared:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._values)

    def stop(self) -> None:
        """Let nobody take any more."""
        with self._lock:
            self._values = iter(range(0))


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Run threads whose torch operations stay in them: each is a worker already."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            # It also is what threads that are started from now on begin with.
            torch.set_num_threads(before)


def _buffers(
    file: OutputFile, outputs: int, block: int, input_bytes: float, resources: Resources
) -> tuple[Tensor, SimpleQueue[_Desk]]:
    """Return room for the outputs, uint8 `[threads, R, block]`, and the desks of those who compute."""
    written = resources.threads * outputs * block
    most = max((len(segment.inputs) for segment in file.segments), default=0)
    scratch = resources.scratch * block
    desk = -(-int(input_bytes * block) // ALIGNMENT) * ALIGNMENT + most * ALIGNMENT + scratch
    room = aligned(written + resources.computing * desk, pinned=resources.device.type == "cuda")
    desks: SimpleQueue[_Desk] = SimpleQueue()
    for own in room[written:].view(resources.computing, desk):
        desks.put(_Desk(own, scratch, resources.device))
    return room[:written].view(resources.threads, outputs, block), desks


def _cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _input_bytes(segment: Segment) -> float:
    """Return how many bytes of inputs a byte of an output takes."""
    return sum(file_range.dtype.itemsize for file_range in segment.inputs) / segment.dtype.itemsize
