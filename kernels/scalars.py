"""The scalars of one step, derived on the device: nothing waits for the host, and a step can be captured in a graph.

Twin of `fused_merge/eager/scalars.py`: fp64, each scalar rounded once to fp32, one program a tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_merge.eager import scalars as eager
from fused_merge.kernels.rows import ANCHOR_DECAY_AT, STEP_AT, TENSOR_COLUMNS

STEP_BITS = tl.constexpr(eager.STEP_BITS)

# Where a kernel finds a scalar: the columns are those of `eager.scalars.Scalars`, and one more.
STEP, BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, STEP_SIZE = map(tl.constexpr, range(6))
INV_SQRT_BIAS2, EPS, DECAY, UPDATE_WEIGHT, TAU_WEIGHT, MOVES = map(tl.constexpr, range(6, 12))
GRAD_FACTOR, ADVANCES, MERGES = map(tl.constexpr, range(12, 15))
ORIGIN_DECAY = tl.constexpr(15)  # the product of (1 - lr*wd) since the last merge, of this step too
COLUMNS = tl.constexpr(16)

# Columns of the constants, fp64: `eager.scalars.Hyper`, those first that may be tensors of their own.
LR_AT, GRAD_FACTOR_AT, FOUND_INF_AT, BETA1_AT, BETA2_AT, EPS_AT = map(tl.constexpr, range(6))
WEIGHT_DECAY_AT, ALPHA_AT, UPDATE_SCALE_AT, TAU_SCALE_AT, MERGE_EVERY_AT = map(tl.constexpr, range(6, 11))


def constants(hyper: eager.Hyper) -> list[float]:
    """Return the constants of a step in the order of their columns; 0 for those that are tensors."""
    numbers = (hyper.lr, hyper.grad_factor, hyper.found_inf)
    return [
        *(0.0 if isinstance(number, Tensor) else float(number) for number in numbers),
        *hyper.betas,
        hyper.eps,
        hyper.weight_decay,
        hyper.alpha,
        hyper.update_scale,
        hyper.tau_scale,
        float(hyper.merge_every),
    ]


@triton.jit
def power(base, exponent):
    """`eager.scalars.power`: base^exponent by squaring."""
    result = base * 0.0 + 1.0
    for bit in range(STEP_BITS):
        result = tl.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def put(row, column: tl.constexpr, value):
    """Round a scalar to fp32, once."""
    tl.store(row + column, value.to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["lr", "grad_factor", "found_inf"])
def scalars_kernel(
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    constants,  # fp64 [11]
    lr,  # fp64, 0-d
    grad_factor,  # fp64, 0-d
    found_inf,  # fp64, 0-d
    table,  # fp32 [T, 16], written
):
    """`eager.scalars.derive_scalars` for each tensor; steps the decay since its last merge, where it keeps one."""
    tensor = tensors + tl.program_id(0) * TENSOR_COLUMNS
    row = table + tl.program_id(0) * COLUMNS
    step = tl.load(tl.load(tensor + STEP_AT).to(tl.pointer_type(tl.float32)))
    count = step.to(tl.int32)
    rate = tl.load(lr)
    beta1 = tl.load(constants + BETA1_AT)
    beta2 = tl.load(constants + BETA2_AT)
    decay = 1.0 - rate * tl.load(constants + WEIGHT_DECAY_AT)
    moves = rate != 0.0
    advances = tl.load(found_inf) == 0.0
    merges = count % tl.load(constants + MERGE_EVERY_AT).to(tl.int32) == 0

    put(row, STEP, step)
    put(row, BETA1, beta1)
    put(row, ONE_MINUS_BETA1, 1.0 - beta1)
    put(row, BETA2, beta2)
    put(row, ONE_MINUS_BETA2, 1.0 - beta2)
    put(row, STEP_SIZE, rate / (1.0 - power(beta1, count)))
    put(row, INV_SQRT_BIAS2, 1.0 / tl.sqrt(1.0 - power(beta2, count)))
    put(row, EPS, tl.load(constants + EPS_AT))
    put(row, DECAY, decay)
    put(row, UPDATE_WEIGHT, (1.0 - tl.load(constants + ALPHA_AT)) * tl.load(constants + UPDATE_SCALE_AT))
    put(row, TAU_WEIGHT, tl.load(constants + ALPHA_AT) * tl.load(constants + TAU_SCALE_AT))
    put(row, MOVES, moves)
    put(row, GRAD_FACTOR, tl.load(grad_factor))
    put(row, ADVANCES, advances)
    put(row, MERGES, merges)

    address = tl.load(tensor + ANCHOR_DECAY_AT)
    if address != 0:
        at = address.to(tl.pointer_type(tl.float32))
        since = tl.load(at) * decay.to(tl.float32)
        put(row, ORIGIN_DECAY, since)
        if moves & advances:
            tl.store(at, tl.where(merges, 1.0, since))
