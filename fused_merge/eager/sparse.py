"""The storage of a sparsified tensor: one bit an element, and the kept values packed.

The elements, in row-major order, are cut into blocks of 1024, at least one; the last is padded with zero bits.

* `mask`: int32 words, 32 to a block. Bit i of word j (bit 0 is the lowest) tells whether element 32*j + i is kept.
* `values`: the kept values in row-major order, in the dtype of the tensor. Exact zeros are never kept, so −0.0 comes
  back as 0.0.
* `offsets`: for each block, how many values stand before it. int32, or int64 from 2^31 kept values on. It follows from
  `mask` and is not stored in files.

A kept element e is value number `offsets[e >> 10] + popcount(bits of its block before bit e & 1023)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

BLOCK = 1024
WORDS = BLOCK // 32
# Elements handled at once, to keep temporaries in the cache.
_CHUNK = 1 << 18


def block_count(numel: int) -> int:
    """Return how many blocks a tensor of `numel` elements takes, at least one."""
    return max(1, -(-numel // BLOCK))


def packed_nbytes(numel: int, kept: int, itemsize: int) -> int:
    """Return the bytes that `kept` of `numel` elements take: mask, values and offsets."""
    return block_count(numel) * (WORDS * 4 + offset_dtype(kept).itemsize) + kept * itemsize


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A tensor of which only some elements are stored; see the module for the format."""

    mask: Tensor  # int32, `[32 * blocks]`
    values: Tensor  # `[kept]`, any floating dtype
    offsets: Tensor  # int32 or int64, `[blocks]`
    shape: torch.Size  # of the tensor that it stands for

    @classmethod
    def pack(cls, dense: Tensor, keep: Tensor) -> SparseTensor:
        """Store the elements of `dense` that `keep` marks and that are not zero.

        Args:
            dense: floating, any shape and strides.
            keep: bool, of the same shape and on the same device.

        Raises:
            ValueError: if shapes, dtype of `keep` or devices do not fit.
        """
        if keep.dtype != torch.bool or keep.shape != dense.shape or keep.device != dense.device:
            raise ValueError(
                f"keep must be a bool mask of {list(dense.shape)} on {dense.device}, "
                f"got {keep.dtype} of {list(keep.shape)} on {keep.device}"
            )
        words, values = [], []
        for x, marks in zip(torch.split(dense.reshape(-1), _CHUNK), torch.split(keep.reshape(-1), _CHUNK), strict=True):
            chosen = marks & (x != 0)
            values.append(x[chosen])
            words.append(_pack_bits(chosen))
        return cls.from_parts(torch.cat(words), torch.cat(values), dense.shape)

    @classmethod
    def from_parts(cls, mask: Tensor, values: Tensor, shape: Iterable[int]) -> SparseTensor:
        """Build from what files store; derives `offsets`.

        Raises:
            ValueError: if mask, values and shape contradict one another.
        """
        shape = torch.Size(shape)
        blocks = block_count(prod(shape))
        if mask.dtype != torch.int32 or mask.shape != (blocks * WORDS,) or values.ndim != 1:
            raise ValueError(
                f"a tensor of {list(shape)} takes {blocks * WORDS} int32 words of mask and a list of values, "
                f"got {mask.dtype} of {list(mask.shape)} and values of {list(values.shape)}"
            )
        if _unpack_bits(mask[-WORDS:])[prod(shape) - (blocks - 1) * BLOCK :].any():
            raise ValueError(f"the mask marks elements past the end of {list(shape)}")
        ends = _popcount(mask).view(blocks, WORDS).sum(1).cumsum(0)
        if int(ends[-1]) != values.numel():
            raise ValueError(f"the mask marks {int(ends[-1])} elements, but {values.numel()} values are stored")
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return cls(mask, values, starts.to(offset_dtype(values.numel())), shape)

    def unpack(self) -> Tensor:
        """Return the dense tensor, contiguous, with zeros where nothing is stored."""
        dense = self.values.new_zeros(self.shape)
        flat = dense.view(-1)
        step = _CHUNK // BLOCK
        bounds = [*self.offsets[::step].tolist(), self.values.numel()]
        for i, (start, end) in enumerate(pairwise(bounds)):
            if start != end:
                part = flat[i * _CHUNK : (i + 1) * _CHUNK]
                marks = _unpack_bits(self.mask[i * step * WORDS : (i + 1) * step * WORDS])
                part.masked_scatter_(marks[: part.numel()], self.values[start:end])
        return dense

    def part(self, box: Sequence[slice], elements: slice | None = None) -> SparseTensor:
        """Return a box of this tensor, in its shape, or some of the row-major elements of the box, as a vector.

        Args:
            box: a slice with start and stop, and without a step, for each dimension.
            elements: which of the box; None for all of them.
        """
        sizes = [side.stop - side.start for side in box]
        start, stop = (0, prod(sizes)) if elements is None else (elements.start, elements.stop)
        # Elements from the last cut dimension on are neighbors: they make one run for each index before it.
        cut = next((d for d in reversed(range(len(sizes))) if sizes[d] != self.shape[d]), 0)
        length = max(1, prod(sizes[cut:]))
        starts = torch.zeros((), dtype=torch.int64, device=self.device)
        for dim, side in enumerate(box):
            indices = torch.arange(side.start, side.stop if dim < cut else side.start + 1, device=self.device)
            starts = starts.unsqueeze(-1) + indices * prod(self.shape[dim + 1 :])
        starts = starts.flatten()
        if start == stop:
            mask, values = self.mask.new_zeros(WORDS), self.values[:0]
        elif start // length == (stop - 1) // length:
            first = int(starts[start // length]) + start % length
            mask, values = self._range(first, first + stop - start)
        else:
            mask, values = self._gathered(starts, length, range(start, stop))
        return self.from_parts(mask, values, sizes if elements is None else [stop - start])

    def _range(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return mask and values of elements that follow one another: words are shifted, nothing is unpacked."""
        words, shift = self.mask[start // 32 : -(-stop // 32)], start % 32
        if shift:
            # The lowest bits of the next word become the highest ones; shifts of signed words fill up with their sign.
            later = torch.cat([words[1:], words.new_zeros(1)])
            words = (words >> shift & (1 << (32 - shift)) - 1) | later << (32 - shift)
        mask = words.new_zeros(block_count(stop - start) * WORDS)
        count = -(-(stop - start) // 32)
        mask[:count] = words[:count]
        if spare := count * 32 - (stop - start):
            mask[count - 1] &= (1 << (32 - spare)) - 1
        before = self._kept_before(start)
        return mask, self.values[before : before + int(_popcount(mask).sum())].clone()

    def _gathered(self, starts: Tensor, length: int, local: range) -> tuple[Tensor, Tensor]:
        """Return mask and values of a range of the elements of runs of `length` elements, some of them at a time."""
        counts = _popcount(self.mask)
        # Of each word, how many values stand before it.
        before = counts.cumsum(0) - counts
        words, values = [], []
        for first in range(local.start, local.stop, _CHUNK):
            own = torch.arange(first, min(first + _CHUNK, local.stop), device=self.device)
            element = starts[own // length] + own % length
            word, bit = element >> 5, element & 31
            bits = self.mask[word].long()
            marks = bits >> bit & 1 != 0
            word, lower = word[marks], (bits & (1 << bit) - 1)[marks]
            values.append(self.values[before[word] + _popcount(lower.int())])
            words.append(_pack_bits(marks))
        return torch.cat(words), torch.cat(values)

    def _kept_before(self, element: int) -> int:
        """Return how many values stand before an element."""
        block, word, bit = element // BLOCK, element // 32, element % 32
        if block == len(self.offsets):
            return self.values.numel()
        within = int(_popcount(self.mask[block * WORDS : word]).sum())
        rest = self.mask[word] & (1 << bit) - 1 if bit else self.mask.new_zeros(())
        return int(self.offsets[block]) + within + int(_popcount(rest))

    def to(self, device: torch.device | str) -> SparseTensor:
        """Return this tensor on `device`; itself if it is there."""
        if self.values.device == torch.device(device):
            return self
        return SparseTensor(self.mask.to(device), self.values.to(device), self.offsets.to(device), self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the three tensors lie."""
        return self.values.device


def offset_dtype(kept: int) -> torch.dtype:
    """Return the dtype of the offsets of a tensor with so many kept values."""
    return torch.int32 if kept < 2**31 else torch.int64


def _pack_bits(marks: Tensor) -> Tensor:
    """Pack a bool vector into int32 words, padded with zeros to whole blocks."""
    padded = torch.nn.functional.pad(marks, (0, block_count(marks.numel()) * BLOCK - marks.numel()))
    # Eight bools are one int64 with a 0 or 1 in each byte; the product gathers them in its highest byte.
    octets = padded.view(torch.int64) * 0x0102040810204080 >> 56
    return octets.to(torch.uint8).view(torch.int32)


def _unpack_bits(words: Tensor) -> Tensor:
    """Return the bool vector that `words` packs: 32 elements a word."""
    octets = words.view(torch.uint8).to(torch.int64) * 0x0101010101010101
    # Byte i of the mask, 0x8040201008040201 as a signed number, has bit i.
    return (octets & (0x8040201008040201 - (1 << 64))).view(torch.uint8) != 0


def _popcount(words: Tensor) -> Tensor:
    """Return the number of one bits of each int32 word."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return octets * 0x01010101 >> 24
