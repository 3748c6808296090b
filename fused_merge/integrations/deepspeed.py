"""DeepSpeed: which elements of which parameters stand in the tensors that it gives to the optimizer.

ZeRO replaces the parameters of a group by flat fp32 tensors, of which each process has one part, and leaves the names
of the group as they were. Elements of a part are neighbors in their parameter, so each stretch of them is a piece.
Read in deepspeed 0.19.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from math import prod
from typing import Any, NamedTuple, TypeAlias

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from fused_merge.distributed import Fragment
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.names import canonical_name
from fused_merge.optim.merging_adamw import MergingAdamW
from fused_merge.optim.online_merging import OnlineMerging, innermost, merging_around
from fused_merge.optim.pieces import Piece

ProcessGroup: TypeAlias = Any


class Stretch(NamedTuple):
    """Neighboring elements of one parameter that stand in a flat tensor; none, if another process has them all."""

    param: Tensor
    shape: Sequence[int]
    elements: slice  # of the flattened parameter
    local: slice  # of the flat tensor


class FlatTensor(NamedTuple):
    """A tensor that the optimizer steps in place of parameters of one of its groups."""

    tensor: Tensor
    group: int
    process_group: ProcessGroup  # of those who have the other parts
    stretches: list[Stretch]  # of the same parameters in the same order on all of them


def bind_deepspeed(engine: Any) -> None:
    """Tell a merging optimizer which parameters the tensors are made of that DeepSpeed gives it; call it on all ranks.

    Call it after `deepspeed.initialize(model=..., optimizer=..., config=...)` and before the first step; the engine
    saves and loads checkpoints as ever, before it or after. ZeRO 0 to 3 are known, also with the optimizer offloaded to
    the CPU. Padding belongs to no parameter and stays as it is.

    Args:
        engine: what `deepspeed.initialize` returned first, over a `MergingAdamW` or one of its subclasses, or over any
            optimizer with an `OnlineMerging` around it. Names are those that the optimizer was given.

    Raises:
        TypeError: if the engine's optimizer is no merging one.
        ValueError: for `max_grad_norm` under ZeRO, which would see one flat tensor at a time; for offload to NVMe,
            experts, tensor parallelism and ZenFlow; if the delta lacks a parameter.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> model = torch.nn.Linear(4, 2)
        >>> delta = fm.ReferenceDelta.from_models(torch.nn.Linear(4, 2), model)
        >>> optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
        >>> config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
        >>> config["zero_allow_untested_optimizer"] = True
        >>> # DeepSpeed makes a process group and logs to standard output: examples/deepspeed_zero.py runs the rest.
        >>> import deepspeed  # doctest: +SKIP
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # doctest: +SKIP
        >>> fm.bind_deepspeed(engine)  # doctest: +SKIP
        >>> loss = engine.backward(engine(torch.ones(1, 4)).sum())  # doctest: +SKIP
        >>> engine.step()  # doctest: +SKIP
    """
    optimizer = _merging_optimizer(engine.optimizer)
    flat = list(flat_tensors(engine))
    if flat and any(group.get("max_grad_norm") is not None for group in optimizer.param_groups):
        raise ValueError(
            "max_grad_norm would clip each flat tensor of DeepSpeed by a norm of its own; set gradient_clipping in the "
            "configuration of DeepSpeed instead"
        )
    optimizer.set_pieces(pieces_of(engine, optimizer.param_groups))
    # Now, since a step will see one group, or one tensor of it, and find what is missing when others have stepped.
    held = [group["params"] for group in optimizer.param_groups]
    try:
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [each.tensor for each in flat if each.group == number] or group["params"]
        optimizer.bind()
    finally:
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = params


def pieces_of(engine: Any, param_groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, list[Piece]]:
    """Return what the tensors are made of that DeepSpeed has put in place of the parameters of these groups."""
    flat = list(flat_tensors(engine))
    names = _names(engine.module, param_groups, flat)
    return {each.tensor: _pieces(each, names) for each in flat}


@contextmanager
def injected(cls: type[MergingAdamW], **options: Any) -> Iterator[None]:
    """Make `deepspeed.initialize` train with a merging optimizer, and bind it, whatever optimizer its caller chose.

    For frameworks that offer no choice of an optimizer:

        with injected(fm.OnDAREAdamW, reference_delta="tau.safetensors"):
            ...  # what calls deepspeed.initialize(...)

    Parameter groups, learning rates, betas, eps and weight decay are those of the caller's optimizer, or of the
    parameters and the configuration that it passes, unless `options` has them; a scheduler made for the caller's
    optimizer moves on to the new one. An engine that has no optimizer, such as a reference model's, is left alone.

    Args:
        cls: `MergingAdamW` or a subclass of it.
        options: what it is made with, besides parameters.

    Raises:
        ValueError: in `deepspeed.initialize`, if it is given parameters that are not the model's; as `bind_deepspeed`.
    """
    original = deepspeed.initialize

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        config = _take_config(given)
        optimizer = given.get("optimizer")
        if optimizer is None and "optimizer" not in config:
            return original(*args, **kwargs)
        optimizer = given["optimizer"] = cls(_groups(given, config, leave_out=options), **options)
        scheduler: Any = given.get("lr_scheduler")
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.optimizer = optimizer
        allowed = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        initialized = original(**{**given, "config": config | allowed})
        bind_deepspeed(initialized[0])
        return initialized

    deepspeed.initialize = initialize
    try:
        yield
    finally:
        deepspeed.initialize = original


def _take_config(given: dict[str, Any]) -> dict[str, Any]:
    """Take the configuration out of arguments of `deepspeed.initialize`, where it has three places."""
    config = given.pop("config", None) or given.pop("config_params", None)
    if config is None:
        given["args"] = copy(given["args"])
        config, given["args"].deepspeed_config = given["args"].deepspeed_config, None
    return dict(config) if isinstance(config, Mapping) else deepspeed.load_ds_config(config)


def _groups(given: dict[str, Any], config: Mapping[str, Any], leave_out: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return named parameter groups with the options of the optimizer that `deepspeed.initialize` would have used."""
    names = {param: name for name, param in given["model"].named_parameters()}
    params = given.pop("model_parameters", None)
    optimizer = given.get("optimizer")
    if optimizer is None:
        params = list(params or (param for param in names if param.requires_grad))
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        groups = [{**config["optimizer"].get("params", {}), **group} for group in groups]
    else:
        groups = (optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(params)).param_groups
    if any(param not in names for group in groups for param in group["params"]):
        raise ValueError("deepspeed.initialize is given parameters that are not its model's; their names are not known")
    kept = {"lr", "betas", "eps", "weight_decay", "initial_lr"} - set(leave_out)
    return [
        {"params": [(names[param], param) for param in group["params"]]}
        | {key: group[key] for key in kept & set(group)}
        for group in groups
    ]


