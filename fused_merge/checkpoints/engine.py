"""Output files made block by block, each byte of the inputs read once for all outputs.

A block is the same range of one file in all R outputs. A thread takes a piece of the file, block after block: it reads
the inputs, makes the R points, hashes them while a cache still holds them, and writes them past the page cache
(O_DIRECT) where the file system takes that. There are more threads than cores, so that some write while others compute;
no more compute at a time than there are cores, since they would only wait for each other. Memory is that of the blocks
in hand, whatever the size of the model.

Elements that are not finite are counted, unless they are copies: sums of blocks say whether there may be any.

Bytes per element of b bytes: reads n*b of n inputs, writes R*b.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_merge.checkpoints.checksum import PIECE, hasher
from fused_merge.checkpoints.disk import DirectFile, aligned
from fused_merge.checkpoints.plan import ALIGNMENT, OutputFile, Segment
from fused_merge.functional import backend
from fused_merge.io.files import bytes_of, read_into, reading
from fused_merge.io.sources import same_bits
from fused_merge.io.writer import sync_folder, writing

# On two cores five threads took 3.0 s, three 3.7, four 3.4 and six, in more memory, 2.9
# (`python bench/bench_checkpoints.py --size 0.5 --work DIR --settings`).
_THREADS_PER_CORE = 2.5
_MEMORY = 80 << 20
# In the same memory, more threads with blocks of this size took less time than fewer with larger ones.
_LARGEST_BLOCK = 1 << 20
# What sums of blocks are made in: they must not overflow before their elements do.
_SUMS = {x: x for x in (torch.float64, torch.float32, torch.bfloat16)} | {torch.float16: torch.float32}
# Temporaries that a rule is given, in bytes for each byte of a block of one output.
_SCRATCH = 5


class Resources(NamedTuple):
    """What a stream may use."""

    threads: int  # that read, compute and write
    computing: int  # how many of them read and compute at a time
    memory: int  # bytes for buffers
    device: torch.device  # that computes
    impl: str  # "eager", or as for `fused_merge.interpolate`

    @classmethod
    def of(cls, threads: int | None, max_memory: int | None, device: str | torch.device, impl: str) -> Resources:
        """Return what `RunOptions` allow; ValueError or RuntimeError if `impl` cannot run on `device`."""
        where = backend.check_device(device)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        impl = backend.check_impl(impl)
        if backend.resolve(impl, where) != "triton":
            # Compiled code would start threads of its own in each of a stream.
            impl = "eager"
        threads = math.ceil(_THREADS_PER_CORE * cores) if threads is None else threads
        # Those that a GPU computes for wait for its copies meanwhile.
        computing = threads if where.type == "cuda" else min(threads, cores)
        return cls(threads, computing, _MEMORY if max_memory is None else max_memory, where, impl)

    @property
    def scratch(self) -> int:
        """Bytes of temporaries on the CPU for each byte of a block of one output."""
        return _SCRATCH if self.device.type == "cpu" else 0

    def block_size(self, outputs: int, input_bytes: float) -> int:
        """Return the bytes of a block of one output, where a byte of it takes `input_bytes` of inputs, if any fits."""
        held = self.threads * outputs + self.computing * (input_bytes + self.scratch)
        if block := int(self.memory / held) // ALIGNMENT * ALIGNMENT:
            return min(_LARGEST_BLOCK, block)
        raise ValueError(
            f"max_memory of {self.memory} bytes is too little for {self.threads} threads and {outputs} outputs; "
            f"allow {math.ceil(held * ALIGNMENT / 1e6)} MB or take fewer threads"
        )


class Written(NamedTuple):
    """What is known of one file of R outputs when it is whole."""

    digests: list[list[str]]  # for each output, of its pieces
    # Name of a tensor -> for each output the elements that are not finite: since an input is not, unless it is copied,
    # and since they are too large for the dtype. Tensors without any are left out.
    not_finite: dict[str, list[list[int]]]


def write_file(
    file: OutputFile, paths: Sequence[Path], resources: Resources, advance: Callable[[int], None]
) -> Written:
    """Write one file to a path in each of R outputs, and return what is in them.

    What is there is removed; all get their names when all are whole and on the disk. Threads call `advance` with the
    bytes just written. Raises OSError if a file cannot be read or written; then nothing of it is left.
    """
    parts = [path.with_name(path.name + ".part") for path in paths]
    try:
        for path in paths:
            with writing(path):
                # A disk need not hold both.
                path.unlink(missing_ok=True)
        with ExitStack() as stack:
            sources = {path: stack.enter_context(reading(path)) for path in file.inputs}
            outputs = [stack.enter_context(DirectFile(*both)) for both in zip(paths, parts, strict=True)]
            with workers(resources.threads, advance) as (pool, advance):
                stream = _Stream(file, sources, outputs, resources, advance)
                digests = list(pool.map(stream.write_piece, range(0, file.size, PIECE)))
                list(pool.map(lambda output: output.finish(file.size), outputs))
        for part, path in zip(parts, paths, strict=True):
            with writing(path):
                part.replace(path)
                sync_folder(path.parent)
    except BaseException:
        for path in (*parts, *paths):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return Written([list(own) for own in zip(*digests, strict=True)], dict(sorted(stream.not_finite.items())))


@dataclass
class _Stream:
    """One file on its way, written by many threads."""

    file: OutputFile
    sources: Mapping[Path, int]
    outputs: Sequence[DirectFile]
    resources: Resources
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        self.not_finite: dict[str, list[list[int]]] = {}
        self._counting = threading.Lock()
        resources, outputs, segments = self.resources, len(self.outputs), self.file.segments
        # How many bytes of inputs a byte of an output takes.
        input_bytes = max((sum(x.dtype.itemsize for x in s.inputs) / s.dtype.itemsize for s in segments), default=0.0)
        self._block = block = resources.block_size(outputs, input_bytes)
        # Room for blocks of the outputs, `[R, block]`, for each thread; for inputs only for those that compute.
        written = resources.threads * outputs * block
        most = max((len(segment.inputs) for segment in segments), default=0)
        scratch = resources.scratch * block
        computing = scratch + (math.ceil(int(input_bytes * block) / ALIGNMENT) + most) * ALIGNMENT
        cuda = resources.device.type == "cuda"
        room = aligned(written + resources.computing * computing, pinned=cuda)
        self._output_buffers: SimpleQueue[Tensor] = SimpleQueue()
        for own in room[:written].view(resources.threads, outputs, block):
            self._output_buffers.put(own)
        self._input_buffers: SimpleQueue[_InputBuffers] = SimpleQueue()
        for own in room[written:].view(resources.computing, computing):
            stream = torch.cuda.Stream(resources.device) if cuda else None  # type: ignore[no-untyped-call]
            self._input_buffers.put(_InputBuffers(own[scratch:], own[:scratch], stream))

    def write_piece(self, start: int) -> list[str]:
        """Make and write the piece that begins at a byte of the file, block by block; returns its digests."""
        hashers = [hasher() for _ in self.outputs]
        end = min(start + PIECE, self.file.size)
        with _taken(self._output_buffers) as made:
            for at in range(start, end, self._block):
                blocks = [bytes_of(block)[: end - at] for block in made]
                with _taken(self._input_buffers) as buffers:
                    self._fill(at, min(at + self._block, end), buffers, made)
                    for own, block in zip(hashers, blocks, strict=True):
                        own.update(block)
                for output, block in zip(self.outputs, made, strict=True):
                    output.write(bytes_of(block), at, len(blocks[0]))
                self.advance(len(blocks[0]) * len(blocks))
        return [own.hexdigest() for own in hashers]

    def _fill(self, at: int, end: int, buffers: _InputBuffers, made: Tensor) -> None:
        """Fill `made`, a block of each output, with bytes [at, end) of the file."""
        header = len(self.file.header)
        if at < header:
            text = torch.frombuffer(bytearray(self.file.header[at:end]), dtype=torch.uint8)
            made[:, : len(text)] = text
        segments, start, end = self.file.segments, at - header, end - header
        for segment in segments[max(0, bisect_right(segments, start, key=lambda segment: segment.start) - 1) :]:
            if segment.start >= end:
                break
            size = segment.dtype.itemsize
            skipped = max(0, start - segment.start) // size
            numel = min(segment.numel, -(-(end - segment.start) // size)) - skipped
            if numel > 0:
                place = segment.start + skipped * size - start
                outs = list(made[:, place : place + numel * size].view(segment.dtype))
                self._compute(segment, skipped, buffers, outs)

    def _compute(self, segment: Segment, skipped: int, buffers: _InputBuffers, outs: Sequence[Tensor]) -> None:
        """Make elements of a segment: as many as fit `outs`, after those that are skipped."""
        inputs, left = [], buffers.inputs
        for file, offset, dtype in segment.inputs:
            nbytes = outs[0].numel() * dtype.itemsize
            read_into(self.sources[file], file, bytes_of(left[:nbytes]), offset + skipped * dtype.itemsize)
            inputs.append(left[:nbytes].view(dtype))
            left = left[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        first, impl = segment.first + skipped, self.resources.impl
        if buffers.stream is None:
            segment.rule(inputs, outs, first, impl, buffers.scratch)
        else:
            # Other threads read, write and compute while this one waits for its copies.
            with torch.cuda.stream(buffers.stream):
                there = [tensor.to(self.resources.device, non_blocking=True) for tensor in inputs]
                points = [torch.empty_like(out, device=self.resources.device) for out in outs]
                segment.rule(there, points, first, impl, None)
                for out, point in zip(outs, points, strict=True):
                    out.copy_(point, non_blocking=True)
                buffers.stream.synchronize()
        # A sum is not finite if an element is not or, seldom, if it is too large itself: then the count finds none.
        wide = _SUMS.get(segment.dtype)
        if wide is not None and not all(math.isfinite(outs[i].sum(dtype=wide)) for i in segment.rule.telling):
            self._count(segment.name, inputs, outs)

    def _count(self, name: str, inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Count the elements that are not finite, in each output, by whether the inputs are; copies keep what was."""
        finite = torch.ones_like(outs[0], dtype=torch.bool)
        for tensor in inputs:
            finite &= tensor.isfinite()
        for i, out in enumerate(outs):
            odd = ~out.isfinite()
            copied = any(same_bits(out, tensor.to(out.dtype)) for tensor in inputs)
            counts = [0 if copied else int((odd & ~finite).sum()), int((odd & finite).sum())]
            if any(counts):
                with self._counting:
                    own = self.not_finite.setdefault(name, [[0, 0] for _ in outs])
                    own[i] = [a + b for a, b in zip(own[i], counts, strict=True)]


class _InputBuffers(NamedTuple):
    """What a thread holds while it computes: room for the inputs of a block and for temporaries; on a GPU a stream."""

    inputs: Tensor
    scratch: Tensor
    stream: torch.cuda.Stream | None


_T = TypeVar("_T")


@contextmanager
def _taken(queue: SimpleQueue[_T]) -> Iterator[_T]:
    """Take something from a queue, and put it back."""
    item = queue.get()
    try:
        yield item
    finally:
        queue.put(item)


@contextmanager
def workers(threads: int, advance: Callable[[int], None]) -> Iterator[tuple[ThreadPoolExecutor, Callable[[int], None]]]:
    """Run threads whose torch operations stay in them: each is a worker already.

    Also yields what they are to call instead of `advance`, so that those on their way end at once when the block fails
    or is interrupted.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    stopped = threading.Event()

    def advance_or_stop(nbytes: int) -> None:
        if stopped.is_set():
            raise CancelledError
        advance(nbytes)

    with ExitStack() as stack:
        # It also is what threads that are started from now on begin with.
        stack.callback(torch.set_num_threads, before)
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.callback(stopped.set)
        yield pool, advance_or_stop
