"""The one way in which this library adds up many numbers: a binary tree over neighbours.

Twin of `fused_merge/eager/sums.py`. The sum of an aligned block of 2^k elements is a node of the tree, so that
programs add up blocks, and then blocks of the blocks' sums, until one number a tensor is left.

    <s*x, y - z>        fp32, for many tensors in one launch and one more for every 1024-fold

Bytes per element: what x, y and z take, each read once; the difference is never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import access, tables

# Block sums that one program adds up.
FAN_IN = 1024
# A block has at most 2^20 elements.
MOST_LEVELS = tl.constexpr(20)


@triton.jit
def tree(x, SIZE: tl.constexpr):
    """`eager.sums.tree_sum` of SIZE values, a power of two, in adjacent pairs."""
    for level in tl.static_range(MOST_LEVELS):
        # A sum of two has one order; that of more would be the compiler's.
        if (SIZE >> level) > 1:
            x = tl.sum(tl.reshape(x, (SIZE >> (level + 1), 2)), axis=1)
    # A sum of nothing but -0 is 0.
    return tl.sum(x) + 0.0


@triton.jit
def tree_kernel(
    programs,  # int32 [P, 2]: tensor, chunk
    spans,  # int32 [T, 2]: where the sums of a tensor begin, and how many there are
    sums,  # fp32 [N, C]
    out,  # fp32 [P, C]
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program adds up SIZE block sums of a tensor, for each of C quantities."""
    program = tl.program_id(0)
    span = spans + 2 * tl.load(programs + 2 * program)
    chunk = tl.load(programs + 2 * program + 1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    inside = at < tl.load(span + 1)
    first = tl.load(span)
    for column in tl.static_range(COLUMNS):
        x = tl.load(sums + (first + at).to(tl.int64) * COLUMNS + column, mask=inside, other=0.0)
        tl.store(out + program.to(tl.int64) * COLUMNS + column, tree(x, SIZE))


# Columns of the tensor table, int64.
X_AT, Y_AT, Z_AT, NUMEL_AT, TENSOR_COLUMNS = map(tl.constexpr, range(5))


class Build(NamedTuple):
    """What one compiled form of the products is special to."""

    X: tl.dtype
    Y: tl.dtype | None  # None for <x, x>
    Z: tl.dtype | None  # None for <x, y>
    ALIGNED: bool


@triton.jit
def block_product(tensor, scale, base, inside, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """<s*x, y - z> of BLOCK elements from `base` on: a node of the tree."""
    x = access.load(tl.load(tensor + X_AT), base, inside, BUILD.X, BUILD.ALIGNED, MASKED, BLOCK)
    x = tl.load(scale) * x.to(tl.float32)
    y = x
    if BUILD.Y is not None:
        y = access.load(tl.load(tensor + Y_AT), base, inside, BUILD.Y, BUILD.ALIGNED, MASKED, BLOCK).to(tl.float32)
    if BUILD.Z is not None:
        z = access.load(tl.load(tensor + Z_AT), base, inside, BUILD.Z, BUILD.ALIGNED, MASKED, BLOCK)
        y = y - z.to(tl.float32)
    return tree(x * y, BLOCK)


@triton.jit
def inner_products_kernel(
    programs,  # int32 [P, 2]: tensor, chunk
    tensors,  # int64 [T, 4]: addresses of x, y, z, and elements
    scale,  # fp32, 0-d
    out,  # fp32 [P, 1], written
    BUILD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of BLOCK elements of one tensor."""
    program = programs + 2 * tl.program_id(0)
    tensor = tensors + tl.load(program) * TENSOR_COLUMNS
    base = tl.load(program + 1).to(tl.int64) * BLOCK
    left = tl.load(tensor + NUMEL_AT) - base
    inside = tl.arange(0, BLOCK) < left
    if left >= BLOCK:
        product = block_product(tensor, scale, base, inside, BUILD, False, BLOCK)
    else:
        product = block_product(tensor, scale, base, inside, BUILD, True, BLOCK)
    tl.store(out + tl.program_id(0), product)


class Reduction:
    """The launches that add up the block sums of many tensors, however long they are."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """Plan for `counts[t]` block sums of tensor t, one tensor after the other."""
        self._levels: list[tuple[Tensor, Tensor]] = []
        while max(counts, default=0) > 1:
            ends = torch.tensor(counts).cumsum(0)
            spans = torch.stack((ends - torch.tensor(counts), torch.tensor(counts)), 1).to(torch.int32)
            programs = tables.program_table(tuple(counts), FAN_IN, device)
            self._levels.append((programs, spans.to(device, non_blocking=True)))
            counts = [-(-count // FAN_IN) for count in counts]

    def __call__(self, sums: Tensor) -> Tensor:
        """Return fp32 `[T, C]` from the block sums `[N, C]`."""
        for programs, spans in self._levels:
            out = sums.new_empty(len(programs), sums.shape[1])
            tree_kernel[(len(programs),)](
                programs, spans, sums, out, COLUMNS=sums.shape[1], SIZE=FAN_IN,
                num_warps=tables.NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            sums = out
        return sums


Triple = tuple[Tensor, Tensor | None, Tensor | None]


def why_unsupported(triple: Triple) -> str | None:
    """Return in a few words why the kernel cannot multiply these tensors, or None."""
    for tensor in triple:
        if tensor is not None and tensor.dtype not in tables.TL_DTYPE:
            return f"{tensor.dtype} tensors have no kernel"
    return None


Launch = tuple[Build, list[int], Tensor, Tensor, Reduction]


class Plan:
    """What repeated products of the same tensors keep on a device: their tables."""

    def __init__(self) -> None:
        self._launches: tables.Remembered[list[Launch]] = tables.Remembered()

    def launches(self, triples: Sequence[Triple], block: int) -> list[Launch]:
        """Return for each `Build` its tensors, the tables of programs and tensors, and how their sums are added up."""

        def make() -> list[Launch]:
            groups: dict[Build, list[int]] = {}
            for index, triple in enumerate(triples):
                dtypes = (None if x is None else tables.TL_DTYPE[x.dtype] for x in triple)
                groups.setdefault(Build(*dtypes, ALIGNED=tables.is_aligned(triple)), []).append(index)
            return [self._launch(build, members, triples, block) for build, members in groups.items()]

        tensors = [[x is not None and (x.data_ptr(), x.numel(), x.dtype) for x in triple] for triple in triples]
        return self._launches.get((block, tensors), make)

    @staticmethod
    def _launch(build: Build, members: list[int], triples: Sequence[Triple], block: int) -> Launch:
        device = triples[0][0].device
        numels = [triples[i][0].numel() for i in members]
        rows = [
            [*(0 if x is None else x.data_ptr() for x in triples[i]), numel]
            for i, numel in zip(members, numels, strict=True)
        ]
        tensors = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        chunks = [tables.chunk_count(numel, block) for numel in numels]
        return build, members, tables.program_table(tuple(numels), block, device), tensors, Reduction(chunks, device)


def inner_products(
    triples: Sequence[Triple], scale: Tensor, *, plan: Plan | None = None, block: int = tables.DEFAULT_BLOCK
) -> list[Tensor]:
    """Return <s*x, y - z>, 0-d fp32, for tensors on one device, in one launch for all that share a `Build`.

    Args:
        triples: x, y and z of each; without y it is <s*x, s*x>, without z <s*x, y>.
        scale: s, 0-d fp32 on that device.
        plan: what the last call with these tensors has left.
        block: elements per program.
    """
    straight = [(x.contiguous(), *(t if t is None else t.contiguous() for t in others)) for x, *others in triples]
    results: list[Tensor] = [scale] * len(triples)
    for build, members, programs, tensors, add_up in (plan or Plan()).launches(straight, block):
        out = torch.empty(len(programs), 1, dtype=torch.float32, device=scale.device)
        with torch.cuda.device_of(out):
            inner_products_kernel[(len(programs),)](
                programs, tensors, scale, out, BUILD=build, BLOCK=block,
                num_warps=tables.NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            for member, product in zip(members, add_up(out).unbind(), strict=True):
                results[member] = product[0]
    return results
