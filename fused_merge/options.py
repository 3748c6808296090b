"""The options of a parameter group: what they may be, and what they mean to a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_merge.methods import MergeRule, merge_rule

MISSING = ("error", "plain")
MASTERS = ("none", "fp32", "split")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a state was made with cannot be changed under it.
FIXED = ("merge_every", "master", "seed", "state_dtype")

# Hyper-parameters of torch.optim.AdamW that change its result and that a loaded group may carry.
FOREIGN = ("amsgrad",)


class AdamWOptions(TypedDict, total=False):
    """The options that every merging optimizer has; `MergingAdamW` says what they mean."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    alpha: float
    merge_every: int
    project: str | None
    project_strength: float
    project_over: str
    project_on: str
    max_grad_norm: float | None
    maximize: bool
    missing: str
    state_dtype: torch.dtype
    rounding: str
    master: str
    stats_every: int
    seed: int
    impl: str


def rule_of(group: Mapping[str, Any]) -> MergeRule:
    """Return the rule that a group asks for.

    Raises:
        ValueError: as `fused_merge.methods.merge_rule`.
    """
    return merge_rule(
        group["method"],
        group["reserve_rate"],
        tau_reserve_rate=group["reference"]["reserve_rate"] if "reference" in group else None,
        **{
            option: group[option]
            for option in ("rescale", "vote", "project", "project_strength", "project_over", "project_on", "rounding")
        },
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name by which `torch` has a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str | torch.dtype) -> torch.dtype | str:
    """Return the state dtype of that name; what is none comes back as it is, for `check_options` to refuse."""
    return {dtype_name(dtype): dtype for dtype in STATE_DTYPES}.get(str(name), name)


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option of a group that is out of range or that its row lacks."""
    rule_of(group)
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"lr must be at least 0, got {lr}")
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if not 0.0 <= group["alpha"] <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {group['alpha']}")
    if not (isinstance(group["merge_every"], int) and group["merge_every"] >= 1):
        raise ValueError(f"merge_every must be a whole number of steps, at least 1, got {group['merge_every']}")
    if group["max_grad_norm"] is not None and not group["max_grad_norm"] > 0.0:
        raise ValueError(f"max_grad_norm must be above 0, or None not to clip, got {group['max_grad_norm']}")
    if group["missing"] not in MISSING:
        raise ValueError(f"missing must be 'error' or 'plain', got {group['missing']!r}")
    if group["master"] not in MASTERS:
        raise ValueError(f"master must be 'none', 'fp32' or 'split', got {group['master']!r}")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be torch.float32, bfloat16 or float16, got {group['state_dtype']}")
    if group["rounding"] == "stochastic" and group["master"] != "none":
        raise ValueError(
            f"rounding='stochastic' and master={group['master']!r} exclude each other: a master loses nothing that "
            "random rounding could save; choose one"
        )


def check_dtype(name: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter's dtype does not go with the options of its group."""
    if not param.is_floating_point():
        raise ValueError(f"parameter {name!r} is {param.dtype}; only real floating parameters can be stepped")
    if group["master"] != "none" and param.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"parameter {name!r} is {param.dtype} and needs no master; use master='none' for its group")
    if group["master"] == "split" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"parameter {name!r} is {param.dtype}, and only bf16 is the upper half of fp32; use master='fp32'"
        )
