"""How commands are made: parameters that several have, options made from definitions of the library, and results."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer import BadParameter

from fused_merge.cli.output import fail, say
from fused_merge.options import Option, options_of, types_of

# What a command returns: the document that --json prints, and the lines that are printed without it, as they come.
Result: TypeAlias = tuple[Any, Iterable[str]]
# A range of more ratios is a typing mistake.
_MOST = 1000


def command(
    *definitions: type, only: Collection[str] | None = None, resumes: bool = False
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a command of a function that returns its result; every exception becomes one sentence.

    The function receives the options of definitions that have a `cli`, or `only` those of certain names, as
    `**options`; on the command line they stand between its positional and its keyword-only parameters, and `--json` and
    `--debug` come last. A command that `resumes` goes on where it was interrupted when it is given again.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., None]:
        @wraps(function)
        def run(*, json_output: bool, debug: bool, **given: Any) -> None:
            try:
                document, lines = function(**{name: _expanded(value) for name, value in given.items()})
                for line in lines:
                    if not (json_output or given.get("quiet")):
                        say(line)
                if json_output:
                    say(json.dumps(document))
            except BadParameter:
                # Wrong usage: typer shows it.
                raise
            except (Exception, KeyboardInterrupt) as error:
                fail(error, debug=debug, json_output=json_output, resumes=resumes and not given.get("dry_run"))

        own = inspect.signature(function, eval_str=True).parameters.values()
        types = types_of(*definitions)
        parameters = [each for each in own if each.kind is each.POSITIONAL_OR_KEYWORD]
        parameters += [
            _parameter(name, option, types[name])
            for name, option in options_of(*definitions).items()
            if option.cli is not None and (only is None or name in only)
        ]
        parameters += [each for each in own if each.kind is each.KEYWORD_ONLY]
        for name, kind in (("json_output", AsJson), ("debug", Debug)):
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _expanded(value: Any) -> Any:
    """Return a path, or a list of them, as the shell would have given it where it does not expand `~` (--out=~/x)."""
    if isinstance(value, list):
        return [_expanded(each) for each in value]
    return value.expanduser() if isinstance(value, Path) else value


def _parameter(name: str, option: Option, annotation: str) -> inspect.Parameter:
    settings = {"help": option.summary, **(option.cli or {})}
    kind = settings.pop("type", None) or next(
        x for x in (str, bool, int, float) if x.__name__ in annotation.split(" | ")
    )
    # A flag that is off by default needs no --no-flag; one that is neither on nor off does.
    flag = (f"--{name.replace('_', '-')}",) if option.default is False else ()
    start = list(option.default) if isinstance(option.default, tuple) else option.default
    default = typer.Option(start, *settings.pop("param_decls", flag), **settings)
    annotated = kind | None if option.default is None else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated)


def parse_ratios(text: str) -> list[float]:
    """Return the numbers of "0.1,0.2", "0:1:0.1" (start, end, step; the end counts) or a mixture of the two.

    Ranges are counted in decimal, so that 0:1:0.1 holds 0.3 and not 0.30000000000000004.
    """
    try:
        return [ratio for part in text.split(",") for ratio in (_range(part) if ":" in part else [float(part)])]
    except ValueError as error:
        raise BadParameter(f"{error}; write numbers with commas, such as 0.1,0.2, or a range, 0:1:0.1") from error


def _range(text: str) -> list[float]:
    try:
        start, end, step = map(Decimal, text.split(":"))
        last = (end - start) // step
    except (ValueError, InvalidOperation, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is no range start:end:step") from error
    if not (last.is_finite() and 0 <= last < _MOST):
        raise ValueError(f"{text!r} does not go from its start to its end in at most {_MOST} ratios")
    return [float(start + i * step) for i in range(int(last) + 1)]


def parse_model(text: str) -> tuple[str, float]:
    """Return path and weight of "PATH=WEIGHT"; the last = separates them."""
    path, _, weight = text.rpartition("=")
    with suppress(ValueError):
        if path:
            return path, float(weight)
    raise BadParameter(f"{text!r} is not a model and its weight; write PATH=WEIGHT, such as sft/=0.5")


def wanted_ratios(ratios: list[float] | None, file: Path | None) -> list[float] | dict[str, Any]:
    """Return the ratios of --ratios, or those of --ratios-file by name; the file is JSON if it is named so, else YAML.

    Raises BadParameter if neither or both are given, ValueError if the file holds anything but {name: number or
    {regular expression: number}}, and else as `read_plain`.
    """
    if file is None:
        if ratios is None:
            raise BadParameter("Missing option '--ratios' or '--ratios-file'.")
        return ratios
    if ratios is not None:
        raise BadParameter("--ratios and --ratios-file exclude each other; give one")
    from fused_merge.io.plain import read_plain

    content = read_plain(file)
    if not (content and isinstance(content, dict)):
        raise ValueError(f"{file} must map folder names to ratios, such as 'half: 0.5'; correct it")
    for folder, ratio in content.items():
        if not isinstance(folder, str):
            raise ValueError(f"{file} has the folder name {folder!r}, which is not text; put it in quotes")
        numbers = list(ratio.values()) if isinstance(ratio, dict) else [ratio]
        # YAML and JSON read numbers as these two types; a bool is neither.
        if not numbers or not {type(number) for number in numbers} <= {int, float}:
            raise ValueError(
                f"{file} gives {folder!r} the ratio {ratio!r}; write a number such as 0.5, or a mapping from regular "
                "expressions to numbers"
            )
    return content


Base = Annotated[Path, typer.Argument(help="Safetensors file or Hugging Face folder: ratio 0.")]
Tuned = Annotated[Path, typer.Argument(help="The same, trained further: ratio 1.")]
Ratios = Annotated[
    Any, typer.Option(parser=parse_ratios, metavar="R,R,...", help="Such as 0.1,0.2 or 0:1:0.1, end included.")
]
RatiosFile = Annotated[
    Path | None, typer.Option(help="YAML or JSON: {name: ratio, or {regular expression on tensor names: ratio}}.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
