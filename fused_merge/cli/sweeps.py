"""The commands that load a model: they score it at many ratios, or find ratios for its parts."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from fused_merge.adapt.options import AnswerOptions
from fused_merge.cli.arguments import read_ratios
from fused_merge.cli.output import one_sentence, say, say_result
from fused_merge.cli.parameters import AsJson, Base, Debug, Quiet, Ratios, check_ratios, with_options
from fused_merge.sweep.options import SweepOptions


@with_options(SweepOptions)
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
    *,
    quiet: Quiet = False,
    json_output: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Score a model at many ratios in one process, and show which ones no other one beats."""
    check_ratios(ratios, ratios_file)
    if not (options["scorers"] or options["tasks"]):
        raise typer.BadParameter("Missing option '--scorer' or '--task'.")
    with one_sentence(debug=debug, json_output=json_output, resumes=True):
        from fused_merge.sweep.evaluate import sweep_checkpoints

        wanted = ratios if ratios_file is None else read_ratios(ratios_file)
        # What scorers print is no result.
        with redirect_stdout(sys.stderr):
            files = sweep_checkpoints(base, tuned, wanted, out, **options, progress=not quiet)
        document = json.loads(files[0].read_bytes()) | {"files": [str(file) for file in files]}
        say_result(files, document, json_output=json_output, quiet=quiet)


@with_options(AnswerOptions)
def adapt(
    base: Base,
    tuned: Annotated[
        Path, typer.Argument(help="Hugging Face folder with a tokenizer, trained further: ratio 1, and what answers.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="Text with a prompt in each line, or .jsonl with a 'prompt' in each object.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write ratios.json and model/ to.")],
    parts_file: Annotated[
        Path | None, typer.Option(help="Parts and first ratios, as ratios.json has them; instead of --parts.")
    ] = None,
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

        if parts_file is not None:
            options["parts"] = LayerRatios.load(parts_file)
        # What a reward prints is no result.
        with redirect_stdout(sys.stderr):
            folder = adapt_checkpoints(base, tuned, read_prompts(prompts), out, **options, progress=not quiet)
        found = LayerRatios.load(out / RATIOS)
        document = {"path": str(folder), "ratios": dict(zip(found.parts, found.ratios, strict=True))}
        say_result([folder], document, json_output=json_output, quiet=quiet)
        if not (json_output or quiet):
            say(str(found))
