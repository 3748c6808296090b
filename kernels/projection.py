"""Projection onto the SFT delta, or out of conflict with it; the equations of `fused_merge/eager/projection.py`.

<x, tau> and <tau, tau> are added up by a pass of its own over tensors, and over rows by the program that owns the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager import projection as eager
from fused_merge.kernels import adamw, layout, memory, operands, sums
from fused_merge.kernels.layout import ENTRY, SCALAR, Block

RESIDUE = tl.constexpr(eager.RESIDUE)
# Blocks of a row that a program can project as it goes.
ROW_BLOCKS = tl.constexpr(256)


@triton.jit
def project(b, x, tau, along, SPEC: tl.constexpr, ON: tl.constexpr):
    """`eager.projection.project` of a block, if the gradient or the update (ON) is projected.

    `along` is <x, tau> and <tau, tau>, one for all elements or one each.
    """
    if SPEC.PROJECT is None or SPEC.PROJECT_ON != ON:
        return x
    else:
        dot, norm = along
        direction = norm > 0
        component = tl.where(direction, tl.div_rn(dot, tl.where(direction, norm, 1.0)), 0.0) * tau
        if SPEC.PROJECT == "onto":
            rest_share, onto_share = (
                tl.load(b.scalars_ptr + SCALAR.rest_share),
                tl.load(b.scalars_ptr + SCALAR.onto_share),
            )
            return tl.where(direction, rest_share * x + onto_share * component, x)
        else:
            tl.static_assert(SPEC.PROJECT == "conflict")
            rest = x - component
            rest = tl.where(tl.abs(rest) < (tl.abs(x) + tl.abs(component)) * RESIDUE, 0.0, rest)
            # A gradient points uphill: the step goes along -g.
            if ON == "gradient":
                against = dot > 0
            else:
                against = dot < 0
            return tl.where(direction & against, rest, x)


@triton.jit
def coefficients(b, coefficients_ptr, SPEC: tl.constexpr):
    """<x, tau> and <tau, tau>: of the tensor, or for each element of its row."""
    if SPEC.PROJECT is None:
        return 0.0, 0.0
    else:
        at = coefficients_ptr + 2 * tl.load(b.tensor_ptr + ENTRY.first_coefficient)
        if SPEC.PROJECT_ROWS:
            at += 2 * ((b.base + tl.arange(0, SPEC.BLOCK)) // tl.load(b.tensor_ptr + ENTRY.row_length))
            return tl.load(at, mask=b.where), tl.load(at + 1, mask=b.where)
        else:
            return tl.load(at), tl.load(at + 1)


@triton.jit
def products(b, SPEC: tl.constexpr):
    """<x, tau> and <tau, tau> of a block, for the x that is projected: nodes of the tree."""
    tau = operands.load_tau_dense(b, SPEC)
    x = operands.gradient(b, SPEC)
    if SPEC.PROJECT_ON == "update":
        _, _, x = adamw.advance(b, x, SPEC)
        # With eps = 0 the u of nothing is not a number.
        x = memory.or_zero(b, x)
    return sums.tree(x * tau, SPEC.BLOCK), sums.tree(tau * tau, SPEC.BLOCK)


@triton.jit
def block_of_row(tensor_ptr, row, offset, SPEC: tl.constexpr):
    """The first element of the block at `offset` in a row, and which of its elements the row has."""
    row_length = tl.load(tensor_ptr + ENTRY.row_length)
    start, left = row * row_length, row_length - offset
    if SPEC.ALIGNED:
        # Rows begin and end as aligned as the tensor does: bounds do not forbid wide accesses.
        start, left = tl.multiple_of(start, 8), tl.multiple_of(left, 8)
    return start + offset, tl.arange(0, SPEC.BLOCK) < left


@triton.jit
def row_products(tensor_ptr, scalars_ptr, row, SPEC: tl.constexpr):
    """<x, tau> and <tau, tau> of a row."""
    blocks = tl.arange(0, ROW_BLOCKS)
    dots = tl.zeros((ROW_BLOCKS,), tl.float32)
    norms = tl.zeros((ROW_BLOCKS,), tl.float32)
    for block in range(0, tl.cdiv(tl.load(tensor_ptr + ENTRY.row_length), SPEC.BLOCK)):
        base, inside = block_of_row(tensor_ptr, row, block * SPEC.BLOCK, SPEC)
        dot, norm = products(Block(tensor_ptr, scalars_ptr, base, inside if SPEC.MASKED else None), SPEC)
        dots = tl.where(blocks == block, dot, dots)
        norms = tl.where(blocks == block, norm, norms)
    return sums.tree(dots, ROW_BLOCKS), sums.tree(norms, ROW_BLOCKS)


@triton.jit
def project_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, and block or row
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    out_ptr,  # fp32 [blocks, 2] sums, or [rows, 2] of all tensors; written
    SPEC: tl.constexpr,
):
    """<x, tau> and <tau, tau> of what is projected: sums of a block, or those of a row."""
    _, number, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    if SPEC.PROJECT_ROWS:
        dot, norm = row_products(tensor_ptr, own_scalars_ptr, number, SPEC)
        at = out_ptr + 2 * (tl.load(tensor_ptr + ENTRY.first_coefficient) + number)
    else:
        base, inside = layout.block_of_tensor(tensor_ptr, number, SPEC)
        dot, norm = products(Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None), SPEC)
        at = out_ptr + 2 * (tl.load(tensor_ptr + ENTRY.first_block) + number)
    tl.store(at, dot)
    tl.store(at + 1, norm)