def _merging_optimizer(optimizer: Any) -> MergingAdamW | OnlineMerging:
    """Return the merging optimizer within the wrappers of DeepSpeed, or what merges around it."""
    found = merging_around(optimizer) or innermost(optimizer)
    if not isinstance(found, MergingAdamW | OnlineMerging):
        raise TypeError(
            f"the engine steps a {type(found).__name__}, which does not merge; pass a merging optimizer to "
            "deepspeed.initialize, or to a trainer as optimizer_cls_and_kwargs, since with deepspeed it drops "
            "optimizers=, and with offload_optimizer set zero_force_ds_cpu_optimizer to false; or make an "
            "OnlineMerging around engine.optimizer"
        )
    return found


def flat_tensors(engine: Any) -> Iterator[FlatTensor]:
    """Return what DeepSpeed has put in place of the parameters; nothing under ZeRO 0 in fp32."""
    zero = engine.optimizer
    for what, is_used in {
        "mixtures of experts": engine.has_moe_layers,
        "tensor parallelism": engine.mp_world_size > 1,
        "optimizer states on NVMe": getattr(zero, "swap_optimizer", False),
        "ZenFlow": getattr(zero, "zenflow", False),
    }.items():
        if is_used:
            raise ValueError(f"{what} cannot be merged under DeepSpeed; use ZeRO without")
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        yield from _of_slices(zero)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        masters = zero.single_partition_of_fp32_groups
        yield from _of_partitions(zero.bit16_groups, zero.bit16_groups_flat, masters, zero.real_dp_process_group)
    elif isinstance(zero, BF16_Optimizer):
        masters = zero.fp32_groups_flat_partition
        yield from _of_partitions(zero.bf16_groups, zero.bf16_groups_flat, masters, zero.real_dp_process_group)
    elif isinstance(zero, FP16_UnfusedOptimizer):
        for number, (params, masters) in enumerate(zip(zero.fp16_groups, zero.fp32_groups, strict=True)):
            for param, master in zip(params, masters, strict=True):
                whole = slice(0, param.numel())
                yield FlatTensor(master, number, None, [Stretch(param, param.shape, whole, whole)])


