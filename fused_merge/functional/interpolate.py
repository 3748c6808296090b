"""Points of the path between many pairs of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.eager.interpolate import interpolate_
from fused_merge.functional import backend
from fused_merge.names import describe
from fused_merge.per_tensor import finite


@torch.no_grad()
def interpolate(
    bases: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    ratios: Sequence[float] | Sequence[Sequence[float]],
    outs: Sequence[Sequence[Tensor]] | None = None,
    *,
    impl: str = "auto",
) -> list[list[Tensor]]:
    """Return R points of the path between each pair of tensors, reading each pair once.

    theta(r) = theta0 + r * (theta1 - theta0), in fp32 (fp64 if an end is) from the nearer end and rounded
    once; r = 0 and r = 1 copy bits. Source: Lin et al. 2024 (arXiv 2309.06256).

    Args:
        bases: T tensors theta0, floating, any shapes and strides.
        tuneds: T tensors theta1 of the same shapes and devices.
        ratios: R finite ratios for all tensors, or R for each of the T tensors. Below 0 or above 1 they
            extrapolate.
        outs: R tensors for each of the T pairs, of the shape and device of the pair: mutated. With R = 1 an
            output may be one of its inputs; they may not overlap otherwise. None allocates, in the dtype of
            theta0. The kernel takes only ends and outputs of one dtype.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`. Compiled code serves contiguous tensors of bf16, fp16 and
            fp32 on a CPU, all in one pass; `"auto"` chooses it where there is enough to do, and leaves other tensors to
            the eager code.

    Returns:
        `outs`, or R new tensors for each of the T pairs: `result[t][r]`.

    Raises:
        ValueError: for a ratio that is not finite or tensors that do not match.
        RuntimeError: if what `impl` names cannot run here, or does not serve a tensor.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> bases, tuneds = [torch.zeros(2)], [torch.ones(2)]
        >>> fm.functional.interpolate(bases, tuneds, [0.0, 0.25, 1.5])
        [[tensor([0., 0.]), tensor([0.2500, 0.2500]), tensor([1.5000, 1.5000])]]
    """
    per_tensor = _ratios_per_tensor(ratios, len(bases))
    pairs = list(zip(bases, tuneds, strict=True))
    if outs is None:
        outs = [
            [torch.empty_like(base, memory_format=torch.contiguous_format) for _ in weights]
            for base, weights in zip(bases, per_tensor, strict=True)
        ]
    for index, ((base, tuned), points, weights) in enumerate(zip(pairs, outs, per_tensor, strict=True)):
        for tensor in (base, tuned, *points):
            if not tensor.is_floating_point():
                raise ValueError(f"tensor {index}: only floating tensors can be interpolated, got {tensor.dtype}")
        if len(points) != len(weights):
            raise ValueError(f"tensor {index}: {len(weights)} ratios need as many outputs, got {len(points)}")
        for other in (tuned, *points):
            if (other.shape, other.device) != (base.shape, base.device):
                raise ValueError(
                    f"tensor {index}: base is {describe(base)} and another end or output {describe(other)}; "
                    "make shape and device the same"
                )

    chosen = backend.choose(impl, bases, [x.numel() for x in bases])
    reasons: list[str | None] = [None] * len(bases)
    for index, (base, tuned) in enumerate(pairs):
        if chosen[base.device] != "eager":
            reasons[index] = _kernels(chosen[base.device]).why_unsupported(base, tuned, outs[index])
    for share in backend.group(impl, chosen, bases, [f"tensor {i}" for i in range(len(bases))], reasons):
        if share.backend != "eager":
            columns = (bases, tuneds, per_tensor, outs)
            _kernels(share.backend).interpolate(*([column[i] for i in share.members] for column in columns))
            continue
        for i in share.members:
            if all(tensor.is_contiguous() for tensor in (*pairs[i], *outs[i])):
                base, tuned, *points = (tensor.view(-1) for tensor in (*pairs[i], *outs[i]))
                interpolate_(base, tuned, per_tensor[i], points)
                continue
            for out, ratio in zip(outs[i], per_tensor[i], strict=True):
                out.copy_(eager_interpolate(*pairs[i], ratio))
    return [list(points) for points in outs]


def _kernels(name: str) -> Any:
    """Return the module that has the kernels of a backend."""
    if name == "triton":
        from fused_merge.kernels import interpolate as kernels
    else:
        from fused_merge.compiled import interpolate as kernels
    return kernels


def _ratios_per_tensor(ratios: Sequence[float] | Sequence[Sequence[float]], tensors: int) -> list[list[float]]:
    """Return the ratios of each tensor, all of them finite."""
    shared = [ratio for ratio in ratios if not isinstance(ratio, Sequence)]
    own = [[float(ratio) for ratio in each] for each in ratios if isinstance(each, Sequence)]
    per_tensor = own or [[float(ratio) for ratio in shared]] * tensors
    if (shared and own) or len(per_tensor) != tensors:
        raise ValueError(f"ratios must be one list of numbers, or a list for each of the {tensors} tensors")
    return [[finite(ratio, what="ratio") for ratio in each] for each in per_tensor]
