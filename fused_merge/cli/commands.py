"""The commands of `fused-merge` and their options.

Each imports what it runs when it runs: help and completion answer without waiting for torch.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from fused_merge._version import __version__
from fused_merge.cli import environment
from fused_merge.cli.arguments import parse_model, parse_ratios, parse_worker, read_ratios
from fused_merge.cli.output import one_sentence, say, say_plan, say_result, say_table

if TYPE_CHECKING:
    from fused_merge.checkpoints import Job

app = typer.Typer(
    help="Merge language models while they train, or along a line between two checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Options that several commands have.
Base = Annotated[Path, typer.Argument(help="Safetensors file or Hugging Face folder: ratio 0.")]
Tuned = Annotated[Path, typer.Argument(help="The same, trained further: ratio 1.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or float64.", show_default="as stored")]
Ratios = Annotated[
    Any, typer.Option(parser=parse_ratios, metavar="R,R,...", help="Such as 0.1,0.2 or 0:1:0.1, end included.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]
ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Largest file to write, such as 5GB.", show_default="sharded as the base"),
]
Worker = Annotated[
    Any,
    typer.Option(
        "--worker",
        "--workers",
        parser=parse_worker,
        metavar="I/N",
        help="Do the I-th part of N; all N write to one place.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="That read, compute and write.", show_default="5 for 2 cores")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Of all buffers, such as 256MB.", show_default="80MiB")
]
Device = Annotated[str, typer.Option(help="Where to compute, such as cuda:0.")]
Impl = Annotated[str, typer.Option(help="auto, triton or eager.")]
Verify = Annotated[bool, typer.Option("--verify", help="Read back and compare all that was written.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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


def _check_one(ratios: list[float] | None, ratios_file: Path | None) -> None:
    if ratios is None and ratios_file is None:
        raise typer.BadParameter("Missing option '--ratios' or '--ratios-file'.")
    if ratios is not None and ratios_file is not None:
        raise typer.BadParameter("--ratios and --ratios-file exclude each other; give one")


@app.command()
def interpolate(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option(help="Folder to write r0.10/, r0.20/, ... to.")],
    ratios: Ratios = None,
    ratios_file: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON: {folder name: ratio, or {regular expression on tensor names: ratio}}."),
    ] = None,
    dtype: Dtype = None,
    unmatched: Annotated[str, typer.Option(help="Tensors that only one side holds: refuse, copy or drop.")] = "refuse",
    align_vocabulary: Annotated[
        bool, typer.Option("--align-vocabulary", help="Copy rows of embeddings that only one side has.")
    ] = False,
    files_from: Annotated[str, typer.Option(help="Whose configuration and tokenizer: tuned or base.")] = "tuned",
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    worker: Worker = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    impl: Impl = "auto",
    verify: Verify = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write base + r * (tuned - base) for many ratios r from one read of the two checkpoints."""
    _check_one(ratios, ratios_file)
    with one_sentence(debug=debug, json_output=json_output, resumes=not dry_run):
        from fused_merge import checkpoints

        wanted = ratios if ratios_file is None else read_ratios(ratios_file)
        job = checkpoints.plan_interpolation(
            base,
            tuned,
            wanted,
            out,
            dtype=dtype,
            unmatched=unmatched,
            align_vocabulary=align_vocabulary,
            files_from=files_from,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        if dry_run:
            say_plan(job.describe(), json_output=json_output, quiet=quiet)
            return
        folders = job.run(
            threads=threads,
            max_memory=max_memory,
            device=device,
            impl=impl,
            verify=verify,
            progress=not quiet,
        )
        ratio_of = dict(zip(job.outputs, wanted.values() if isinstance(wanted, dict) else wanted, strict=True))
        document = [{"ratio": ratio_of[folder], "path": str(folder)} for folder in folders]
        say_result(folders, document, json_output=json_output, quiet=quiet)


@app.command()
def sweep(
    base: Base,
    tuned: Annotated[
        Path, typer.Argument(help="Hugging Face folder, trained further: ratio 1, and the model to load.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write results.json, results.md and pareto.png to.")],
    ratios: Ratios = None,
    ratios_file: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON: {label: ratio, or {regular expression on tensor names: ratio}}."),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Takes (model) or (model, tokenizer), returns a number or {name: number}; may be repeated.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of the lm-evaluation-harness; may be repeated.")
    ] = None,
    minimise: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A score of which less is better; may be repeated.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULTS.json", help="Another sweep, for the same picture; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of --task.")] = 1,
    dtype: Dtype = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a model at many ratios in one process, and show which ones no other one beats."""
    _check_one(ratios, ratios_file)
    if not (scorer or task):
        raise typer.BadParameter("Missing option '--scorer' or '--task'.")
    with one_sentence(debug=debug, json_output=json_output, resumes=True):
        from fused_merge.sweep.evaluate import sweep_checkpoints

        # What scorers print is no result.
        with redirect_stdout(sys.stderr):
            files = sweep_checkpoints(
                base,
                tuned,
                ratios if ratios_file is None else read_ratios(ratios_file),
                out,
                scorers=scorer or [],
                tasks=task or [],
                minimise=minimise or [],
                compare=compare or [],
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                progress=not quiet,
            )
        document = json.loads(files[0].read_bytes()) | {"files": [str(file) for file in files]}
        say_result(files, document, json_output=json_output, quiet=quiet)


@app.command()
def adapt(
    base: Base,
    tuned: Annotated[
        Path, typer.Argument(help="Hugging Face folder with a tokenizer, trained further: ratio 1, and what answers.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="Text with a prompt in each line, or .jsonl with a 'prompt' in each object.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write ratios.json and model/ to.")],
    mean_ratio: Annotated[float, typer.Option(help="Mean of the ratios over the parts.")] = 0.4,
    parts: Annotated[int, typer.Option(min=1, help="Equal slices of the layers, each with a ratio of its own.")] = 3,
    parts_file: Annotated[
        Path | None, typer.Option(help="Parts and first ratios, as ratios.json has them; instead of --parts.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the ratios.")] = 100,
    lr: Annotated[float, typer.Option(help="How far a ratio may move in the first step.")] = 0.05,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A function of a list of (prompt, answer) that returns a number for each; only the best are kept.",
        ),
    ] = None,
    best: Annotated[float, typer.Option(help="Share of the answers to keep, with --reward.")] = 0.4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the answers.")] = 0,
    dtype: Dtype = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find a ratio for each part of the network on the tuned model's own answers, and write that model."""
    with one_sentence(debug=debug, json_output=json_output, resumes=True):
        from fused_merge.adapt.answers import RATIOS, adapt_checkpoints, read_prompts
        from fused_merge.interpolation.layer_ratios import LayerRatios

        # What a reward prints is no result.
        with redirect_stdout(sys.stderr):
            folder = adapt_checkpoints(
                base,
                tuned,
                read_prompts(prompts),
                out,
                mean_ratio=mean_ratio,
                parts=parts if parts_file is None else LayerRatios.load(parts_file),
                steps=steps,
                lr=lr,
                reward=reward,
                best=best,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                batch_size=batch_size,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=not quiet,
            )
        found = LayerRatios.load(out / RATIOS)
        document = {"path": str(folder), "ratios": dict(zip(found.parts, found.ratios, strict=True))}
        say_result([folder], document, json_output=json_output, quiet=quiet)
        if not (json_output or quiet):
            say(str(found))


