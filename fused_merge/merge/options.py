"""The options of merging finished models; this module imports no torch either."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fused_merge.checkpoints.options import FileOptions, PlanOptions, StreamOptions
from fused_merge.io.options import OutputOptions
from fused_merge.options import Option, definition, one_of
from fused_merge.per_tensor import PerTensor, finite

if TYPE_CHECKING:
    from fused_merge.io.sources import PathLike


def _check_scale(name: str, scale: float) -> float:
    return finite(scale, what=name)


def _check_seed(name: str, seed: Any) -> int:
    if not hasattr(seed, "__index__"):
        raise TypeError(f"{name} must be an integer, got {seed!r}")
    return operator.index(seed)


@definition
class MergePlanOptions(PlanOptions, total=False):
    """The options that decide what `merge_checkpoints` writes.

    Options:
        density: share of each delta to keep, in (0, 1]; one for all models or a list with one for each. None keeps
            everything. Magnitudes equal to the threshold of a trim all stay.
        gamma: share of each delta that breadcrumbs drop as too large; in [0, 1), at most what the density leaves. Given
            as the density is; None is 0.01.
        epsilon: half the range of the probabilities with which DELLA keeps elements; the smallest magnitude of a row is
            kept with density - epsilon, the largest with density + epsilon. Given as the density is; None is 0.15.
        normalize: divide by the sum of the weights; None is True for `"linear"`, `"ties"` and `"della"`.
        rescale: divide what a random drop keeps by the probability of keeping it; None is True for DARE and DELLA.
        scale: factor of the merged delta.
        trim: choose by magnitude in each `"tensor"` or in the whole `"model"`; the paper of TIES takes the model. The
            density, and gamma, are then one number for each model.
        seed: seed of the random masks; the mask of the first model is that of a saved `ReferenceDelta`.
        config_from: model whose configuration goes along, `"base"` or a path as given; with it go integer tensors, code
            and whatever else is no tokenizer. None is the base, without a base the first model.
        tokenizer_from: model whose tokenizer goes along, `"base"` or a path as given; with it go processor and chat
            template. None is the first that has a chat template, in the order base and models, else the first with a
            tokenizer; one for another vocabulary does not count.
    """

    density: Annotated["PerTensor | Sequence[PerTensor | None] | None", Option(None, cli={"type": float})]
    gamma: Annotated["PerTensor | Sequence[PerTensor | None] | None", Option(None, cli={"type": float})]
    epsilon: Annotated["PerTensor | Sequence[PerTensor | None] | None", Option(None, cli={"type": float})]
    normalize: Annotated["bool | None", Option(None, cli={})]
    rescale: Annotated["bool | None", Option(None, cli={})]
    scale: Annotated[float, Option(1.0, _check_scale, cli={"param_decls": ("--scale", "--lambda")})]
    trim: Annotated[str, Option("tensor", one_of("tensor", "model"), cli={})]
    seed: Annotated[int, Option(0, _check_seed, cli={})]
    config_from: Annotated["PathLike | None", Option(None, cli={"type": str, "show_default": "base"})]
    tokenizer_from: Annotated[
        "PathLike | None", Option(None, cli={"type": str, "show_default": "first with a chat template"})
    ]


class MergekitOptions(FileOptions, OutputOptions, total=False):
    """What may be said beside a file for mergekit: how models are paired and how files are written."""


class MergeOptions(MergePlanOptions, StreamOptions, total=False):
    """All options of `merge_checkpoints`."""
