"""The progress display: what is running, how far it is, and the time left for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from report import Point
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from settings import ADDED_TAU, RATIOS, Setting

# Seconds on two quiet cores: the weights of the stages in the overall bar.
COST = {"base": 42, "sft": 18, "pairs": 8, "dpo": 13, "measure": 1.5}


def _planned(setting: Setting) -> float:
    swept = [run for run in setting.runs if run.role == "adamw"]
    per_seed = 3 * COST["measure"] + COST["base"] + COST["sft"] + len(setting.starts) * COST["pairs"]
    measured = len(setting.runs) + len(swept) * (len(RATIOS) + len(ADDED_TAU))
    per_order = len(setting.runs) * COST["dpo"] + measured * COST["measure"]
    per_seed += len(setting.starts) * len(ADDED_TAU) * COST["measure"]
    return len(setting.seeds) * (per_seed + len(setting.orders) * per_order)


class Board:
    """Two bars: the whole experiment, and the stage that runs; each finished stage leaves a line."""

    def __init__(self, setting: Setting) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<48}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        )
        self._all = self._progress.add_task(f"alignment tax, {setting.name}", total=round(_planned(setting)))

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, what: str, kind: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Show one stage; yields the function to call after each of its `steps`."""
        task = self._progress.add_task(what, total=steps)

        def advance() -> None:
            self._progress.advance(task)
            self._progress.advance(self._all, COST[kind] / steps)

        yield advance
        self._progress.remove_task(task)

    def measured(self, point: Point) -> None:
        """Print one result above the bars."""
        self._progress.advance(self._all, COST["measure"])
        self._progress.console.print(
            f"seed {point.seed}  {point.label:<40} reward {point.reward:.2f}  "
            f"exact match {point.exact_match:.3f}  perplexity {point.perplexity:.2f}",
            highlight=False,
            soft_wrap=True,
        )