@app.command()
def merge(
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
    density: Annotated[float | None, typer.Option(help="Share of each delta to keep.")] = None,
    normalize: Annotated[bool | None, typer.Option(help="Divide by the sum of the weights.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", "--lambda", help="Factor of the merged delta.")] = None,
    rescale: Annotated[bool | None, typer.Option(help="Divide what a random drop keeps by the density.")] = None,
    trim: Annotated[str | None, typer.Option(help="Choose the largest of each tensor or of a whole model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random masks.")] = None,
    dtype: Dtype = None,
    unmatched: Annotated[
        str | None, typer.Option(help="Tensors that not all hold: refuse, copy or drop.", show_default="refuse")
    ] = None,
    align_vocabulary: Annotated[
        bool, typer.Option("--align-vocabulary", help="Copy rows of embeddings that not all have.")
    ] = False,
    files_from: Annotated[
        str | None,
        typer.Option(help="Whose configuration and tokenizer: base or a model as given.", show_default="base"),
    ] = None,
    max_shard_size: ShardSize = None,
    overwrite: Overwrite = False,
    worker: Worker = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    verify: Verify = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge several models into one, as CONFIG.yaml of mergekit says or as the options do."""
    target = out or folder
    if out is not None and folder is not None:
        raise typer.BadParameter("OUT and --out exclude each other; give one")
    recipe = {
        "base": base,
        "model": model or None,
        "method": method,
        "density": density,
        "normalize": normalize,
        "scale": scale,
        "rescale": rescale,
        "trim": trim,
        "seed": seed,
        "dtype": dtype,
        "unmatched": unmatched,
        "align_vocabulary": align_vocabulary or None,
        "files_from": files_from,
    }
    given: dict[str, Any] = {name: value for name, value in recipe.items() if value is not None}
    if config is not None and given:
        raise typer.BadParameter(
            f"--{next(iter(given)).replace('_', '-')} is for {config} to say; leave one of them out"
        )
    if config is None and (missing := [name for name in ("model", "method") if name not in given]):
        raise typer.BadParameter(f"--{missing[0]} is missing; give --base, --model and --method, or CONFIG.yaml")
    if target is None:
        raise typer.BadParameter("--out is missing; give the folder to write")
    if len(dict(given.get("model", []))) != len(given.get("model", [])):
        raise typer.BadParameter("a --model is given twice; give each one weight")
    with one_sentence(debug=debug, json_output=json_output, resumes=not dry_run):
        from fused_merge import merge as merging

        job: Job
        shared: dict[str, Any] = {"max_shard_size": max_shard_size, "overwrite": overwrite}
        if config is not None:
            job = merging.plan_mergekit(config, target, **shared)
        else:
            models = dict(given.pop("model"))
            job = merging.plan_merge(given.pop("base", None), models, given.pop("method"), target, **given, **shared)
        if dry_run:
            say_plan(job.describe(), json_output=json_output, quiet=quiet)
            return
        folders = job.run(
            threads=threads,
            max_memory=max_memory,
            device=device,
            verify=verify,
            progress=not quiet,
        )
        say_result(folders, {"path": str(target)}, json_output=json_output, quiet=quiet)


@app.command()
def delta(
    base: Base,
    tuned: Tuned,
    out: Annotated[Path, typer.Option(help="File to write.")],
    reserve_rate: Annotated[float | None, typer.Option(help="Keep this share of each tensor.")] = None,
    method: Annotated[str | None, typer.Option(help="What to keep: random, magnitude or soft_threshold.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random masks.")] = 0,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the reference delta tuned - base to a file, dense or sparse, for the optimizers to read."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge.delta.reference_delta import ReferenceDelta

        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or choose another")
        tau = ReferenceDelta.from_checkpoints(base, tuned)
        saved = ReferenceDelta.load(tau.save(out, reserve_rate, method, seed, dtype))
        document = {
            "path": str(out),
            "identity": saved.identity,
            "tensors": len(saved),
            "bytes": out.stat().st_size,
        }
        say_result([out], document, json_output=json_output)


@app.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders that this program wrote.")],
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read every tensor of written folders again and compare it with the checksums that were written with it."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge import checkpoints

        document = []
        for folder in folders:
            read = checkpoints.verify_checkpoint(folder)
            document.append({"path": str(folder), "bytes": read})
            if not (json_output or quiet):
                say(f"{folder}: {decimal(read)}, every tensor as it was written")
        if json_output:
            say(json.dumps(document))


@app.command()
def inspect(
    delta: Annotated[Path, typer.Argument(metavar="DELTA_OR_BASE", help="A saved delta, or the base checkpoint.")],
    tuned: Annotated[
        Path | None, typer.Argument(metavar="TUNED", help="The tuned checkpoint, if the first is a base.")
    ] = None,
    other: Annotated[Path | None, typer.Option(help="Another saved delta: overlap of the two.")] = None,
    reserve_rate: Annotated[float | None, typer.Option(help="Show what top-p really keeps at this p.")] = None,
    json_output: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show norms and real density of a reference delta, by tensor and by layer, and its overlap with another."""
    with one_sentence(debug=debug, json_output=json_output):
        from fused_merge.delta.inspection import inspect_delta
        from fused_merge.delta.reference_delta import ReferenceDelta

        tau = ReferenceDelta.load(delta) if tuned is None else ReferenceDelta.from_checkpoints(delta, tuned)
        rows = inspect_delta(
            tau,
            base=None if tuned is None else delta,
            other=None if other is None else ReferenceDelta.load(other),
            reserve_rate=reserve_rate,
        )
        if json_output:
            say(json.dumps(rows))
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
        say_table(table)


@app.command()
def env(json_output: AsJson = False, debug: Debug = False) -> None:
    """Show versions, machine and what runs here: for bug reports."""
    with one_sentence(debug=debug, json_output=json_output):
        report = environment()
        if json_output:
            say(json.dumps(report))
            return
        table = Table(show_header=False, box=None)
        for key, value in report.items():
            rows = value.items() if isinstance(value, dict) else [("", value)]
            for part, text in rows:
                table.add_row(f"{key} {part}".strip(), "none" if text in (None, []) else str(text))
        say_table(table)
