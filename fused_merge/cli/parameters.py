"""Parameters that several commands have, and options made from the definitions of the library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fused_merge.cli.arguments import parse_ratios
from fused_merge.options import Option, options_of, types_of

Command = TypeVar("Command", bound=Callable[..., None])

Base = Annotated[Path, typer.Argument(help="Safetensors file or Hugging Face folder: ratio 0.")]
Tuned = Annotated[Path, typer.Argument(help="The same, trained further: ratio 1.")]
Ratios = Annotated[
    Any, typer.Option(parser=parse_ratios, metavar="R,R,...", help="Such as 0.1,0.2 or 0:1:0.1, end included.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def with_options(*definitions: type, only: Collection[str] | None = None) -> Callable[[Command], Command]:
    """Give a command the options of definitions, which it receives as `**options`.

    On the command line they stand between its positional and its keyword-only parameters.

    Args:
        definitions: see `fused_merge.options`; their options without `cli` are left out.
        only: the names of the options to take; None takes all.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        first = next(i for i, each in enumerate(own) if each.kind is each.KEYWORD_ONLY)
        types = types_of(*definitions)
        own[first:first] = [
            _parameter(name, option, types[name])
            for name, option in options_of(*definitions).items()
            if option.cli is not None and (only is None or name in only)
        ]
        command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return command

    return decorate


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


def check_ratios(ratios: Any, ratios_file: Path | None) -> None:
    """Refuse a command without ratios, or with ratios in two places."""
    if ratios is None and ratios_file is None:
        raise typer.BadParameter("Missing option '--ratios' or '--ratios-file'.")
    if ratios is not None and ratios_file is not None:
        raise typer.BadParameter("--ratios and --ratios-file exclude each other; give one")
