"""The options of the optimizers: what they may be, and what they mean to a step."""

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from fused_merge.functional.backend import check_impl
from fused_merge.methods import MergeRule, ProjectionOptions, RuleOptions, merge_rule
from fused_merge.options import Option, at_least, definition, need, one_of, options_of, within
from fused_merge.per_tensor import dtype_name

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a state was made with cannot be changed under it.
FIXED = ("merge_every", "master", "seed", "state_dtype")

# Hyper-parameters of torch.optim.AdamW that change its result and that a loaded group may carry.
FOREIGN = ("amsgrad",)


def _check_lr(name: str, lr: float | Tensor) -> float | Tensor:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"{name} must be at least 0, got {lr}")
    return lr


def _check_betas(name: str, betas: tuple[float, float]) -> tuple[float, float]:
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}[{i}] must lie in [0, 1), got {beta}")
    return betas


def _check_impl(name: str, impl: str) -> str:
    check_impl(impl)
    return impl


@definition
class MergeOptions(ProjectionOptions, total=False):
    """The options of merges that do not depend on who makes the update.

    Options:
        alpha: weight of the delta, in [0, 1]. Not scaled by `lr`: alpha*tau is added at every merge.
        merge_every: K; a merge takes all that came since the last one as its u, and between merges nothing is merged
            (the paper's step-K variant).
        missing: `"error"`, or `"plain"` to leave parameters unmerged that the delta does not hold.
        seed: 64-bit key of the random masks and of stochastic rounding.
    """

    alpha: Annotated[float, Option(1e-6, within(0, 1))]
    merge_every: Annotated[
        int, Option(1, need(lambda k: isinstance(k, int) and k >= 1, "be a whole number of steps, at least 1"))
    ]
    missing: Annotated[str, Option("error", one_of("error", "plain"))]
    seed: Annotated[int, Option(0)]


@definition
class AdamWOptions(MergeOptions, total=False):
    """The options that every method has and that may differ between parameter groups.

    Options:
        lr: learning rate, a float or a 0-d tensor. At 0 the moments and steps advance and no weight moves.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled; theta is multiplied by 1 - lr*weight_decay before the merge.
        max_grad_norm: scale all gradients down to this norm, as `clip_grad_norm_` does, without writing them.
        maximize: step uphill.
        state_dtype: of the moments: fp32, bf16 or fp16.
        master: `"fp32"` keeps an fp32 copy of 16-bit weights, `"split"` the 16 bits that bf16 weights lack.
    """

    lr: Annotated[float | Tensor, Option(1e-6, _check_lr)]
    betas: Annotated[tuple[float, float], Option((0.9, 0.999), _check_betas)]
    eps: Annotated[float, Option(1e-8, at_least(0))]
    weight_decay: Annotated[float, Option(0.0, at_least(0))]
    max_grad_norm: Annotated[
        float | None, Option(None, need(lambda norm: norm is None or norm > 0.0, "be above 0, or None not to clip"))
    ]
    maximize: Annotated[bool, Option(False)]
    state_dtype: Annotated[
        torch.dtype, Option(torch.float32, need(STATE_DTYPES.__contains__, "be torch.float32, bfloat16 or float16"))
    ]
    master: Annotated[str, Option("none", one_of("none", "fp32", "split"))]


@definition
class RunOptions(TypedDict, total=False):
    """The options of a whole optimizer, which are not saved.

    Options:
        stats_every: collect `merge_stats` at every n-th step; 0 never does.
        impl: `"auto"` (Triton on a GPU; on a CPU eager, above 50 M parameters compiled), `"triton"`, `"compiled"` or
            `"eager"`; all give the same bits. `FUSED_MERGE_IMPL` overrides it.
    """

    stats_every: Annotated[int, Option(0, at_least(0))]
    impl: Annotated[str, Option("auto", _check_impl)]


class CommonOptions(AdamWOptions, RunOptions, total=False):
    """Every option that all merging optimizers have."""


class MergingOptions(CommonOptions, RuleOptions, total=False):
    """Every option of `MergingAdamW`."""


@definition
class AnyMergeOptions(MergeOptions, RuleOptions, total=False):
    """The options of merges of another optimizer's updates.

    Options:
        project_on: `"update"`; the gradients are the optimizer's own.
    """

    project_on: Annotated[str, Option("update", one_of("update"))]


class OnlineMergingOptions(AnyMergeOptions, RunOptions, total=False):
    """Every option of `OnlineMerging`."""


GROUP_OPTIONS = options_of(AdamWOptions, RuleOptions)
MERGE_OPTIONS = options_of(AnyMergeOptions)
RUN_OPTIONS = options_of(RunOptions)


def rule_of(group: Mapping[str, Any]) -> MergeRule:
    """Return the rule that a group asks for; raises what `merge_rule` does."""
    return merge_rule(
        group["method"],
        tau_reserve_rate=group["reference"]["reserve_rate"] if "reference" in group else None,
        **{option: group[option] for option in options_of(RuleOptions)},
    )


def check_options(group: Mapping[str, Any], options: Mapping[str, Option] = GROUP_OPTIONS) -> MergeRule:
    """Return the rule of a group; ValueError for the first option that is out of range or that its method lacks."""
    rule = rule_of(group)
    for name, option in options.items():
        option.check(name, group[name])
    if group["rounding"] == "stochastic" and group["master"] != "none":
        raise ValueError(
            f"rounding='stochastic' and master={group['master']!r} exclude each other: a master loses nothing that "
            "random rounding could save; choose one"
        )
    return rule


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


def dtype_of(name: str | torch.dtype) -> torch.dtype | str:
    """Return the state dtype of that name; what is none comes back as it is, for `check_options` to refuse."""
    return {dtype_name(dtype): dtype for dtype in STATE_DTYPES}.get(str(name), name)
