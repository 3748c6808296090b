"""torchtitan: its container of optimizers, which finds the classes of this library by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from fused_merge.optim.merging_adamw import DeltaLike, MergingAdamW
from fused_merge.optim.variants import OnDAREAdamW, OnProjAdamW, OnTIESAdamW

_CLASSES = {cls.__name__: cls for cls in (MergingAdamW, OnDAREAdamW, OnProjAdamW, OnTIESAdamW)}


class MergingOptimizersContainer(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's container; `optimizer_name` of a parameter group may also name a class of this library.

    Options of a group go to its `optimizer_kwargs`; `reference_delta`, `impl` and `stats_every`, which are the
    optimizer's, to `optimizer_factory_kwargs_by_name`. `merging_adamw` makes the configuration of a single group.
    Source: torchtitan/components/optimizer/optimizer.py (torchtitan 0.3.0).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """torchtitan's own configuration; it builds this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        ours: Callable[..., Optimizer] | None = _CLASSES.get(name)
        return ours or OptimizersContainer._resolve_optimizer_factory(name)


def merging_adamw(
    reference_delta: DeltaLike, *, optimizer_name: str = "OnDAREAdamW", **options: Any
) -> MergingOptimizersContainer.Config:
    """Return the configuration of one of our optimizers on all parameters, as `default_adamw` of torchtitan does.

    The delta has torchtitan's names of the tensors: make it with `ReferenceDelta.from_models` of two modules into which
    torchtitan has loaded the checkpoints; they may be sharded.

    Args:
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        optimizer_name: `"OnDAREAdamW"`, `"OnTIESAdamW"`, `"OnProjAdamW"` or `"MergingAdamW"`.
        options: those of the class.
    """
    return MergingOptimizersContainer.Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name=optimizer_name)],
        # torchtitan's own choice of torch's kernels; ours have `impl`.
        implementation="for-loop",
        optimizer_factory_kwargs_by_name={optimizer_name: {"reference_delta": reference_delta, **options}},
    )
