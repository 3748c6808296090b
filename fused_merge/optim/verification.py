"""The kernels that a training run uses, held against the eager equations while it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_merge import functional
from fused_merge.eager.merge_stats import MergeStats
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.functional import backend
from fused_merge.io.sources import bits

logger = logging.getLogger("fused_merge")


class Verifiable(Protocol):
    """What `verify` needs of an optimizer; `MergingAdamW` has it."""

    param_groups: list[dict[str, Any]]
    impl: str
    verify_steps: int


def verify(optimizer: Verifiable, steps: int = 10) -> None:
    """Compare the next steps of an optimizer with the eager code, tensor by tensor and bit for bit.

    Each tensor is cloned, stepped by the kernel, stepped on the clone by the eager code, and compared: parameter and
    every state. Extra memory is that of the largest tensor and its state. The run itself is unchanged.

    Args:
        optimizer: a `MergingAdamW`, whose steps are compared.
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


def verify_as_the_environment_says(optimizer: Verifiable) -> None:
    """Compare the first n steps of an optimizer where the environment variable `FUSED_MERGE_VERIFY` is n.

    Raises:
        ValueError: if it is not a number of steps. Where eager code runs there is only a warning.
    """
    steps = os.environ.get("FUSED_MERGE_VERIFY", "0")
    if not steps.isdecimal():
        raise ValueError(f"FUSED_MERGE_VERIFY must be a number of steps to compare, got {steps!r}")
    try:
        verify(optimizer, int(steps))
    except ValueError as reason:
        logger.warning("FUSED_MERGE_VERIFY=%s: %s", steps, reason)


def verified_merging_adamw_(
    *lists: Sequence[Any], names: Sequence[str], impl: str, workspace: functional.Workspace, **options: Any
) -> list[MergeStats | None]:
    """Do what `functional.merging_adamw_` does, and compare every tensor with the eager code.

    Raises:
        RuntimeError: naming the first tensor and state that differ.
    """
    every: dict[str, Any] = options | {"names": names}
    gathered = []
    for i, name in enumerate(names):
        own = {key: [value[i]] if key in _PER_TENSOR else value for key, value in every.items()}
        # In a call of its own: the copies of one tensor are gone before the next one is copied.
        own |= {"impl": impl, "workspace": workspace.part(name)}
        gathered += _verified_step(name, [column[i] for column in lists], own)
    return gathered


def _verified_step(name: str, columns: list[Any], options: dict[str, Any]) -> list[MergeStats | None]:
    (anchor,), (master,) = options["anchors"], options["masters"]
    anchor_copy = None if anchor is None else Anchor(*(tensor.clone() for tensor in anchor))
    master_copy = None if master is None else master.clone()
    copies = [tensor.clone() for tensor in columns[: len(_STATES)]]
    gathered = functional.merging_adamw_(*([value] for value in columns), **options)
    functional.merging_adamw_(
        *([value] for value in (*copies, *columns[len(_STATES) :])),
        **options | {"anchors": [anchor_copy], "masters": [master_copy], "impl": "eager", "stats": False},
    )
    pairs = [*zip(_STATES, columns, copies, strict=False)]
    if anchor is not None and anchor_copy is not None:
        pairs += zip(("anchor", "anchor_decay"), anchor, anchor_copy, strict=True)
    if master is not None and master_copy is not None:
        pairs.append(("master_low" if master.dtype == torch.int16 else "master", master, master_copy))
    for state, kernel, eager in pairs:
        if not _same(kernel, eager):
            raise RuntimeError(
                f"the kernel and the eager code differ in {state!r} of {name!r}, by at most "
                f"{float((kernel.double() - eager.double()).abs().nan_to_num().max()):.3g}; "
                "train with impl='eager' and report it with the output of `fused-merge env`"
            )
    return gathered


# The options of the functional form that hold one entry a tensor.
_PER_TENSOR = ("tensor_ids", "names", "full_taus", "anchors", "masters")
# Its first lists.
_STATES = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal bits; NaN has many patterns and equals NaN."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())
