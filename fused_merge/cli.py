"""The command `fused-merge`.

Exit codes: 0, 1 with one sentence on standard error, 2 for wrong usage.
"""

# No `from __future__ import annotations`: typer reads the annotations of functions defined inside another.

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

# What the driver of a GPU says about itself, NVIDIA's and AMD's.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def main() -> None:
    """Run the command line."""
    try:
        app = _app()
    except ModuleNotFoundError as error:
        print(f"fused-merge needs {error.name}: pip install 'fused_merge[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app()


def environment() -> dict[str, Any]:
    """Return what a bug report needs: versions, machine, GPUs, and what `impl="auto"` runs here and why."""
    import torch

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    driver = next((path for path in _DRIVERS if path.is_file()), None)
    return {
        **{name: _version(name) for name in ("fused_merge", "torch", "triton", "numpy", "safetensors")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(device) for device in devices[1:]],
        "driver": driver.read_text().splitlines()[0] if driver else None,
        "FUSED_MERGE_IMPL": os.environ.get("FUSED_MERGE_IMPL"),
        "impl": {str(device): _impl(device) for device in devices},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _impl(device: Any) -> str:
    from fused_merge import backend

    try:
        chosen = backend.resolve("auto", device)
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
    reason = backend.why_not_triton(device) if device.type != "cpu" else None
    return f"{chosen} ({reason})" if reason else chosen


@contextmanager
def _one_sentence(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one sentence and exit code 1; with `debug`, leave the traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _app() -> "typer.Typer":
    import typer
    from rich.console import Console
    from rich.table import Table

    app = typer.Typer(
        help="Merge language models while they train, or along a line between two checkpoints.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    as_json = typer.Option("--json", help="Print JSON on standard output.")
    with_traceback = typer.Option("--debug", help="Show the traceback of an error.")

    def parse_ratios(text: str) -> list[float]:
        try:
            return [float(part) for part in text.split(",")]
        except ValueError as error:
            raise typer.BadParameter(f"{error}; write numbers with commas, such as 0.1,0.2") from error

    @app.command()
    def interpolate(
        base: Annotated[Path, typer.Argument(help="Safetensors file or Hugging Face folder at ratio 0.")],
        tuned: Annotated[Path, typer.Argument(help="The same at ratio 1.")],
        ratios: Annotated[Any, typer.Option(parser=parse_ratios, metavar="R,R,...", help="Such as 0.1,0.2.")],
        out: Annotated[Path, typer.Option(help="Folder to write r0.10/, r0.20/, ... to.")],
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace folders that exist.")] = False,
        impl: Annotated[str, typer.Option(help="auto, triton or eager.")] = "auto",
        json_output: Annotated[bool, as_json] = False,
        debug: Annotated[bool, with_traceback] = False,
    ) -> None:
        """Write base + r * (tuned - base) for many ratios r from one read of the two checkpoints."""
        from fused_merge.checkpoints import interpolate_checkpoints

        with _one_sentence(debug):
            folders = interpolate_checkpoints(base, tuned, ratios, out, overwrite=overwrite, impl=impl)
        if json_output:
            print(json.dumps([{"ratio": r, "path": str(f)} for r, f in zip(ratios, folders, strict=True)]))
        else:
            print(*folders, sep="\n")

    @app.command()
    def inspect(
        delta: Annotated[Path, typer.Argument(metavar="DELTA_OR_BASE", help="A saved delta, or the base checkpoint.")],
        tuned: Annotated[
            Path | None, typer.Argument(metavar="TUNED", help="The tuned checkpoint, if the first is a base.")
        ] = None,
        other: Annotated[Path | None, typer.Option(help="Another saved delta: overlap of the two.")] = None,
        reserve_rate: Annotated[float | None, typer.Option(help="Show what top-p really keeps at this p.")] = None,
        json_output: Annotated[bool, as_json] = False,
        debug: Annotated[bool, with_traceback] = False,
    ) -> None:
        """Show norms and real density of a reference delta, by tensor and by layer, and its overlap with another."""
        from fused_merge.inspection import inspect_delta
        from fused_merge.reference_delta import ReferenceDelta

        with _one_sentence(debug):
            tau = ReferenceDelta.load(delta) if tuned is None else ReferenceDelta.from_checkpoints(delta, tuned)
            rows = inspect_delta(
                tau,
                base=None if tuned is None else delta,
                other=None if other is None else ReferenceDelta.load(other),
                reserve_rate=reserve_rate,
            )
        if json_output:
            print(json.dumps(rows))
            return
        table = Table(box=None)
        for key in rows[0]:
            table.add_column(key, justify="left" if key in ("scope", "name") else "right", overflow="fold")
        for row in rows:
            table.add_row(
                *(
                    "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
                    for cell in row.values()
                )
            )
        Console().print(table)

    @app.command()
    def env(json_output: Annotated[bool, as_json] = False) -> None:
        """Show versions, machine and what runs here: for bug reports."""
        report = environment()
        if json_output:
            print(json.dumps(report))
            return
        table = Table(show_header=False, box=None)
        for key, value in report.items():
            rows = value.items() if isinstance(value, dict) else [("", value)]
            for part, text in rows:
                table.add_row(f"{key} {part}".strip(), "none" if text in (None, []) else str(text))
        Console().print(table)

    return app
