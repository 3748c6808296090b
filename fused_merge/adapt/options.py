"""The options of adaptive averaging: what each means, how it is checked and what the command line says of it.

Nothing here waits for torch.
"""

import math
from typing import TYPE_CHECKING, Annotated, TypedDict

from fused_merge.io.options import ModelOptions, PairingOptions, PathOptions
from fused_merge.options import Option, at_least, definition, need, one_of, share, within
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import os

    from fused_merge.interpolation.layer_ratios import LayerRatios


_check_parts = need(lambda parts: not isinstance(parts, int) or parts >= 1, "be at least 1")
_check_betas = need(lambda betas: all(0.0 <= beta < 1.0 for beta in betas), "lie in [0, 1)")
_check_regularizer = need(lambda weight: 0.0 <= weight < math.inf, "be at least 0 and finite")


@definition
class TargetOptions(TypedDict, total=False):
    """What is searched for: options of `adapt_ratios` and `adapt_checkpoints`.

    Options:
        mean_ratio: mean of the ratios over the parts (rho), in [0, 1]; unweighted, and kept to 1e-9.
        parts: number of equal slices of the layers, each with a ratio of its own; or a `LayerRatios` whose parts are
            taken and whose ratios, projected, are the start, except with `parametrization="paper"`, which starts at
            rho everywhere.
        steps: at most so many updates of the ratios; without gradients, so many evaluations.
        lr: how far a ratio may move in the first step.
    """

    mean_ratio: Annotated[float, Option(0.4, within(0, 1), cli={})]
    parts: Annotated["int | LayerRatios", Option(3, _check_parts, cli={"min": 1})]
    steps: Annotated[int, Option(100, at_least(1), cli={"min": 1})]
    lr: Annotated[float, Option(0.05, need(lambda lr: 0.0 < lr < math.inf, "be positive and finite"), cli={})]


@definition
class AdaptOptions(ProgressOption, PathOptions, total=False):
    """The options of `adapt_ratios` beside `TargetOptions`.

    Options:
        betas: of Adam: momentum, second moment.
        accumulate: number of batches that make one update.
        gradients: False searches without them, by CMA-ES (Hansen 2016, arXiv 1604.00772) of the package `cma`, for
            losses that cannot be differentiated; lr / 2 is its first standard deviation.
        parametrization: `"direct"`, or `"paper"`: r_k = K * rho * (sigmoid(w_k) + e) / sum over j of the same, with
            Adam on w; projected where it leaves [0, 1], though there it need not find the optimum.
        regularizer: weight of sum over k of weight_k * (r_k - rho)^2, added to the loss.
        regularizer_weights: `"uniform"`: all 1; `"paper"`: 25 / (|layer - L/2| + 1), the mean over the part, so that
            parts in the middle stay near the mean.
        patience: stop early when no ratio has moved by more than `tolerance` in so many steps.
        tolerance: see `patience`.
        seed: seed of the search without gradients.
        journal: a JSON file that keeps every step; a run that was killed goes on from it, given the same arguments and
            batches, with those batches that it would have taken next. With several processes the first keeps it.
        impl: `"auto"`, `"triton"` or `"eager"`.
    """

    betas: Annotated["tuple[float, float]", Option((0.9, 0.99), _check_betas)]
    accumulate: Annotated[int, Option(1, at_least(1))]
    gradients: Annotated[bool, Option(True)]
    parametrization: Annotated[str, Option("direct", one_of("direct", "paper"))]
    regularizer: Annotated[float, Option(0.0, _check_regularizer)]
    regularizer_weights: Annotated[str, Option("uniform", one_of("uniform", "paper"))]
    patience: Annotated[int, Option(20, at_least(1))]
    tolerance: Annotated[float, Option(1e-4)]
    seed: Annotated[int, Option(0)]
    journal: Annotated["str | os.PathLike[str] | None", Option(None)]
    impl: Annotated[str, Option("auto")]


@definition
class SamplingOptions(ProgressOption, total=False):
    """The options of `sample_answers`.

    Options:
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: sampling temperature of the answers; 0 takes the likeliest token.
        batch_size: number of prompts that are answered at once.
        seed: seed of the answers; the caller's random numbers are not touched.
    """

    max_new_tokens: Annotated[int, Option(128, at_least(1), cli={"min": 1})]
    temperature: Annotated[float, Option(1.0, at_least(0), cli={"min": 0.0})]
    batch_size: Annotated[int, Option(8, at_least(1), cli={"min": 1})]
    seed: Annotated[int, Option(0, cli={})]


@definition
class AnswerOptions(TargetOptions, SamplingOptions, ModelOptions, PairingOptions, total=False):
    """The options of `adapt_checkpoints`.

    Options:
        reward: function of a list of (prompt, answer) texts that returns a number for each, as `"module:function"`;
            only the `best` share is kept. None keeps all.
        best: share of the answers to keep with `reward`, in (0, 1].
        unmatched: what happens to tensors that only one model holds: `"error"` or `"copy"`.
    """

    reward: Annotated["str | None", Option(None, cli={"metavar": "MODULE:FUNCTION"})]
    best: Annotated[float, Option(0.4, share, cli={})]
    unmatched: Annotated[str, Option("error", one_of("error", "copy"), cli={})]
