"""theta(r) = theta0 + r*(theta1 - theta0) for R ratios of many tensors, each input read once.

    r < 0.5:  a + r*(b - a)
    else:     b - (1 - r)*(b - a)          r = 0 and r = 1 copy bits

Source: Lin et al. 2024 (arXiv 2309.06256). The equations: `fused_merge/eager/interpolate.py`.

Bytes per element of b bytes: reads 2b, writes R*b: (2 + R)*b, against 3*R*b for R separate interpolations.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import layout, memory, rounding
from fused_merge.kernels.layout import Block, Columns

# What a launch knows of a pair of tensors, int64, before the addresses of its R outputs; and of a ratio r of it, fp32:
# r, 1 - r, and which of the forms below serves it.
PairEntry = namedtuple("PairEntry", "base tuned numel")
RatioEntry = namedtuple("RatioEntry", "ratio rest form")
PAIR, RATIO = Columns(PairEntry), Columns(RatioEntry)
PAIR_COLUMNS, RATIO_COLUMNS = tl.constexpr(PAIR.count), tl.constexpr(RATIO.count)
FROM_BASE, FROM_TUNED, COPY_BASE, COPY_TUNED = map(tl.constexpr, range(4))


class Specialization(NamedTuple):
    """What one compiled form is special to."""

    DTYPE: tl.dtype
    ALIGNED: bool
    BLOCK: int
    MASKED: bool = False


@triton.jit
def interpolate_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, block
    pairs_ptr,  # int64 [T, 3 + R]: `PairEntry`, outputs
    ratios_ptr,  # fp32 [T, R, 3]: `RatioEntry`
    ratios,  # R
    SPEC: tl.constexpr,
):
    """One program a block of elements of one pair, for all R ratios."""
    _, number, pair_ptr, own_ratios_ptr = layout.locate(
        programs_ptr, pairs_ptr, ratios_ptr, PAIR_COLUMNS + ratios, RATIO_COLUMNS * ratios
    )
    base = number * SPEC.BLOCK
    inside = tl.arange(0, SPEC.BLOCK) < tl.load(pair_ptr + PAIR.numel) - base
    b = Block(pair_ptr, own_ratios_ptr, base, inside if SPEC.MASKED else None)
    theta0 = memory.load(b, PAIR.base, SPEC.DTYPE, SPEC)
    theta1 = memory.load(b, PAIR.tuned, SPEC.DTYPE, SPEC)
    start, end = theta0.to(tl.float32), theta1.to(tl.float32)
    difference = end - start
    for k in range(ratios):
        ratio_ptr = own_ratios_ptr + RATIO_COLUMNS * k
        form = tl.load(ratio_ptr + RATIO.form)
        from_base = start + tl.load(ratio_ptr + RATIO.ratio) * difference
        from_tuned = end - tl.load(ratio_ptr + RATIO.rest) * difference
        merged = rounding.nearest(tl.where(form == FROM_BASE, from_base, from_tuned), SPEC.DTYPE)
        # The ends are copied as they are stored: -0.0 and NaN keep their bits.
        merged = tl.where(form == COPY_BASE, theta0, tl.where(form == COPY_TUNED, theta1, merged))
        memory.store(b, PAIR_COLUMNS + k, merged, SPEC.DTYPE, SPEC)


def why_unsupported(base: Tensor, tuned: Tensor, outs: Sequence[Tensor]) -> str | None:
    """Return in a few words why the kernel cannot interpolate this tensor, or None."""
    if base.dtype not in layout.TL_DTYPE:
        return f"{base.dtype} tensors have no kernel"
    if any(tensor.dtype != base.dtype for tensor in (tuned, *outs)):
        return "the kernel takes ends and outputs of one dtype"
    if not all(tensor.is_contiguous() for tensor in (base, tuned, *outs)):
        return "the kernel takes contiguous tensors"
    return None


def interpolate(
    bases: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    ratios: Sequence[Sequence[float]],
    outs: Sequence[Sequence[Tensor]],
    *,
    block: int = layout.DEFAULT_BLOCK,
) -> None:
    """Launch all ratios of tensors on one device, together all that share dtype and alignment.

    Args:
        bases: theta0 of each tensor.
        tuneds: theta1 of each tensor, of the same shapes and dtypes.
        ratios: R finite ratios for each tensor.
        outs: R outputs for each tensor, written in place; an output may be one of the inputs.
        block: elements per program.
    """
    device = bases[0].device
    specs = [
        Specialization(layout.TL_DTYPE[base.dtype], layout.is_aligned((base, tuned, *points)), block)
        for base, tuned, points in zip(bases, tuneds, outs, strict=True)
    ]
    for spec, members in layout.group(specs).items():
        pairs = [
            (*PairEntry(bases[i].data_ptr(), tuneds[i].data_ptr(), bases[i].numel()), *(x.data_ptr() for x in outs[i]))
            for i in members
        ]
        entries = [[_ratio_entry(r) for r in ratios[i]] for i in members]
        tables = (
            torch.tensor(pairs, dtype=torch.int64).to(device, non_blocking=True),
            torch.tensor(entries, dtype=torch.float32).to(device, non_blocking=True),
        )
        programs = layout.split_programs(tuple(bases[i].numel() for i in members), block, device)
        layout.launch(interpolate_kernel, programs, *tables, len(ratios[0]), spec=spec)


def _ratio_entry(ratio: float) -> RatioEntry:
    ends = {0.0: COPY_BASE, 1.0: COPY_TUNED}
    form = ends.get(ratio, FROM_BASE if ratio < 0.5 else FROM_TUNED)
    return RatioEntry(ratio, 1.0 - ratio, form.value)
