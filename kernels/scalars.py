"""The scalars of one step, derived on the device: nothing waits for the host, and a step can be captured in a graph.

The equations of `fused_merge/eager/scalars.py`: fp64, each scalar rounded once to fp32, one program a tensor.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl
from torch import Tensor

from fused_merge.eager import scalars as eager
from fused_merge.kernels.layout import ENTRY, ENTRY_COLUMNS, SCALAR, SCALAR_COLUMNS, Columns

# What the scalars of all tensors are derived from, fp64; 0 for those that are tensors of their own.
OWN = ("lr", "grad_factor", "found_inf")
NUMBERS = ("beta1", "beta2", "eps", "weight_decay", "alpha", "update_scale", "tau_scale", "merge_every")
HyperEntry = namedtuple("HyperEntry", (*OWN, *NUMBERS, "rest_share", "onto_share"))
HYPER = Columns(HyperEntry)


def hyper_entry(hyper: eager.Hyper, project_strength: float) -> HyperEntry:
    """Return the numbers that a step depends on."""
    own = {"rest_share": 1.0 - project_strength, "onto_share": project_strength}
    numbers = hyper._asdict() | dict(zip(("beta1", "beta2"), hyper.betas, strict=True)) | own
    ordered = [numbers[field] for field in HyperEntry._fields]
    return HyperEntry(*(0.0 if isinstance(number, Tensor) else float(number) for number in ordered))


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
def works(scalars_ptr, SPEC: tl.constexpr):
    """Whether a step has anything to do: after another optimizer's there are only merges."""
    if SPEC.GRAD is None:
        return merges(scalars_ptr, SPEC)
    else:
        return advances(scalars_ptr)


@triton.jit
def power(base, exponent):
    """`eager.scalars.power`: base^exponent by squaring."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize_on_alignment=["lr_ptr", "grad_factor_ptr", "found_inf_ptr"])
def scalars_kernel(
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    hyper_ptr,  # fp64: `HyperEntry`
    lr_ptr,  # fp64, 0-d
    grad_factor_ptr,  # fp64, 0-d
    found_inf_ptr,  # fp64, 0-d
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`, written
):
    """`eager.scalars.derive_scalars`, rounded where stored; steps the decay since a merge, where a tensor keeps one."""
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

    tl.store(own_ptr + SCALAR.step, step)
    tl.store(own_ptr + SCALAR.beta1, beta1)
    tl.store(own_ptr + SCALAR.one_minus_beta1, 1.0 - beta1)
    tl.store(own_ptr + SCALAR.beta2, beta2)
    tl.store(own_ptr + SCALAR.one_minus_beta2, 1.0 - beta2)
    tl.store(own_ptr + SCALAR.step_size, lr / (1.0 - power(beta1, count)))
    tl.store(own_ptr + SCALAR.inv_sqrt_bias2, 1.0 / tl.sqrt(1.0 - power(beta2, count)))
    tl.store(own_ptr + SCALAR.eps, tl.load(hyper_ptr + HYPER.eps))
    tl.store(own_ptr + SCALAR.decay, decay)
    tl.store(own_ptr + SCALAR.update_weight, (1.0 - alpha) * tl.load(hyper_ptr + HYPER.update_scale))
    tl.store(own_ptr + SCALAR.tau_weight, alpha * tl.load(hyper_ptr + HYPER.tau_scale))
    tl.store(own_ptr + SCALAR.moves, moves)
    tl.store(own_ptr + SCALAR.grad_factor, tl.load(grad_factor_ptr))
    tl.store(own_ptr + SCALAR.advances, advances)
    tl.store(own_ptr + SCALAR.merges, merges)
    tl.store(own_ptr + SCALAR.rest_share, tl.load(hyper_ptr + HYPER.rest_share))
    tl.store(own_ptr + SCALAR.onto_share, tl.load(hyper_ptr + HYPER.onto_share))

    address = tl.load(tensor_ptr + ENTRY.anchor_decay)
    if address != 0:
        since_ptr = address.to(tl.pointer_type(tl.float32))
        since = tl.load(since_ptr) * decay.to(tl.float32)
        tl.store(own_ptr + SCALAR.origin_decay, since)
        if moves & advances:
            tl.store(since_ptr, tl.where(merges, 1.0, since))
