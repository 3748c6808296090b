"""The kernels that a training run uses, held against the eager equations while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fused_merge import backend, functional
from fused_merge.eager.merge_stats import MergeStats
from fused_merge.eager.merging_adamw import Anchor

if TYPE_CHECKING:
    from fused_merge.optimizers import MergingAdamW


def verify(optimizer: MergingAdamW, steps: int = 10) -> None:
    """Compare the next steps of an optimizer with the eager code, tensor by tensor and bit for bit.

    Each tensor is cloned, stepped by the kernel, stepped on the clone by the eager code, and compared: parameter and
    every state. Extra memory is that of the largest tensor and its state. The run itself is unchanged.

    Args:
        optimizer: whose steps are compared.
        steps: for how many calls of `step`; 0 stops.

    Raises:
        ValueError: if eager code is what runs, so that there is nothing to compare, or for a negative number.
        RuntimeError: later, from `step`, naming the tensor and the state that differ.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    devices = {param.device for group in optimizer.param_groups for param in group["params"]}
    if steps and all(backend.resolve(optimizer.impl, device) == "eager" for device in devices):
        raise ValueError("there is nothing to verify: this optimizer runs the eager code itself; use impl='triton'")
    optimizer.verify_steps = steps


def verified_merging_adamw_(
    *lists: Sequence[Any], names: Sequence[str], impl: str, **options: Any
) -> list[MergeStats | None]:
    """Do what `functional.merging_adamw_` does, and compare every tensor with the eager code.

    Raises:
        RuntimeError: naming the first tensor and state that differ.
    """
    gathered = []
    for i, name in enumerate(names):
        own: dict[str, Any] = {key: [value[i]] if key in _PER_TENSOR else value for key, value in options.items()}
        theirs = own | {key: [_clone(value[0])] for key, value in own.items() if key in _PER_TENSOR}
        columns = [column[i] for column in lists]
        clones = [_clone(value) for value in columns]
        gathered += functional.merging_adamw_(*([value] for value in columns), impl=impl, **own)
        functional.merging_adamw_(*([value] for value in clones), impl="eager", **theirs | {"stats": False})
        for state, kernel, eager in zip(_STATES, columns, clones, strict=False):
            if not _same(kernel, eager):
                raise RuntimeError(
                    f"the kernel and the eager code differ in {state!r} of {name!r}, by at most "
                    f"{float((kernel.double() - eager.double()).abs().nan_to_num().max()):.3g}; "
                    "train with impl='eager' and report it with the output of `fused-merge env`"
                )
    return gathered


# The options of the functional form that hold one entry a tensor.
_PER_TENSOR = ("tensor_ids", "full_taus", "anchors", "masters")
_STATES = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal values; NaN has many patterns and equals NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _clone(value: Any) -> Any:
    if isinstance(value, Anchor):
        return Anchor(*(tensor.clone() for tensor in value))
    return value.clone() if isinstance(value, Tensor) else value
