"""The kernels that a training run uses, held against the eager equations while it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_merge.eager.merge_stats import MergeStats
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.operands import Operands
from fused_merge.functional import backend
from fused_merge.functional.merging_adamw import PreparedStep, step_
from fused_merge.functional.workspace import Workspace
from fused_merge.io.sources import bits

logger = logging.getLogger("fused_merge")

_STATES = ("param", "grad", "exp_avg", "exp_avg_sq", "step")


class Verifiable(Protocol):
    """What `verify` needs of an optimizer; `MergingAdamW` and `OnlineMerging` have it."""

    impl: str
    verify_steps: int

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """Of the optimizer."""


def verify(optimizer: Verifiable, steps: int = 10) -> None:
    """Compare the next steps of an optimizer with the eager code, tensor by tensor and bit for bit.

    Each tensor is cloned, stepped by what serves it, the clone by the eager code, and both are compared: parameter and
    every state. Extra memory is that of the largest tensor and its state. The run itself is unchanged.

    Args:
        optimizer: a `MergingAdamW`, whose steps are compared, or an `OnlineMerging`, whose merges are.
        steps: for how many calls of `step`; 0 stops.

    Raises:
        ValueError: if eager code is what runs, so that there is nothing to compare, or for a negative number.
        RuntimeError: later, from `step`, naming the tensor and the state that differ.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> model = torch.nn.Linear(4, 2)
        >>> delta = fm.ReferenceDelta.from_models(torch.nn.Linear(4, 2), model)
        >>> optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, impl="compiled")
        >>> fm.verify(optimizer, steps=2)
        >>> for _ in range(2):
        ...     model(torch.ones(4)).sum().backward()
        ...     optimizer.step()  # raises if a bit differs
        >>> optimizer.verify_steps  # left to compare
        0
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    chosen = backend.choose(optimizer.impl, params, [param.numel() for param in params])
    if steps and all(runs == "eager" for runs in chosen.values()):
        raise ValueError(
            "there is nothing to verify: this optimizer runs the eager code itself; use impl='triton' or 'compiled'"
        )
    optimizer.verify_steps = steps


def verify_as_the_environment_says(optimizer: Verifiable) -> None:
    """Compare the first n steps where the environment variable `FUSED_MERGE_VERIFY` is n; eager code only warns."""
    steps = os.environ.get("FUSED_MERGE_VERIFY", "0")
    if not steps.isdecimal():
        raise ValueError(f"FUSED_MERGE_VERIFY must be a number of steps to compare, got {steps!r}")
    try:
        verify(optimizer, int(steps))
    except ValueError as reason:
        logger.warning("FUSED_MERGE_VERIFY=%s: %s", steps, reason)


def take_verified(steps: Sequence[PreparedStep], workspace: Workspace) -> list[list[MergeStats | None]]:
    """Take steps tensor by tensor; RuntimeError names the first tensor and state that eager code has otherwise."""
    gathered: list[list[MergeStats | None]] = []
    for operands, rule, hyper, seed, stats, shares in steps:
        gathered.append([])
        served = {i: share.backend for share, _ in shares for i in share.members}
        for i, o in enumerate(operands):
            # In a call of its own: the copies of one tensor are gone before the next one is copied.
            copy = _copy(o)
            own = workspace.part(o.name)
            gathered[-1] += step_([o], rule=rule, hyper=hyper, seed=seed, stats=stats, workspace=own, impl=served[i])
            step_([copy], rule=rule, hyper=hyper, seed=seed, impl="eager")
            _compare(o, copy)
    return gathered


def _copy(o: Operands) -> Operands:
    """Return operands whose tensors a step may mutate without touching those of `o`."""

    def copy(x: Tensor | None) -> Any:
        return None if x is None else x.clone()

    return o._replace(
        **{field: copy(getattr(o, field)) for field in _STATES},
        anchor=o.anchor and Anchor(o.anchor.weights.clone(), copy(o.anchor.decay), o.anchor.kept),
        master=copy(o.master),
    )


def _states(o: Operands) -> dict[str, Tensor]:
    """Return by name what a step reads and writes of a parameter."""
    states = {field: getattr(o, field) for field in _STATES}
    if o.anchor is not None:
        states |= {"anchor": o.anchor.weights, "anchor_decay": o.anchor.decay}
    if o.master is not None:
        states["master_low" if o.master.dtype == torch.int16 else "master"] = o.master
    return {field: x for field, x in states.items() if x is not None}


def _compare(kernel: Operands, eager: Operands) -> None:
    """Raise RuntimeError if a kernel and the eager code differ."""
    others = _states(eager)
    for state, ours in _states(kernel).items():
        if not _same(ours, others[state]):
            raise RuntimeError(
                f"the kernel and the eager code differ in {state!r} of {kernel.name!r}, by at most "
                f"{float((ours.double() - others[state].double()).abs().nan_to_num().max()):.3g}; "
                "train with impl='eager' and report it with the output of `fused-merge env`"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal bits; NaN has many patterns and equals NaN."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())
