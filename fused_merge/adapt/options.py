"""The options of adaptive averaging: what each means, how it is checked and what the command line says of it.

Nothing here waits for torch.
"""

import math
from typing import TYPE_CHECKING, Annotated, TypedDict

from fused_merge.io.options import ModelOptions
from fused_merge.options import Option, at_least, one_of, within
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import os

    from fused_merge.interpolation.layer_ratios import LayerRatios


def _check_lr(name: str, lr: float) -> float:
    if not 0.0 < lr < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {lr}")
    return lr


def _check_betas(name: str, betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{name} must lie in [0, 1), got {betas}")
    return betas


def _check_regularizer(name: str, weight: float) -> float:
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {weight}")
    return weight


def check_share(name: str, share: float) -> float:
    """Return a share of answers to keep, or raise ValueError if it is out of range."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {share}")
    return share


class TargetOptions(TypedDict, total=False):
    """What is searched for: options of `adapt_ratios` and `adapt_checkpoints`."""

    mean_ratio: Annotated[
        float,
        Option(
            0.4,
            "rho, in [0, 1]: the unweighted mean over the parts, kept to 1e-9.",
            within(0, 1),
            {"help": "Mean of the ratios over the parts."},
        ),
    ]
    parts: Annotated[
        "int | LayerRatios",
        Option(
            3,
            "K equal slices by depth, or a `LayerRatios` whose parts are taken and whose ratios, projected, are the "
            'start, except with `parametrization="paper"`, which starts at rho everywhere.',
            cli={"help": "Equal slices of the layers, each with a ratio of its own.", "min": 1},
        ),
    ]
    steps: Annotated[
        int,
        Option(
            100,
            "at most so many updates; without gradients, so many evaluations.",
            at_least(1),
            {"help": "Updates of the ratios.", "min": 1},
        ),
    ]


class RateOptions(ProgressOption, total=False):
    """Further options of both."""

    lr: Annotated[
        float,
        Option(
            0.05,
            "how far a ratio may move in the first step.",
            _check_lr,
            {"help": "How far a ratio may move in the first step."},
        ),
    ]


class AdaptOptions(RateOptions, total=False):
    """The options of `adapt_ratios` beside `TargetOptions`."""

    betas: Annotated["tuple[float, float]", Option((0.9, 0.99), "of Adam: momentum, second moment.", _check_betas)]
    accumulate: Annotated[int, Option(1, "number of batches that make one update.", at_least(1))]
    gradients: Annotated[
        bool,
        Option(
            True,
            "False searches without them, by CMA-ES (Hansen 2016, arXiv 1604.00772) of the package `cma`, for losses "
            "that cannot be differentiated; lr / 2 is its first standard deviation.",
        ),
    ]
    parametrization: Annotated[
        str,
        Option(
            "direct",
            '`"direct"`, or `"paper"`: r_k = K * rho * (sigmoid(w_k) + e) / sum over j of the same, with Adam on w; '
            "projected where it leaves [0, 1], though there it need not find the optimum.",
            one_of("direct", "paper"),
        ),
    ]
    regularizer: Annotated[
        float, Option(0.0, "weight of sum over k of weight_k * (r_k - rho)^2, added to the loss.", _check_regularizer)
    ]
    regularizer_weights: Annotated[
        str,
        Option(
            "uniform",
            '`"uniform"`: all 1; `"paper"`: 25 / (|layer - L/2| + 1), the mean over the part, so that parts in the '
            "middle stay near the mean.",
            one_of("uniform", "paper"),
        ),
    ]
    patience: Annotated[
        int, Option(20, "stop early when no ratio has moved by more than `tolerance` in so many steps.", at_least(1))
    ]
    tolerance: Annotated[float, Option(1e-4, "see `patience`.")]
    seed: Annotated[int, Option(0, "seed of the search without gradients.")]
    journal: Annotated[
        "str | os.PathLike[str] | None",
        Option(
            None,
            "a JSON file that keeps every step; a run that was killed goes on from it, given the same arguments and "
            "batches, with those batches that it would have taken next. With several processes the first keeps it.",
        ),
    ]
    impl: Annotated[str, Option("auto", '`"auto"`, `"triton"` or `"eager"`.')]


class SamplingOptions(ProgressOption, total=False):
    """The options of `sample_answers`."""

    max_new_tokens: Annotated[
        int,
        Option(
            128,
            "maximum length of an answer.",
            at_least(1),
            {"help": "Maximum length of an answer, in tokens.", "min": 1},
        ),
    ]
    temperature: Annotated[
        float,
        Option(
            1.0,
            "sampling temperature; 0 takes the likeliest token.",
            at_least(0),
            {"help": "Sampling temperature of the answers.", "min": 0.0},
        ),
    ]
    batch_size: Annotated[
        int, Option(8, "how many prompts are answered at once.", at_least(1), {"help": "Answers at once.", "min": 1})
    ]
    seed: Annotated[
        int,
        Option(
            0, "seed of the samples; the caller's random numbers are not touched.", cli={"help": "Seed of the answers."}
        ),
    ]


class AnswerOptions(TargetOptions, RateOptions, SamplingOptions, ModelOptions, total=False):
    """The options of `adapt_checkpoints`."""

    reward: Annotated[
        "str | None",
        Option(
            None,
            '`"module:function"`, called with a list of (prompt, answer) texts, which returns a number for each; only '
            "the `best` share is kept. None keeps all.",
            cli={
                "type": str,
                "metavar": "MODULE:FUNCTION",
                "help": "Takes a list of (prompt, answer), returns a number for each; only the best are kept.",
            },
        ),
    ]
    best: Annotated[
        float,
        Option(
            0.4,
            "share of the answers to keep, in (0, 1].",
            check_share,
            {"help": "Share of the answers to keep, with --reward."},
        ),
    ]
