"""The options of sweeps: what each means and what the command line says of it. Nothing here waits for torch."""

from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, TypedDict

from fused_merge.io.options import ModelOptions, PathOptions
from fused_merge.options import Option, at_least, definition, need, optional
from fused_merge.progress import ProgressOption


def _repeated(metavar: str, help: str, *flags: str, **settings: Any) -> Option:
    """Return an option that the command line takes several times, each time with one value."""
    flag = {"param_decls": flags} if flags else {}
    cli = {"type": list[str], "metavar": metavar, "help": f"{help}; may be repeated.", **flag}
    return Option((), cli=cli, **settings)


def _folders(name: str, paths: Sequence[str | PathLike[str]]) -> tuple[str, ...]:
    """Return the absolute paths of folders, or raise for one that is none."""
    if isinstance(paths, (str, PathLike)):
        raise TypeError(f"{name} must be a sequence, got {str(paths)!r}; write [{str(paths)!r}]")
    folders = [Path(path).expanduser().absolute() for path in paths]
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"{name} {folder} is no folder; give one that holds the YAML files of tasks")
    return tuple(map(str, folders))


_check_limit = need(lambda n: 0 < n < 1 or (n >= 1 and n == int(n)), "be a whole number, or a share between 0 and 1")
_SCORER = "Takes (model) or (model, tokenizer), returns a number or {name: number}"
_TASK = "Task, group, tag or YAML file of the lm-evaluation-harness"


@definition
class EvaluateOptions(ProgressOption, total=False):
    """The options of `evaluate_ratios`.

    Options:
        minimize: the scores for which less is better.
    """

    minimize: Annotated["Collection[str]", _repeated("NAME", "Score for which less is better")]


@definition
class TaskOptions(TypedDict, total=False):
    """How tasks of the lm-evaluation-harness are found and asked.

    Options:
        include_path: folders with the YAML files of further tasks.
        num_fewshot: number of examples before each question; None is what each task says. A task that says 0 keeps it.
        limit: at most so many questions of each task, or below 1 that share of them; None asks all.
        apply_chat_template: ask in the tokenizer's chat template, with examples as turns of the conversation.
        confirm_run_unsafe_code: let tasks run the code that the model writes; without it such tasks are refused.
    """

    include_path: Annotated[
        "Sequence[str | PathLike[str]]", _repeated("FOLDER", "Where YAML files of further tasks are", check=_folders)
    ]
    num_fewshot: Annotated["int | None", Option(None, optional(at_least(0)), cli={"min": 0})]
    limit: Annotated["float | None", Option(None, optional(_check_limit), cli={})]
    apply_chat_template: Annotated[bool, Option(False, cli={})]
    confirm_run_unsafe_code: Annotated[bool, Option(False, cli={})]


@definition
class SweepOptions(EvaluateOptions, TaskOptions, ModelOptions, PathOptions, total=False):
    """The options of `sweep_checkpoints`.

    Options:
        scorers: `"module:function"`; see `fused_merge.sweep.scorers.ImportedScorer`.
        tasks: tasks of the lm-evaluation-harness: names, patterns, tags, groups, or paths of YAML files. Their scores
            are called `task/metric`, or `task/metric,filter` where a filter has a name; the harness knows for which
            less is better. A group has its own, and `group/task/metric` for its tasks, which then count for no front.
        compare: the `results.json` of other sweeps.
        batch_size: batch size of the tasks.
    """

    scorers: Annotated["Sequence[str]", _repeated("MODULE:FUNCTION", _SCORER, "--scorer")]
    tasks: Annotated["Sequence[str]", _repeated("NAME", _TASK, "--task")]
    compare: Annotated[
        "Sequence[str | PathLike[str]]", _repeated("RESULTS.json", "Another sweep, for the same picture")
    ]
    batch_size: Annotated[int, Option(1, at_least(1), cli={"min": 1})]
