"""The options of the optimizers: what they may be, and what they mean to a step."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import is_flattened
from fused_merge.functional.backend import check_impl
from fused_merge.methods import MergeRule, ProjectionOptions, RuleOptions, merge_rule
from fused_merge.optim.naming import NamesOf
from fused_merge.options import Option, at_least, check_known, definition, need, one_of, options_of, within
from fused_merge.per_tensor import dtype_name

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a state was made with cannot be changed under it.
FIXED = ("merge_every", "master", "seed", "state_dtype")

# Options of torch.optim.AdamW that there are not here, and why.
_OF_ADAMW = {
    "amsgrad": "this optimizer keeps no largest second moment",
    "capturable": "every step on a GPU can be captured",
    "differentiable": "no step of this optimizer is differentiable",
    "foreach": "impl says what steps all tensors",
    "fused": "impl says what steps all tensors, fused kernels where they can run",
}


def _check_lr(name: str, lr: float | Tensor) -> float | Tensor:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor | Real):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {lr!r}")
    if not isinstance(lr, Tensor) and not lr >= 0.0:
        raise ValueError(f"{name} must be at least 0, got {lr}")
    return lr


def _check_betas(name: str, betas: Sequence[float]) -> tuple[float, float]:
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(isinstance(beta, Real) for beta in betas):
        raise ValueError(f"{name} must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}[{i}] must lie in [0, 1), got {beta}")
    return betas[0], betas[1]


def _check_state_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    by_name = {dtype_name(each): each for each in STATE_DTYPES}
    if dtype_name(dtype) not in by_name:
        raise ValueError(f"{name} must be torch.float32, bfloat16 or float16, or one of these names, got {dtype}")
    return by_name[dtype_name(dtype)]


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
    seed: Annotated[int, Option(0, need(lambda seed: isinstance(seed, Integral), "be a whole number"))]


@definition
class AdamWOptions(MergeOptions, total=False):
    """The options that every method has and that may differ between parameter groups.

    Options:
        lr: learning rate, a float or a 0-d tensor. At 0 the moments and steps advance and no weight moves.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled; theta is multiplied by 1 - lr*weight_decay before the merge.
        max_grad_norm: scale all gradients down to this norm, as `clip_grad_norm_` does, without writing them. Also for
            trainers that refuse to clip for optimizers that unscale gradients themselves, as Lightning does.
        maximize: step uphill.
        state_dtype: of the moments: fp32, bf16 or fp16, as a dtype or by name.
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
    state_dtype: Annotated[torch.dtype | str, Option(torch.float32, _check_state_dtype)]
    master: Annotated[str, Option("none", one_of("none", "fp32", "split"))]


@definition
class RunOptions(TypedDict, total=False):
    """The options of a whole optimizer, which are not saved.

    Options:
        stats_every: collect `merge_stats` at every n-th step; 0 never does.
        impl: `"auto"` (Triton on a GPU; on a CPU compiled by numba, but for small models), `"triton"`, `"compiled"` or
            `"eager"`; all give the same bits. `FUSED_MERGE_IMPL` overrides it.
        names_of: the model, or its `named_parameters()`, for frameworks that pass bare parameters: each one is called
            as it is there. May also stand in a group that is added later.
    """

    stats_every: Annotated[int, Option(0, at_least(0))]
    impl: Annotated[str, Option("auto", _check_impl)]
    names_of: Annotated[NamesOf | None, Option(None)]


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


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that there is not; one of torch's AdamW passes where it asks for nothing."""
    _check_options_of_adamw(given)
    check_known((name for name in given if name not in _OF_ADAMW), GROUP_OPTIONS | RUN_OPTIONS)


def check_new_group(group: dict[str, Any]) -> MergeRule:
    """Do what `check_options` does, and raise an error for what a group cannot have at all."""
    _check_options_of_adamw(group)
    check_sharding(group)
    return check_options(group)


def _check_options_of_adamw(given: Mapping[str, Any]) -> None:
    for name, why in _OF_ADAMW.items():
        if given.get(name):
            raise TypeError(f"{name}={given[name]!r} is an option of torch.optim.AdamW: {why}; leave it out")


def check_options(group: dict[str, Any], options: Mapping[str, Option] = GROUP_OPTIONS) -> MergeRule:
    """Return the rule of a group and write its options as a step takes them.

    ValueError for the first option that is out of range or that the method lacks.
    """
    rule = rule_of(group)
    for name, option in options.items():
        group[name] = option.check(name, group[name])
    if group["rounding"] == "stochastic" and group["master"] != "none":
        raise ValueError(
            f"rounding='stochastic' and master={group['master']!r} exclude each other: a master loses nothing that "
            "random rounding could save; choose one"
        )
    return rule


def check_sharding(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that FSDP1 has flattened."""
    for index, param in enumerate(group["params"]):
        if is_flattened(param):
            name = group["param_names"][index] if "param_names" in group else f"number {index}"
            raise ValueError(
                f"parameter {name!r} was flattened by FullyShardedDataParallel (FSDP1), which cuts tensors anywhere; "
                "shard the model with FSDP2, torch.distributed.fsdp.fully_shard (fsdp_version: 2 in Accelerate)"
            )


def check_run_options(group: dict[str, Any], impl: str, stats_every: int, delta: ReferenceDelta) -> None:
    """Raise ValueError if a group has an option of the optimizer and it is not the optimizer's.

    ZeroRedundancyOptimizer hands all its keyword arguments to every group, copies those back from here and saves them:
    the large ones stay in the group as None.
    """
    own: dict[str, list[Any]] = {
        "impl": [impl],
        "stats_every": [stats_every],
        "reference_delta": [delta, delta.path],
    }
    for option, values in own.items():
        given = group.get(option)
        given = os.fspath(given) if isinstance(given, os.PathLike) else given
        if given is not None and given not in values:
            raise ValueError(f"{option} is an option of the optimizer, not of a parameter group")
    group.update({option: None for option in ("reference_delta", "names_of") if option in group})


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


def opened_delta(given: Any) -> ReferenceDelta:
    """Return the reference delta that a path leads to; TypeError for what is neither a path nor a delta."""
    if isinstance(given, ReferenceDelta):
        return given
    if isinstance(given, str | os.PathLike):
        return ReferenceDelta.load(given)
    if given is None:
        raise TypeError(
            "reference_delta is None: pass fm.ReferenceDelta.from_models(base_model, sft_model) or the path of a saved "
            "delta, or use torch.optim.AdamW where nothing is to be merged"
        )
    if isinstance(given, nn.Module | Mapping):
        raise TypeError(
            f"reference_delta is of type {type(given).__name__}, the tensors of one model, and a delta is the "
            "difference of two: pass fm.ReferenceDelta.from_models(base_model, sft_model)"
        )
    raise TypeError(f"reference_delta must be a ReferenceDelta or the path of a saved one, got {type(given).__name__}")
