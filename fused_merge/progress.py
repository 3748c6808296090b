"""The progress bar of everything that takes its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypedDict

from fused_merge.options import Option, definition


@definition
class ProgressOption(TypedDict, total=False):
    """What functions with a progress bar take.

    Options:
        progress: show a progress bar where rich is installed and standard error is a terminal.
    """

    progress: Annotated[bool, Option(True)]


@contextmanager
def progress_bar(
    what: str, total: int, *, unit: str | None = None, enabled: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are done, how fast, and the time left and spent, on standard error.

    With a `unit`, such as `"ratios"`, it counts those instead of bytes. The line is cleared at the end. Nothing is
    shown if not enabled, without rich, and where standard error is not a terminal. Yields the function to call with the
    number of bytes, or of units, that were just done, from any thread.
    """
    try:
        from rich import progress
        from rich.console import Console
        from rich.table import Column
    except ImportError:
        yield lambda done: None
        return
    console = Console(stderr=True)
    whole = Column(no_wrap=True)
    counted: tuple[progress.ProgressColumn, ...]
    if unit is None:
        counted = progress.DownloadColumn(table_column=whole), progress.TransferSpeedColumn(table_column=whole)
    else:
        counted = progress.MofNCompleteColumn(table_column=whole), progress.TextColumn(unit, table_column=whole)
    times = progress.TimeRemainingColumn(table_column=whole), progress.TimeElapsedColumn(table_column=whole)
    # The bar is as wide as the others leave it: a narrow terminal cuts the bar first.
    columns = progress.TextColumn("{task.description}"), progress.BarColumn(bar_width=None), *counted, *times
    disabled = not (enabled and console.is_terminal)
    with progress.Progress(*columns, console=console, transient=True, expand=True, disable=disabled) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
