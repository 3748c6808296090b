"""The commands that load a model: they score it at many ratios, or find ratios for its parts."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from fused_merge.checkpoints.options import PlanOptions, RunOptions
from fused_merge.cli.arguments import read_ratios
from fused_merge.cli.output import one_sentence, say, say_result
from fused_merge.cli.parameters import AsJson, Base, Debug, Quiet, Ratios, check_ratios, with_options


@with_options(PlanOptions, RunOptions, only=("dtype", "device"))
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
        list[str] | None, typer.Option(metavar="NAME", help="Task of the lm-evaluation-harness; may be repeated.")
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Score of which less is better; may be repeated.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULTS.json", help="Another sweep, for the same picture; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of --task.")] = 1,
    *,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Score a model at many ratios in one process, and show which ones no other one beats."""
    check_ratios(ratios, ratios_file)
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
                minimize=minimize or [],
                compare=compare or [],
                batch_size=batch_size,
                progress=not quiet,
                **options,
            )
        document = json.loads(files[0].read_bytes()) | {"files": [str(file) for file in files]}
        say_result(files, document, json_output=json_output, quiet=quiet)


@with_options(PlanOptions, RunOptions, only=("dtype", "device"))
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Temperature of the answers.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers sampled at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the answers.")] = 0,
    *,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
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
                progress=not quiet,
                **options,
            )
        found = LayerRatios.load(out / RATIOS)
        document = {"path": str(folder), "ratios": dict(zip(found.parts, found.ratios, strict=True))}
        say_result([folder], document, json_output=json_output, quiet=quiet)
        if not (json_output or quiet):
            say(str(found))
