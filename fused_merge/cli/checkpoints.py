"""The commands that write and verify whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from fused_merge.checkpoints.options import FileOptions, InterpolatePlanOptions, RunOptions, StreamOptions
from fused_merge.cli.arguments import parse_model, read_ratios
from fused_merge.cli.output import one_sentence, say, say_plan, say_result
from fused_merge.cli.parameters import AsJson, Base, Debug, DryRun, Quiet, Ratios, Tuned, check_ratios, with_options
from fused_merge.merge.options import MergePlanOptions
from fused_merge.options import options_of, split

if TYPE_CHECKING:
    from fused_merge.checkpoints.job import Job


@with_options(InterpolatePlanOptions, RunOptions)
def interpolate(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option(help="Folder to write r0.10/, r0.20/, ... to.")],
    ratios: Ratios = None,
    ratios_file: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON: {folder name: ratio, or {regular expression on tensor names: ratio}}."),
    ] = None,
    *,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Write base + r * (tuned - base) for many ratios r from one read of the two checkpoints."""
    check_ratios(ratios, ratios_file)
    with one_sentence(debug=debug, json_output=json_output, resumes=not dry_run):
        from fused_merge.checkpoints.interpolate import plan_interpolation

        wanted = ratios if ratios_file is None else read_ratios(ratios_file)
        plan, run = split(options, InterpolatePlanOptions, RunOptions)
        job = plan_interpolation(base, tuned, wanted, out, **plan)
        if dry_run:
            say_plan(job.describe(), json_output=json_output, quiet=quiet)
            return
        folders = job.run(**run, progress=not quiet)
        ratio_of = dict(zip(job.outputs, wanted.values() if isinstance(wanted, dict) else wanted, strict=True))
        document = [{"ratio": ratio_of[folder], "path": str(folder)} for folder in folders]
        say_result(folders, document, json_output=json_output, quiet=quiet)


@with_options(MergePlanOptions, StreamOptions)
def merge(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="A configuration of mergekit; or give --base.")
    ] = None,
    folder: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder to write; or give --out.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model: safetensors file or folder; linear has none.")
    ] = None,
    model: Annotated[
        list[Any] | None,
        typer.Option("--model", parser=parse_model, metavar="PATH=WEIGHT", help="A model to merge; may be repeated."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="How to merge, such as linear or ties.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    *,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Merge several models into one, as CONFIG.yaml of mergekit says or as the options do."""
    target = out or folder
    if out is not None and folder is not None:
        raise typer.BadParameter("OUT and --out exclude each other; give one")
    if config is not None:
        said_by_config = [name for name in options_of(MergePlanOptions) if name not in options_of(FileOptions)]
        for name in ("base", "model", "method", *said_by_config):
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise typer.BadParameter(f"--{name.replace('_', '-')} is for {config} to say; leave one of them out")
    elif not model or method is None:
        missing = "method" if model else "model"
        raise typer.BadParameter(f"--{missing} is missing; give --base, --model and --method, or CONFIG.yaml")
    if target is None:
        raise typer.BadParameter("--out is missing; give the folder to write")
    models = dict(model or [])
    if len(models) != len(model or []):
        raise typer.BadParameter("a --model is given twice; give each one weight")
    files, plan, run = split(options, FileOptions, MergePlanOptions, StreamOptions)
    with one_sentence(debug=debug, json_output=json_output, resumes=not dry_run):
        from fused_merge.merge.merge import plan_merge
        from fused_merge.merge.mergekit import plan_mergekit

        job: Job
        if config is not None:
            job = plan_mergekit(config, target, **files)
        else:
            job = plan_merge(base, models, str(method), target, **plan)
        if dry_run:
            say_plan(job.describe(), json_output=json_output, quiet=quiet)
            return
        folders = job.run(**run, progress=not quiet)
        say_result(folders, {"path": str(target)}, json_output=json_output, quiet=quiet)


def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders that this program wrote.")],
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read every tensor of written folders again and compare it with the checksums that were written with it."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge.checkpoints.folders import verify_checkpoint

        document = []
        for folder in folders:
            read = verify_checkpoint(folder)
            document.append({"path": str(folder), "bytes": read})
            if not (json_output or quiet):
                say(f"{folder}: {decimal(read)}, every tensor as it was written")
        if json_output:
            say(json.dumps(document))
