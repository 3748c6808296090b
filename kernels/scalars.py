"""The scalars of one step, derived on the device: nothing waits for the host, and a step can be captured in a graph.

The equations of `fused_merge/eager/scalars.py`: fp64, each scalar rounded once to fp32, one program a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fused_merge.eager import scalars as eager
from fused_merge.kernels.layout import ENTRY, ENTRY_COLUMNS, SCALAR, SCALAR_COLUMNS, Columns


class HyperEntry(NamedTuple):
    """What the scalars of all tensors are derived from, fp64."""

    # First what may be a tensor of its own, and is 0 here then.
    lr: float
    grad_factor: float
    found_inf: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    alpha: float
    update_scale: float
    tau_scale: float
    merge_every: float
    rest_share: float
    onto_share: float


HYPER = Columns(HyperEntry)


def hyper_entry(hyper: eager.Hyper, project_strength: float) -> HyperEntry:
    """Return the numbers that a step depends on."""
    numbers = (hyper.lr, hyper.grad_factor, hyper.found_inf)
    return HyperEntry(
        *(0.0 if isinstance(number, Tensor) else float(number) for number in numbers),
        *hyper.betas,
        hyper.eps,
        hyper.weight_decay,
        hyper.alpha,
        hyper.update_scale,
        hyper.tau_scale,
        float(hyper.merge_every),
        1.0 - project_strength,
        project_strength,
    )


@triton.jit
def advances(scalars_ptr):
    """Whether anything moves: an overflow of scaled gradients stops a step on the device."""
    return tl.load(scalars_ptr + SCALAR.advances) != 0.0


@triton.jit
def merges(scalars_ptr, SPEC: tl.constexpr):
    """Whether this step merges."""
    answer = advances(scalars_ptr) & (tl.load(scalars_ptr + SCALAR.moves) != 0.0)
    if SPEC.ANCHOR is not None:
        answer = answer & (tl.load(scalars_ptr + SCALAR.merges) != 0.0)
    return answer


@triton.jit
def power(base, exponent):
    """`eager.scalars.power`: base^exponent by squaring."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def put(at, value):
    """Round a scalar to fp32, once."""
    tl.store(at, value.to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["lr_ptr", "grad_factor_ptr", "found_inf_ptr"])
def scalars_kernel(
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    hyper_ptr,  # fp64: `HyperEntry`
    lr_ptr,  # fp64, 0-d
    grad_factor_ptr,  # fp64, 0-d
    found_inf_ptr,  # fp64, 0-d
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`, written
):
    """`eager.scalars.derive_scalars` for each tensor; steps the decay since its last merge, where it keeps one."""
    tensor_ptr = tensors_ptr + tl.program_id(0) * ENTRY_COLUMNS
    own_ptr = scalars_ptr + tl.program_id(0) * SCALAR_COLUMNS
    step = tl.load(tl.load(tensor_ptr + ENTRY.step).to(tl.pointer_type(tl.float32)))
    count = step.to(tl.int32)
    lr = tl.load(lr_ptr)
    beta1 = tl.load(hyper_ptr + HYPER.beta1)
    beta2 = tl.load(hyper_ptr + HYPER.beta2)
    alpha = tl.load(hyper_ptr + HYPER.alpha)
    decay = 1.0 - lr * tl.load(hyper_ptr + HYPER.weight_decay)
    moves = lr != 0.0
    advances = tl.load(found_inf_ptr) == 0.0
    merges = count % tl.load(hyper_ptr + HYPER.merge_every).to(tl.int32) == 0

    put(own_ptr + SCALAR.step, step)
    put(own_ptr + SCALAR.beta1, beta1)
    put(own_ptr + SCALAR.one_minus_beta1, 1.0 - beta1)
    put(own_ptr + SCALAR.beta2, beta2)
    put(own_ptr + SCALAR.one_minus_beta2, 1.0 - beta2)
    put(own_ptr + SCALAR.step_size, lr / (1.0 - power(beta1, count)))
    put(own_ptr + SCALAR.inv_sqrt_bias2, 1.0 / tl.sqrt(1.0 - power(beta2, count)))
    put(own_ptr + SCALAR.eps, tl.load(hyper_ptr + HYPER.eps))
    put(own_ptr + SCALAR.decay, decay)
    put(own_ptr + SCALAR.update_weight, (1.0 - alpha) * tl.load(hyper_ptr + HYPER.update_scale))
    put(own_ptr + SCALAR.tau_weight, alpha * tl.load(hyper_ptr + HYPER.tau_scale))
    put(own_ptr + SCALAR.moves, moves)
    put(own_ptr + SCALAR.grad_factor, tl.load(grad_factor_ptr))
    put(own_ptr + SCALAR.advances, advances)
    put(own_ptr + SCALAR.merges, merges)
    put(own_ptr + SCALAR.rest_share, tl.load(hyper_ptr + HYPER.rest_share))
    put(own_ptr + SCALAR.onto_share, tl.load(hyper_ptr + HYPER.onto_share))

    address = tl.load(tensor_ptr + ENTRY.anchor_decay)
    if address != 0:
        since_ptr = address.to(tl.pointer_type(tl.float32))
        since = tl.load(since_ptr) * decay.to(tl.float32)
        put(own_ptr + SCALAR.origin_decay, since)
        if moves & advances:
            tl.store(since_ptr, tl.where(merges, 1.0, since))
