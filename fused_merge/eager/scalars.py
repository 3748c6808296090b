"""The scalars of one step, derived from the hyper-parameters once per tensor and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
# Step counts are fp32, exact up to 2^24.
STEP_BITS = 25


class Scalars(NamedTuple):
    """What a step needs to know besides its tensors, in the order of the kernels' scalar table."""

    step: Scalar  # t, counted from 1; also the Philox step of the masks of u
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar
    step_size: Scalar  # lr / (1 - beta1^t)
    inv_sqrt_bias2: Scalar  # 1 / sqrt(1 - beta2^t)
    eps: Scalar
    decay: Scalar  # 1 - lr * weight_decay
    update_weight: Scalar  # (1 - alpha), over the reserve rate of u when rescaled
    tau_weight: Scalar  # alpha, over the reserve rate of tau when rescaled
    moves: Scalar  # 1, or 0 when lr = 0: the moments advance and the weights do not
    grad_factor: Scalar  # what g is multiplied by: 1 / grad_scale, the clipping coefficient, -1 to maximize
    advances: Scalar  # 1, or 0 when found_inf: nothing moves at all
    merges: Scalar  # 1 where t is a multiple of merge_every, else 0


class Hyper(NamedTuple):
    """The hyper-parameters of a step, which its scalars are derived from.

    Attributes:
        lr: learning rate: a float, or a 0-d tensor that the host never reads.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled, as in `torch.optim.AdamW`.
        alpha: weight of the delta, in [0, 1].
        update_scale: 1/p under a rescaled random drop of u; `merging_adamw_` and `step_` set it by the rule.
        tau_scale: 1/p with the rate that tau was stored with; set by the rule, too.
        grad_factor: what gradients are multiplied by: a float, or a 0-d tensor.
        found_inf: not 0 where gradients overflowed and nothing is to move: a float, or a 0-d tensor.
        merge_every: K of step-K.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Hyper
        >>> hyper = Hyper(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=1e-6)
        >>> hyper.merge_every, hyper.grad_factor
        (1, 1.0)
        >>> hyper._replace(lr=torch.tensor(5e-7)).lr  # a schedule that the host does not wait for
        tensor(5.0000e-07)
    """

    lr: Scalar
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    alpha: float
    update_scale: float = 1.0
    tau_scale: float = 1.0
    grad_factor: Scalar = 1.0
    found_inf: Scalar = 0.0
    merge_every: int = 1


def derive_scalars(step: Scalar, hyper: Hyper) -> Scalars:
    """Return the scalars of step `step`, a float or a tensor counted from 1, in fp64 and not rounded."""
    if isinstance(step, Tensor):
        step = step.double()
    lr = hyper.lr.double() if isinstance(hyper.lr, Tensor) else hyper.lr
    beta1, beta2 = hyper.betas
    bias2 = 1 - power(beta2, step)
    return Scalars(
        step=step,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=lr / (1 - power(beta1, step)),
        inv_sqrt_bias2=bias2.sqrt().reciprocal() if isinstance(bias2, Tensor) else 1 / math.sqrt(bias2),
        eps=hyper.eps,
        decay=1 - lr * hyper.weight_decay,
        update_weight=(1 - hyper.alpha) * hyper.update_scale,
        tau_weight=hyper.alpha * hyper.tau_scale,
        moves=_flag(lr != 0),
        grad_factor=hyper.grad_factor,
        advances=_flag(hyper.found_inf == 0),
        merges=_flag(step % hyper.merge_every == 0),
    )


def power(base: float, exponent: Scalar) -> Scalar:
    """Return base^exponent for a whole number from 0 to 2^24, by squaring.

    Libraries differ in the last place of their powers; this has one order of multiplications everywhere.
    """
    if isinstance(exponent, Tensor):
        bits = exponent.to(torch.int64)
        result = torch.ones_like(bits, dtype=torch.float64)
        for bit in range(STEP_BITS):
            result = torch.where((bits >> bit) & 1 == 1, result * base, result)
            base *= base
        return result
    number = 1.0
    for bit in range(STEP_BITS):
        if int(exponent) >> bit & 1:
            number *= base
        base *= base
    return number


def _flag(condition: bool | Tensor) -> Scalar:
    return condition.double() if isinstance(condition, Tensor) else float(condition)


def scalar_table(steps: Sequence[Tensor], hyper: Hyper, device: torch.device) -> Tensor:
    """Return fp64 `[T, 15]` on `device`: a row of `Scalars` for each of T step counts.

    Rounding the table to fp32 rounds each scalar once. Nothing waits for a device: step counts are read by the
    host only where they lie on the CPU and no hyper-parameter is a tensor.
    """
    on_host = not any(isinstance(value, Tensor) for value in hyper)
    if on_host and all(step.device.type == "cpu" for step in steps):
        counts = [float(step) for step in steps]
        rows = {t: derive_scalars(t, hyper) for t in set(counts)}
        return torch.tensor([rows[t] for t in counts], dtype=torch.float64).to(device, non_blocking=True)
    columns = derive_scalars(torch.stack([step.to(device, non_blocking=True) for step in steps]), hyper)
    table = torch.empty(len(steps), len(columns), dtype=torch.float64, device=device)
    for place, column in zip(table.unbind(1), columns, strict=True):
        # Numbers are filled in: a copy from the host would wait for the device.
        place.copy_(column) if isinstance(column, Tensor) else place.fill_(column)
    return table
