"""Inner products <s*x, y - z> of many tensors, each the tree of `fused_merge.eager.sums`.

Bytes per element: one read of x, y and z; y - z is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_merge.compiled import arithmetic, memory, sums
from fused_merge.compiled.jit import inlined, task
from fused_merge.compiled.layout import columns
from fused_merge.compiled.memory import BLOCK, DTYPES, as_float, fp32, int64
from fused_merge.compiled.scratch import DIFFERENCE, FIRST, PRODUCT, SECOND, SUMS, THIRD, row
from fused_merge.compiled.threads import TASK, TASKS, Blocks, Crew, begin, locate, take

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ProductEntry(NamedTuple):
    """What compiled code knows of a product; 64-bit integers."""

    # Addresses, 0 where there is none, and in the same order the dtypes, of `memory`.
    x: int
    y: int
    z: int
    x_dtype: int
    y_dtype: int
    z_dtype: int
    numel: int
    factor: int  # the pattern of an fp32 number


ENTRY, ENTRIES = columns(ProductEntry), len(ProductEntry._fields)


def why_unsupported(triple: Sequence[Tensor | None]) -> str | None:
    """Return in a few words why compiled code cannot multiply these tensors, or None."""
    dtypes = [tensor.dtype for tensor in triple if tensor is not None and tensor.dtype not in _DTYPES]
    return f"there is no compiled code for {dtypes[0]} tensors" if dtypes else None


def inner_products(
    triples: Sequence[tuple[Tensor, Tensor | None, Tensor | None]], scale: float | Tensor, crew: Crew
) -> list[Tensor]:
    """Return <s*x, y - z> of T triples on the CPU, without y <s*x, s*x>; 0-d fp32."""
    factor = int(np.float32(scale).view(np.uint32))
    # What is not contiguous is copied, and kept until the end.
    kept = [
        (x.contiguous(), None if y is None else y.contiguous(), None if z is None else z.contiguous())
        for x, y, z in triples
    ]
    entries = [
        (
            *(0 if tensor is None else tensor.data_ptr() for tensor in triple),
            *(0 if tensor is None else DTYPES[tensor.dtype] for tensor in triple),
            triple[0].numel(),
            factor,
        )
        for triple in kept
    ]
    blocks = Blocks.of(range(len(kept)), [x.numel() for x, _, _ in kept])
    table, nodes, out = np.array(entries, np.int64), np.empty(blocks.count, np.float32), torch.zeros(len(kept))
    crew.over(blocks, products_pass, table=table, products=nodes)
    # Here each tensor is a block.
    tensors = Blocks(blocks.numbers, np.arange(len(kept) + 1), blocks.elements)
    crew.over(tensors, sum_pass, products=nodes, own_firsts=blocks.firsts, values=out.numpy())
    del kept
    return list(out.unbind())


@task
def products_pass(task: int) -> None:
    """Write `products`, those of blocks."""
    a, (_, scratch), k = int64(task, TASKS), begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, number = locate(a, block, k)
            base = BLOCK * number
            t = int64(a[TASK.table] + 8 * ENTRIES * k, ENTRIES)
            product = _product(t, base, min(BLOCK, t[ENTRY.numel] - base), scratch)
            fp32(a[TASK.products] + 4 * block, 1)[0] = product


@inlined
def _product(t, base, count, scratch):
    factor = as_float(np.uint32(t[ENTRY.factor]))
    x = memory.load_from(t[ENTRY.x], t[ENTRY.x_dtype], base, count, row(scratch, FIRST))
    right = row(scratch, SECOND)
    if t[ENTRY.y] == 0:
        arithmetic.multiply(x, factor, right, count)
        y = right
    else:
        y = memory.load_from(t[ENTRY.y], t[ENTRY.y_dtype], base, count, right)
        if t[ENTRY.z] != 0:
            z = memory.load_from(t[ENTRY.z], t[ENTRY.z_dtype], base, count, row(scratch, THIRD))
            arithmetic.subtract(y, z, row(scratch, DIFFERENCE), count)
            y = row(scratch, DIFFERENCE)
    return sums.inner_product(x, y, factor, row(scratch, PRODUCT), row(scratch, SUMS), count)


@task
def sum_pass(task: int) -> None:
    """Write `values`, the sums of the products of the blocks of each tensor, which are overwritten."""
    a, (_, scratch) = int64(task, TASKS), begin(task)
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for i in range(start, stop):
            firsts = int64(a[TASK.own_firsts] + 8 * i, 2)
            nodes, count = a[TASK.products] + 4 * firsts[0], firsts[1] - firsts[0]
            # A block of nodes at a time: the sums of aligned blocks are nodes of the same tree.
            while count > BLOCK:
                blocks = (count + BLOCK - 1) // BLOCK
                for k in range(blocks):
                    fp32(nodes + 4 * k, 1)[0] = _sum(nodes + 4 * BLOCK * k, min(BLOCK, count - BLOCK * k), scratch)
                count = blocks
            fp32(a[TASK.values] + 4 * i, 1)[0] = _sum(nodes, count, scratch)


@inlined
def _sum(nodes, count, scratch):
    room = row(scratch, PRODUCT)
    memory.copy(nodes, room, count)
    return sums.tree_sum(room, row(scratch, SUMS), count)
