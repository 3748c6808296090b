"""theta(r) = theta0 + r*(theta1 - theta0) for R ratios of many tensors, each input read once.

    r < 0.5:  a + r*(b - a)
    else:     b - (1 - r)*(b - a)          r = 0 and r = 1 copy bits

Source: Lin et al. 2024 (arXiv 2309.06256). Twin: `fused_merge/eager/interpolate.py`.

Bytes per element of b bytes: reads 2b, writes R*b: (2 + R)*b, against 3*R*b for R separate interpolations.

Contract: theta0, theta1 and the outputs are contiguous, of one dtype (fp32, bf16 or fp16) and on one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import access, rounding, tables

# Columns of a row of the tensor table: theta0, theta1, elements, then the R outputs.
BASE_AT, TUNED_AT, NUMEL_AT, OUTS_AT = map(tl.constexpr, range(4))
# Columns of the ratio table: r, 1 - r, and which form serves that ratio.
NEAR_AT, FAR_AT, FORM_AT, RATIO_COLUMNS = map(tl.constexpr, range(4))
FROM_BASE, FROM_TUNED, COPY_BASE, COPY_TUNED = map(tl.constexpr, range(4))


@triton.jit
def interpolate_chunk(
    tensor,
    ratio,
    ratios,
    base,
    inside,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R points of the line for BLOCK elements from `base` on; if MASKED only for those `inside` the tensor."""
    theta0 = access.load(tl.load(tensor + BASE_AT), base, inside, DTYPE, ALIGNED, MASKED, BLOCK)
    theta1 = access.load(tl.load(tensor + TUNED_AT), base, inside, DTYPE, ALIGNED, MASKED, BLOCK)
    a = theta0.to(tl.float32)
    b = theta1.to(tl.float32)
    difference = b - a
    for k in range(ratios):
        row = ratio + RATIO_COLUMNS * k
        form = tl.load(row + FORM_AT)
        from_base = a + tl.load(row + NEAR_AT) * difference
        from_tuned = b - tl.load(row + FAR_AT) * difference
        merged = rounding.nearest(tl.where(form == FROM_BASE, from_base, from_tuned), DTYPE)
        # The ends are copied as they are stored: -0.0 and NaN keep their bits.
        merged = tl.where(form == COPY_BASE, theta0, tl.where(form == COPY_TUNED, theta1, merged))
        access.store(merged, tl.load(tensor + OUTS_AT + k), base, inside, DTYPE, ALIGNED, MASKED, BLOCK)


@triton.jit
def interpolate_kernel(
    programs,  # int32 [P, 2]: tensor, chunk
    tensors,  # int64 [T, 3 + R]: theta0, theta1, elements, outputs
    table,  # fp32 [T, R, 3]: r, 1 - r, form
    ratios,  # R
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of BLOCK elements of one tensor, for all R ratios."""
    program = programs + 2 * tl.program_id(0)
    index = tl.load(program)
    tensor = tensors + index * (OUTS_AT + ratios)
    ratio = table + index * (RATIO_COLUMNS * ratios)
    base = tl.load(program + 1).to(tl.int64) * BLOCK
    left = tl.load(tensor + NUMEL_AT) - base
    inside = tl.arange(0, BLOCK) < left
    if left >= BLOCK:
        interpolate_chunk(tensor, ratio, ratios, base, inside, DTYPE, ALIGNED, False, BLOCK)
    else:
        interpolate_chunk(tensor, ratio, ratios, base, inside, DTYPE, ALIGNED, True, BLOCK)


def why_unsupported(base: Tensor, tuned: Tensor, outs: Sequence[Tensor]) -> str | None:
    """Return in a few words why the kernel cannot interpolate this tensor, or None."""
    if base.dtype not in tables.TL_DTYPE:
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
    block: int = tables.DEFAULT_BLOCK,
) -> None:
    """Launch all ratios of tensors on one device, one launch for all that share dtype and alignment.

    Args:
        bases: theta0 of each tensor.
        tuneds: theta1 of each tensor, of the same shapes and dtypes.
        ratios: R finite ratios for each tensor.
        outs: R outputs for each tensor, written in place; an output may be one of the inputs.
        block: elements per program.
    """
    launches: dict[tuple[torch.dtype, bool], list[int]] = {}
    rows = [
        (base.data_ptr(), tuned.data_ptr(), base.numel(), *(out.data_ptr() for out in points))
        for base, tuned, points in zip(bases, tuneds, outs, strict=True)
    ]
    for index, (base, tuned, points) in enumerate(zip(bases, tuneds, outs, strict=True)):
        if base.numel() > 0:
            launches.setdefault((base.dtype, tables.is_aligned((base, tuned, *points))), []).append(index)
    where = bases[0].device
    for (dtype, aligned), members in launches.items():
        programs = tables.program_table(tuple(bases[i].numel() for i in members), block, where)
        tensors = torch.tensor([rows[i] for i in members], dtype=torch.int64).to(where, non_blocking=True)
        table = torch.tensor([[_ratio_row(r) for r in ratios[i]] for i in members], dtype=torch.float32)
        with torch.cuda.device_of(bases[0]):
            interpolate_kernel[(len(programs),)](
                programs,
                tensors,
                table.to(where, non_blocking=True),
                len(ratios[0]),
                DTYPE=tables.TL_DTYPE[dtype],
                ALIGNED=aligned,
                BLOCK=block,
                num_warps=tables.NUM_WARPS,
                enable_fp_fusion=False,
            )


def _ratio_row(ratio: float) -> tuple[float, float, int]:
    ends = {0.0: COPY_BASE, 1.0: COPY_TUNED}
    form = ends.get(ratio, FROM_BASE if ratio < 0.5 else FROM_TUNED)
    return ratio, 1.0 - ratio, form.value