def _of_partitions(
    groups: list[list[Tensor]], flats: list[Tensor], masters: list[Tensor], process_groups: list[ProcessGroup]
) -> Iterator[FlatTensor]:
    """Return the flat tensors of ZeRO 1 and 2: equal parts of all parameters of a group, one after the other.

    Where a parameter stands is read from its storage, which is the group's: `_hp_mapping` is another order with
    `round_robin_gradients`.
    """
    for number, (params, flat, master, process_group) in enumerate(
        zip(groups, flats, masters, process_groups, strict=True)
    ):
        size = master.numel()
        first = torch.distributed.get_rank(process_group) * size
        stretches = []
        for param in params:
            if param.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise ValueError("the parameters are offloaded; call engine.reload_states() before bind_deepspeed")
            offset = param.storage_offset() - flat.storage_offset()
            start, stop = (min(max(edge, 0), param.numel()) for edge in (first - offset, first - offset + size))
            local = min(max(offset - first, 0), size)
            stretches.append(Stretch(param, param.shape, slice(start, stop), slice(local, local + stop - start)))
        yield FlatTensor(master, number, process_group, stretches)


def _of_slices(zero: Any) -> Iterator[FlatTensor]:
    """Return the flat tensors of ZeRO 3: an equal slice of each parameter of a subgroup, the last one padded."""
    for number, (params, master, process_group) in enumerate(
        zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.sub_group_process_groups, strict=True)
    ):
        rank = torch.distributed.get_rank(process_group)
        stretches, local = [], 0
        for param in params:
            size = param.partition_numel()
            start, stop = (min(edge, param.ds_numel) for edge in (rank * size, (rank + 1) * size))
            stretches.append(Stretch(param, param.ds_shape, slice(start, stop), slice(local, local + stop - start)))
            local += size
        yield FlatTensor(master, zero.sub_group_to_group_id[number], process_group, stretches)


def _names(module: nn.Module, param_groups: Sequence[Mapping[str, Any]], flat: list[FlatTensor]) -> dict[Tensor, str]:
    """Return the names of the parameters: those of the optimizer's groups, where these tell which is whose."""
    of_module: dict[Tensor, str] = {param: name for name, param in module.named_parameters()}
    names: dict[Tensor, str] = {}
    for number, group in enumerate(param_groups):
        params = [stretch.param for each in flat if each.group == number for stretch in each.stretches]
        given = group.get("param_names", ())
        # Of a group with frozen parameters DeepSpeed keeps only the others, and all the names.
        own = given if len(given) == len(params) else [of_module[param] for param in params]
        if given and not {canonical_name(name) for name in own} <= {canonical_name(name) for name in given}:
            raise ValueError(
                f"the optimizer has names of its own, such as {given[0]!r}, and frozen parameters, which DeepSpeed "
                "leaves out; give it only those that require a gradient"
            )
        names.update(zip(params, own, strict=True))
    return names


def _pieces(flat: FlatTensor, names: dict[Tensor, str]) -> list[Piece]:
    """Return what a flat tensor is made of."""
    if flat.process_group is None:
        return [Piece(names[stretch.param], None, None) for stretch in flat.stretches]
    return [
        Piece(names[stretch.param], stretch.local, _fragment(stretch.shape, stretch.elements, flat.process_group))
        for stretch in flat.stretches
    ]


def _fragment(shape: Sequence[int], elements: slice, process_group: ProcessGroup) -> Fragment:
    """Return neighboring elements of a tensor, to be read from the rows that they begin and end in."""
    held = elements.stop - elements.start
    index = ShardIndex(elements.start, max(held, 1), max(held, 1))
    shard = Shard(index, tuple(shape), groups=(process_group,), row_groups=(process_group,), cuts_rows=True)
    inner = prod(shape[1:])
    rows = slice(elements.start // inner, -(-elements.stop // inner) if held else elements.start // inner)
    box = (rows, *(slice(0, size) for size in shape[1:])) if shape else ()
    first = rows.start * inner if shape else 0
    return Fragment(shard, box, slice(elements.start - first, elements.stop - first))
