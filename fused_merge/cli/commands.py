"""The command line as a whole: `fused-merge` and its commands.

A command imports what it runs when it runs, so that help and completion answer without waiting for torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fused_merge._version import __version__
from fused_merge.cli.checkpoints import interpolate, merge, verify
from fused_merge.cli.deltas import delta, inspect
from fused_merge.cli.environment import env
from fused_merge.cli.output import say
from fused_merge.cli.sweeps import adapt, sweep

app = typer.Typer(
    help="Merge language models while they train, or along a line between two checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"fused-merge {__version__}")
        raise typer.Exit


@app.callback()
def _fused_merge(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (interpolate, sweep, adapt, merge, delta, verify, inspect, env):
    app.command()(command)
