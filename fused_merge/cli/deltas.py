"""The commands that write and inspect reference deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fused_merge.checkpoints.options import PlanOptions
from fused_merge.cli.output import one_sentence, say, say_result, say_table
from fused_merge.cli.parameters import AsJson, Base, Debug, Tuned, with_options


@with_options(PlanOptions, only=("dtype", "overwrite"))
def delta(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option(help="File to write.")],
    reserve_rate: Annotated[float | None, typer.Option(help="Share of each tensor to keep.")] = None,
    method: Annotated[str | None, typer.Option(help="What to keep: random, magnitude or soft_threshold.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random masks.")] = 0,
    *,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Write the reference delta tuned - base to a file, dense or sparse, for the optimizers to read."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge.delta.reference_delta import ReferenceDelta

        if out.exists() and not options["overwrite"]:
            raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or choose another")
        tau = ReferenceDelta.from_checkpoints(base, tuned)
        saved = ReferenceDelta.load(tau.save(out, reserve_rate, method, seed, options["dtype"]))
        document = {
            "path": str(out),
            "identity": saved.identity,
            "tensors": len(saved),
            "bytes": out.stat().st_size,
        }
        say_result([out], document, json_output=json_output)


def inspect(
    delta: Annotated[Path, typer.Argument(metavar="DELTA_OR_BASE", help="A saved delta, or the base checkpoint.")],
    tuned: Annotated[
        Path | None, typer.Argument(metavar="TUNED", help="The tuned checkpoint, if the first is a base.")
    ] = None,
    other: Annotated[Path | None, typer.Option(help="Another saved delta, for the overlap of the two.")] = None,
    reserve_rate: Annotated[float | None, typer.Option(help="Show what top-p really keeps at this p.")] = None,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show norms and real density of a reference delta, by tensor and by layer, and its overlap with another."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge.delta.inspection import inspect_delta
        from fused_merge.delta.reference_delta import ReferenceDelta

        tau = ReferenceDelta.load(delta) if tuned is None else ReferenceDelta.from_checkpoints(delta, tuned)
        entries = inspect_delta(
            tau,
            base=None if tuned is None else delta,
            other=None if other is None else ReferenceDelta.load(other),
            reserve_rate=reserve_rate,
        )
        if json_output:
            say(json.dumps(entries))
            return
        table = Table(box=None)
        for key in entries[0]:
            table.add_column(key, justify="left" if key in ("scope", "name") else "right", overflow="fold")
        for entry in entries:
            cells = ("-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in entry.values())
            table.add_row(*cells)
        say_table(table)
