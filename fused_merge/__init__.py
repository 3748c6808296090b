"""Merge language models while they train, or along the path between two checkpoints.

- `OnDAREAdamW`, `OnTIESAdamW`, `OnProjAdamW`, `MergingAdamW`: AdamW whose every update is merged with the reference
  delta of supervised fine-tuning (Lu et al. 2024, arXiv 2405.17931). `OnlineMerging`: the same around any optimizer.
- `ReferenceDelta`: that delta, from models or checkpoints, dense or sparse.
- `interpolate`, `RatioSweep`, `interpolate_checkpoints`: many points of the path between two models in one read
  (Lin et al. 2024, arXiv 2309.06256).
- `merge_checkpoints`: finished models merged offline: model soups, task arithmetic, TIES, DARE, slerp.
- `LayerRatios`, `adapt_ratios`: a ratio for each part of the network, given or found by optimization (same paper).
- `evaluate_ratios`, `pareto_front`, `hypervolume`, `knee`: what the points of a path are worth.
- `attach`, `optimizer_factory`, `MergeStatsCallback`, `SweepCallback`: all this inside the trainers of Transformers and
  TRL; docs/how-to/frameworks.md has the others.
- `bind_deepspeed`, `DeepSpeedCallback`: a merging optimizer under ZeRO.
- `plot_merge_stats`: what merging did to each layer over a run, as a picture.
- `functional`: the same without classes.

A name is imported when it is first used, so that the command line shows its help without waiting for
torch. It imports torch, numpy and safetensors; Triton is imported when a kernel first runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fused_merge._version import __version__

if TYPE_CHECKING:
    from fused_merge import functional
    from fused_merge.adapt.adapt import adapt_ratios, answer_loss, reward_weighted_loss
    from fused_merge.checkpoints.interpolate import interpolate_checkpoints
    from fused_merge.delta.reference_delta import ReferenceDelta
    from fused_merge.integrations.deepspeed import bind_deepspeed
    from fused_merge.integrations.trainer_callbacks import DeepSpeedCallback, MergeStatsCallback, SweepCallback
    from fused_merge.integrations.transformers import attach, optimizer_factory
    from fused_merge.interpolation.interpolate import interpolate
    from fused_merge.interpolation.layer_ratios import LayerRatios
    from fused_merge.interpolation.ratio_sweep import RatioSweep
    from fused_merge.merge.merge import merge_checkpoints
    from fused_merge.optim.merging_adamw import MergingAdamW
    from fused_merge.optim.online_merging import OnlineMerging
    from fused_merge.optim.variants import OnDAREAdamW, OnProjAdamW, OnTIESAdamW
    from fused_merge.optim.verification import verify
    from fused_merge.plots.merge_stats import plot_merge_stats
    from fused_merge.sweep.evaluate import evaluate_ratios, sweep_checkpoints
    from fused_merge.sweep.pareto import hypervolume, knee, pareto_front

__all__ = [
    "DeepSpeedCallback",
    "LayerRatios",
    "MergeStatsCallback",
    "MergingAdamW",
    "OnDAREAdamW",
    "OnProjAdamW",
    "OnTIESAdamW",
    "OnlineMerging",
    "RatioSweep",
    "ReferenceDelta",
    "SweepCallback",
    "__version__",
    "adapt_ratios",
    "answer_loss",
    "attach",
    "bind_deepspeed",
    "evaluate_ratios",
    "functional",
    "hypervolume",
    "interpolate",
    "interpolate_checkpoints",
    "knee",
    "merge_checkpoints",
    "optimizer_factory",
    "pareto_front",
    "plot_merge_stats",
    "reward_weighted_loss",
    "sweep_checkpoints",
    "verify",
]

# No module may have the name of something that is looked up here: importing it would take the name.
_HOMES = {
    name: module
    for module, names in {
        "adapt.adapt": "adapt_ratios answer_loss reward_weighted_loss",
        "checkpoints.interpolate": "interpolate_checkpoints",
        "delta.reference_delta": "ReferenceDelta",
        "integrations.trainer_callbacks": "DeepSpeedCallback MergeStatsCallback SweepCallback",
        "integrations.transformers": "attach optimizer_factory",
        "integrations.deepspeed": "bind_deepspeed",
        "interpolation.interpolate": "interpolate",
        "interpolation.layer_ratios": "LayerRatios",
        "interpolation.ratio_sweep": "RatioSweep",
        "merge.merge": "merge_checkpoints",
        "optim.merging_adamw": "MergingAdamW",
        "optim.online_merging": "OnlineMerging",
        "optim.variants": "OnDAREAdamW OnProjAdamW OnTIESAdamW",
        "optim.verification": "verify",
        "plots.merge_stats": "plot_merge_stats",
        "sweep.evaluate": "evaluate_ratios sweep_checkpoints",
        "sweep.pareto": "hypervolume knee pareto_front",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("fused_merge.functional")
    if name in _HOMES:
        return getattr(import_module(f"fused_merge.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
