"""What the command line prints, and how it fails; `fused_merge.cli` says what scripts may rely on."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from fused_merge.checkpoints.options import InterpolateOptions
from fused_merge.options import options_of

# What a user or a machine can cause; anything else is a bug.
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError, MemoryError)

# Options of functions that commands have too, as error sentences of the library write them.
_ARGUMENT = re.compile(rf"(?<![\w./\\-])({'|'.join(options_of(InterpolateOptions))})=(?:True|'([^']*)'|(\w+))")


@contextmanager
def one_sentence(*, debug: bool, json_output: bool, resumes: bool = False) -> Iterator[None]:
    """Turn every exception into one sentence and an exit code; with `debug`, leave the traceback.

    Args:
        debug: show the traceback.
        json_output: print the sentence on standard output too, as `{"error": sentence}`.
        resumes: whether an interrupted command goes on where it stopped when it is given again.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _fail("interrupted" + "; run the same command again to go on from there" * resumes, 130, json_output)
    except Exception as error:
        sentence = _sentence(error)
        if not debug:
            _fail(sentence, 1, json_output)
        if json_output:
            say(json.dumps({"error": sentence}))
        raise


def _fail(sentence: str, code: int, json_output: bool) -> NoReturn:
    if json_output:
        say(json.dumps({"error": sentence}))
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(code)


def _sentence(error: Exception) -> str:
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


def say_result(paths: Sequence[Path], document: Any, *, json_output: bool, quiet: bool = False) -> None:
    """Print the paths that were written, one per line, or `document` as JSON."""
    if json_output:
        say(json.dumps(document))
    elif not quiet and paths:
        say("\n".join(map(str, paths)))


def say_plan(plan: Mapping[str, Any], *, json_output: bool, quiet: bool) -> None:
    """Print what a job would do; `plan` is the result of `Job.describe`."""
    if json_output:
        say(json.dumps(plan))
    elif not quiet:
        table = Table(box=None)
        table.add_column("folder", overflow="fold")
        table.add_column("files", justify="right")
        table.add_column("size", justify="right")
        files: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for file in plan["files"]:
            folder = str(Path(file["path"]).parent)
            files[folder] += 1
            sizes[folder] += file["bytes"]
        for folder in files:
            table.add_row(folder, str(files[folder]), decimal(sizes[folder]))
        say_table(table)
        say(f"reads {decimal(plan['bytes_read'])}, writes {decimal(plan['bytes_written'])}")


def say_table(table: Table) -> None:
    """Print a table, as wide as the terminal; without a terminal, so wide that no name is broken."""
    terminal = Console().is_terminal
    text = StringIO()
    Console(file=text, force_terminal=terminal, width=None if terminal else 10_000).print(table)
    say(text.getvalue().removesuffix("\n"))
