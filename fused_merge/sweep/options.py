"""The options of sweeps: what each means and what the command line says of it. Nothing here waits for torch."""

from collections.abc import Collection, Sequence
from os import PathLike
from typing import Annotated

from fused_merge.io.options import ModelOptions
from fused_merge.options import Option, at_least, definition
from fused_merge.progress import ProgressOption


@definition
class EvaluateOptions(ProgressOption, total=False):
    """The options of `evaluate_ratios`.

    Options:
        minimize: the scores for which less is better.
    """

    minimize: Annotated[
        "Collection[str]",
        Option(
            (), cli={"type": list[str], "metavar": "NAME", "help": "Score for which less is better; may be repeated."}
        ),
    ]


@definition
class SweepOptions(EvaluateOptions, ModelOptions, total=False):
    """The options of `sweep_checkpoints`.

    Options:
        scorers: `"module:function"`; see `fused_merge.sweep.scorers.ImportedScorer`.
        tasks: names of tasks of the lm-evaluation-harness. Their scores are called `task/metric`, or
            `task/metric,filter` where a filter has a name; the harness knows for which less is better.
        compare: the `results.json` of other sweeps.
        batch_size: batch size of the tasks.
    """

    scorers: Annotated[
        "Sequence[str]",
        Option(
            (),
            cli={
                "type": list[str],
                "param_decls": ("--scorer",),
                "metavar": "MODULE:FUNCTION",
                "help": "Takes (model) or (model, tokenizer), returns a number or {name: number}; may be repeated.",
            },
        ),
    ]
    tasks: Annotated[
        "Sequence[str]",
        Option(
            (),
            cli={
                "type": list[str],
                "param_decls": ("--task",),
                "metavar": "NAME",
                "help": "Task of the lm-evaluation-harness; may be repeated.",
            },
        ),
    ]
    compare: Annotated[
        "Sequence[str | PathLike[str]]",
        Option(
            (),
            cli={
                "type": list[str],
                "metavar": "RESULTS.json",
                "help": "Another sweep, for the same picture; may be repeated.",
            },
        ),
    ]
    batch_size: Annotated[int, Option(1, at_least(1), cli={"min": 1})]
