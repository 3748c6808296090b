"""What the command line prints, and how it fails; `fused_merge.cli` says what scripts may rely on."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from fused_merge.checkpoints.options import InterpolateOptions
from fused_merge.options import options_of
from fused_merge.sweep.options import SweepOptions

# What a user or a machine can cause; anything else is a bug.
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError, MemoryError)

# Options of functions that commands have too, as error sentences of the library write them.
_NAMES = "|".join(options_of(InterpolateOptions, SweepOptions))
_ARGUMENT = re.compile(rf"(?<![\w./\\-])({_NAMES})=(?:True|'([^']*)'|(\w+))")


def fail(error: BaseException, *, debug: bool, json_output: bool, resumes: bool) -> NoReturn:
    """End with one sentence for an exception and an exit code; with `debug`, leave the traceback.

    With `json_output`, the sentence is also printed on standard output, as `{"error": sentence}`. A command that
    `resumes` goes on where it was interrupted when it is given again.
    """
    interrupted = isinstance(error, KeyboardInterrupt)
    if interrupted:
        sentence = "interrupted" + "; run the same command again to go on from there" * resumes
    else:
        sentence = _sentence(error)
    if json_output:
        say(json.dumps({"error": sentence}))
    if debug and not interrupted:
        raise error
    if debug:
        traceback.print_exc()
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(130 if interrupted else 1) from None


def _sentence(error: BaseException) -> str:
    # Parsers speak in several lines.
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if not isinstance(error, _EXPECTED):
        return (
            f"unexpected {type(error).__name__} ({text}), a bug: report what the same command prints with --debug, "
            "and the output of `fused-merge env`"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"cannot use {error.filename}: {error.strerror}"
    return _ARGUMENT.sub(_option, text) or type(error).__name__


def _option(argument: re.Match[str]) -> str:
    """Return `--max-memory 5GB` of `max_memory='5GB'`."""
    value = argument[2] or argument[3]
    return f"--{argument[1].replace('_', '-')}" + (f" {value}" if value else "")


def say(text: str) -> None:
    """Print on standard output; if nobody reads it any more, do nothing, since the work is done."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Text left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from None


def plan_lines(plan: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a job would do, as a table; `plan` is the result of `Job.describe`."""
    numbers = [Column(name, justify="right") for name in ("files", "size")]
    table = Table(Column("folder", overflow="fold"), *numbers, box=None)
    for folder, files in groupby(plan["files"], lambda file: str(Path(file["path"]).parent)):
        sizes = [file["bytes"] for file in files]
        table.add_row(folder, str(len(sizes)), decimal(sum(sizes)))
    return table_text(table), f"reads {decimal(plan['bytes_read'])}, writes {decimal(plan['bytes_written'])}"


def table_text(table: Table) -> str:
    """Return a table as wide as the terminal; without a terminal, so wide that no name is broken."""
    terminal = Console().is_terminal
    text = StringIO()
    Console(file=text, force_terminal=terminal, width=None if terminal else 10_000).print(table)
    return text.getvalue().removesuffix("\n")
