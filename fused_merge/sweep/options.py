"""The options of sweeps: what each means and what the command line says of it. Nothing here waits for torch."""

from collections.abc import Collection, Sequence
from os import PathLike
from typing import Annotated

from fused_merge.io.options import ModelOptions
from fused_merge.options import Option, at_least, definition
from fused_merge.progress import ProgressOption


def _repeated(metavar: str, help: str, *flags: str) -> Option:
    """Return an option that the command line takes several times, each time with one value."""
    flag = {"param_decls": flags} if flags else {}
    return Option((), cli={"type": list[str], "metavar": metavar, "help": f"{help}; may be repeated.", **flag})


_SCORER = "Takes (model) or (model, tokenizer), returns a number or {name: number}"


@definition
class EvaluateOptions(ProgressOption, total=False):
    """The options of `evaluate_ratios`.

    Options:
        minimize: the scores for which less is better.
    """

    minimize: Annotated["Collection[str]", _repeated("NAME", "Score for which less is better")]


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

    scorers: Annotated["Sequence[str]", _repeated("MODULE:FUNCTION", _SCORER, "--scorer")]
    tasks: Annotated["Sequence[str]", _repeated("NAME", "Task of the lm-evaluation-harness", "--task")]
    compare: Annotated[
        "Sequence[str | PathLike[str]]", _repeated("RESULTS.json", "Another sweep, for the same picture")
    ]
    batch_size: Annotated[int, Option(1, at_least(1), cli={"min": 1})]
