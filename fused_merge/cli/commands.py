"""The commands of `fused-merge`.

A command imports what it runs when it runs, so that help and completion answer without waiting for torch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Column, Table
from typer import Argument, BadParameter, Option

from fused_merge._version import __version__
from fused_merge.adapt.options import AnswerOptions
from fused_merge.checkpoints.options import InterpolatePlanOptions, PlanOptions, RunOptions, StreamOptions
from fused_merge.cli import parameters as p
from fused_merge.cli.output import plan_lines, say, table_text
from fused_merge.cli.parameters import Result, command
from fused_merge.io.options import DeltaOptions
from fused_merge.merge.options import MergekitOptions, MergePlanOptions
from fused_merge.names import some
from fused_merge.options import options_of, resolve, select, split
from fused_merge.sweep.options import SweepOptions

# What the driver of a GPU says about itself, NVIDIA's and AMD's.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


@command(InterpolatePlanOptions, RunOptions, resumes=True)
def interpolate(
    base: p.Base,
    tuned: p.Tuned,
    out: Annotated[Path, Option(help="Folder to write r0.10/, r0.20/, ... to.")],
    ratios: p.Ratios = None,
    ratios_file: p.RatiosFile = None,
    *,
    dry_run: p.DryRun = False,
    quiet: p.Quiet = False,
    **options: Any,
) -> Result:
    """Write base + r * (tuned - base) for many ratios r from one read of the two checkpoints."""
    wanted = p.wanted_ratios(ratios, ratios_file)
    from fused_merge.checkpoints.interpolate import plan_interpolation

    plan, run = split(options, InterpolatePlanOptions, RunOptions)
    job = plan_interpolation(base, tuned, wanted, out, **plan)
    if dry_run:
        return job.describe(), plan_lines(job.describe())
    folders = job.run(**run, progress=not quiet)
    written = zip(wanted.values() if isinstance(wanted, dict) else wanted, folders, strict=True)
    return [{"ratio": ratio, "path": str(folder)} for ratio, folder in written], map(str, folders)


@command(MergePlanOptions, StreamOptions, resumes=True)
def merge(
    context: typer.Context,
    config: Annotated[
        Path | None, Argument(metavar="CONFIG.yaml", help="A configuration of mergekit; or give --base.")
    ] = None,
    folder: Annotated[Path | None, Argument(metavar="OUT", help="Folder to write; or give --out.")] = None,
    base: Annotated[
        str | None,
        Option(help="The base model: safetensors file or folder; linear has none, and nuslerp may do without."),
    ] = None,
    model: Annotated[
        list[Any] | None,
        Option("--model", parser=p.parse_model, metavar="PATH=WEIGHT", help="A model to merge; may be repeated."),
    ] = None,
    method: Annotated[str | None, Option(help="How to merge, such as linear or ties.")] = None,
    out: Annotated[Path | None, Option(help="Folder to write.")] = None,
    *,
    dry_run: p.DryRun = False,
    quiet: p.Quiet = False,
    **options: Any,
) -> Result:
    """Merge several models into one, as CONFIG.yaml of mergekit says or as the options do."""
    if out is not None and folder is not None:
        raise BadParameter("OUT and --out exclude each other; give one")
    if config is not None:
        for name in ("base", "model", "method", *options_of(MergePlanOptions)):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT" and name not in options_of(MergekitOptions):
                raise BadParameter(f"--{name.replace('_', '-')} is for {config} to say; leave one of them out")
    elif not model or method is None:
        missing = "method" if model else "model"
        raise BadParameter(f"--{missing} is missing; give --base, --model and --method, or CONFIG.yaml")
    target = out or folder
    if target is None:
        raise BadParameter("--out is missing; give the folder to write")
    models = dict(model or [])
    if len(models) != len(model or []):
        raise BadParameter("a --model is given twice; give each one weight")
    from fused_merge.merge.merge import plan_merge
    from fused_merge.merge.mergekit import plan_mergekit

    beside, plan, run = split(options, MergekitOptions, MergePlanOptions, StreamOptions)
    job = (
        plan_merge(base, models, str(method), target, **plan)
        if config is None
        else plan_mergekit(config, target, **beside)
    )
    if dry_run:
        return job.describe(), plan_lines(job.describe())
    return {"path": str(target)}, map(str, job.run(**run, progress=not quiet))


@command(SweepOptions, resumes=True)
def sweep(
    base: p.Base,
    tuned: Annotated[Path, Argument(help="Hugging Face folder, trained further: ratio 1, and the model to load.")],
    out: Annotated[Path, Option(help="Folder to write results.json, results.md and pareto.png to.")],
    ratios: p.Ratios = None,
    ratios_file: p.RatiosFile = None,
    *,
    quiet: p.Quiet = False,
    **options: Any,
) -> Result:
    """Score a model at many ratios in one process, and show which ones no other one beats."""
    if not (options["scorers"] or options["tasks"]):
        raise BadParameter("Missing option '--scorer' or '--task'.")
    wanted = p.wanted_ratios(ratios, ratios_file)
    from fused_merge.sweep.evaluate import sweep_checkpoints

    # What scorers print is no result.
    with redirect_stdout(sys.stderr):
        files = sweep_checkpoints(base, tuned, wanted, out, **options, progress=not quiet)
    return json.loads(files[0].read_bytes()) | {"files": list(map(str, files))}, map(str, files)


@command(AnswerOptions, resumes=True)
def adapt(
    base: p.Base,
    tuned: Annotated[
        Path, Argument(help="Hugging Face folder with a tokenizer, trained further: ratio 1, and what answers.")
    ],
    prompts: Annotated[Path, Option(help="Text with a prompt in each line, or .jsonl with a 'prompt' in each object.")],
    out: Annotated[Path, Option(help="Folder to write ratios.json and model/ to.")],
    parts_file: Annotated[
        Path | None, Option(help="Parts and first ratios, as ratios.json has them; instead of --parts.")
    ] = None,
    *,
    quiet: p.Quiet = False,
    **options: Any,
) -> Result:
    """Find a ratio for each part of the network on the tuned model's own answers, and write that model."""
    from fused_merge.adapt.answers import RATIOS, adapt_checkpoints, read_prompts
    from fused_merge.interpolation.layer_ratios import LayerRatios

    if parts_file is not None:
        options["parts"] = LayerRatios.load(parts_file)
    # What a reward prints is no result.
    with redirect_stdout(sys.stderr):
        folder = adapt_checkpoints(base, tuned, read_prompts(prompts), out, **options, progress=not quiet)
    found = LayerRatios.load(folder.parent / RATIOS)
    ratios = dict(zip(found.parts, found.ratios, strict=True))
    return {"path": str(folder), "ratios": ratios}, (str(folder), str(found))


@command(DeltaOptions, PlanOptions, only=(*options_of(DeltaOptions), "dtype", "overwrite"))
def delta(
    base: p.Base,
    tuned: p.Tuned,
    out: Annotated[Path, Option(help="File to write.")],
    reserve_rate: Annotated[float | None, Option(help="Share of each tensor to keep.")] = None,
    method: Annotated[str | None, Option(help="What to keep: random, magnitude or soft_threshold.")] = None,
    seed: Annotated[int, Option(help="Seed of the random masks.")] = 0,
    **options: Any,
) -> Result:
    """Write the reference delta tuned - base to a file, dense or sparse, for the optimizers to read."""
    from fused_merge.delta.reference_delta import ReferenceDelta

    if out.exists() and not options["overwrite"]:
        raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or choose another")
    tau = ReferenceDelta.from_checkpoints(base, tuned, **select(options, DeltaOptions))
    saved = ReferenceDelta.load(tau.save(out, reserve_rate, method, seed, options["dtype"]))
    size = out.stat().st_size
    document = {"path": str(out), "identity": saved.identity, "tensors": len(saved), "ordered": saved.ordered}
    return document | {"bytes": size}, [str(out)]


@command()
def verify(
    folders: Annotated[list[Path], Argument(metavar="FOLDER", help="Folders that this program wrote.")],
    quiet: p.Quiet = False,
) -> Result:
    """Read every tensor of written folders again and compare it with the checksums that were written with it."""
    from fused_merge.checkpoints.folders import verify_checkpoint

    document = []

    def verified() -> Iterator[str]:
        for folder in folders:
            read = verify_checkpoint(folder)
            document.append({"path": str(folder), "bytes": read})
            yield f"{folder}: {decimal(read)}, every tensor as it was written"

    return document, verified()


@command(DeltaOptions)
def inspect(
    delta: Annotated[Path, Argument(metavar="DELTA_OR_BASE", help="A saved delta, or the base checkpoint.")],
    tuned: Annotated[
        Path | None, Argument(metavar="TUNED", help="The tuned checkpoint, if the first is a base.")
    ] = None,
    other: Annotated[Path | None, Option(help="Another saved delta, for the overlap of the two.")] = None,
    reserve_rate: Annotated[float | None, Option(help="Show what top-p really keeps at this p.")] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Draw it by layer and kind of tensor, as .png or .svg.")
    ] = None,
    pairing: Annotated[bool, Option("--pairing", help="Show which tensors of BASE and TUNED belong together.")] = False,
    **options: Any,
) -> Result:
    """Show norms and real density of a reference delta, by tensor and by layer, and its overlap with another."""
    if pairing:
        if plot is not None:
            raise BadParameter("--plot and --pairing exclude each other; give one")
        if tuned is None:
            raise BadParameter("--pairing needs BASE and TUNED")
        return _pairing(delta, tuned, options)
    from fused_merge.delta.inspection import inspect_delta
    from fused_merge.delta.reference_delta import ReferenceDelta

    tau = ReferenceDelta.load(delta) if tuned is None else ReferenceDelta.from_checkpoints(delta, tuned, **options)
    base, another = None if tuned is None else delta, None if other is None else ReferenceDelta.load(other)
    entries = inspect_delta(tau, base=base, other=another, reserve_rate=reserve_rate, plot=plot)
    table = Table(box=None)
    for key in entries[0]:
        table.add_column(key, justify="left" if key in ("scope", "name") else "right", overflow="fold")
    for entry in entries:
        cells = ("-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in entry.values())
        table.add_row(*cells)
    return entries, [table_text(table), *([] if plot is None else [str(plot)])]


def _pairing(base: Path, tuned: Path, options: dict[str, Any]) -> Result:
    """Return what belongs together in two checkpoints, and why they cannot be combined, if they cannot."""
    from fused_merge.io.match import explain
    from fused_merge.io.sources import open_files

    try:
        found = explain(
            open_files(base, role="base"), open_files(tuned, role="tuned"), **resolve(options, DeltaOptions)
        )
        entries, refused = found.report(), list(found.faults)
    except ValueError as error:
        entries, refused = [], [str(error)]
    table = Table("kind", Column("tensors", justify="right"), Column("size", justify="right"), "such as", box=None)
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        own = [entry for entry in entries if entry["kind"] == kind]
        names = dict.fromkeys(filter(None, (some(own[0][side], shown=1) for side in ("first", "second"))))
        table.add_row(kind, str(len(own)), decimal(sum(entry["bytes"] for entry in own)), " with ".join(names))
    lines = [table_text(table)] if entries else []
    return {"tensors": entries, "refused": refused}, lines + [f"refused: {sentence}" for sentence in refused]


@command()
def env() -> Result:
    """Show versions, machine and what runs here: for bug reports."""
    report = environment()
    table = Table(show_header=False, box=None)
    for key, value in report.items():
        for part, text in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{key} {part}".strip(), "none" if text in (None, []) else str(text))
    return report, [table_text(table)]


def environment() -> dict[str, Any]:
    """Return versions, machine, GPUs, and what `impl="auto"` runs here and why."""
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
    from fused_merge.functional import backend

    try:
        chosen = backend.resolve("auto", device)
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
    reason = backend.why_not_triton(device) if device.type != "cpu" else None
    return f"{chosen} ({reason})" if reason else chosen


def _print_version(asked: bool) -> None:
    if asked:
        say(f"fused-merge {__version__}")
        raise typer.Exit


app = typer.Typer(
    help="Merge language models while they train, or along the path between two checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _fused_merge(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for each in (interpolate, sweep, adapt, merge, delta, verify, inspect, env):
    app.command()(each)
