"""Averaging before and after preference training, by depth: which part matters, and what does a search find?

    python bench/adaptive_averaging/run.py             three seeds, 14 minutes on two busy CPU cores
    python bench/adaptive_averaging/run.py --record    the same, recorded in bench/results/adaptive_averaging
    python bench/adaptive_averaging/run.py --quick     does it run at all? Seconds, and numbers of no meaning

Trains base -> SFT -> DPO for each seed as the demo does, measures reward and tax between the last two at one ratio for
all, with one third of the layers averaged, and at the ratios that `fused_merge.adapt_ratios` finds.
"""
# ruff: noqa: E402 - the environment below has to stand before torch and Transformers are imported.

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

THREADS = 2
os.environ.update(
    OMP_NUM_THREADS=str(THREADS),
    OMP_DYNAMIC="FALSE",
    MKL_DYNAMIC="FALSE",
    # On a busy machine threads that wait by spinning take the cores from those they wait for.
    OMP_WAIT_POLICY="PASSIVE",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TQDM_DISABLE="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
# TRL still asks Transformers for names that version 6 will drop.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
# The models, data, trainings and measures are the demo's.
sys.path.append(str(Path(__file__).parents[1] / "alignment_tax"))

import datasets
import torch
import transformers
from averaging import Point, measure_between
from data import build_tokenizer
from evaluate import Examination
from experiment import Setting, parse_arguments
from fronts import write_report
from pair import train_pair
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def main() -> None:
    arguments = parse_arguments(__doc__)
    setting = arguments.setting

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it would double the time of the training.
    torch.utils.deterministic.fill_uninitialized_memory = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    # A table never mixes two runs: what an earlier one left is removed.
    shutil.rmtree(arguments.out / "checkpoints", ignore_errors=True)
    wall, cores = time.perf_counter(), time.process_time()
    points = run(setting, arguments.out / "checkpoints")
    files = write_report(arguments.out, setting, points)
    if arguments.record:
        results = Path(__file__).parents[1] / "results" / "adaptive_averaging"
        results.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, results)
    wall, cores = time.perf_counter() - wall, time.process_time() - cores
    print((arguments.out / "table.md").read_text())
    print(f"{wall / 60:.1f} minutes, {cores / 60:.1f} of processor time.", *files, sep="\n")


def run(setting: Setting, checkpoints: Path) -> list[Point]:
    """Train two models for each seed, and measure what lies between them."""
    tokenizer = build_tokenizer()
    examine = Examination(tokenizer, setting.tasks, setting.examined_prompts)
    points = []
    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        for seed in setting.seeds:

            @contextmanager
            def stage(what: str, steps: int, seed: int = seed) -> Iterator[Callable[[], None]]:
                task = progress.add_task(f"seed {seed}: {what}", total=steps)
                yield lambda: progress.advance(task)
                progress.remove_task(task)

            model = train_pair(tokenizer, setting, seed, checkpoints / f"seed{seed}", stage)
            with stage("averaging", setting.points) as advance:
                ends = (checkpoints / f"seed{seed}" / name for name in ("sft", "rlhf"))
                for point in measure_between(model, *ends, examine, setting, seed):
                    advance()
                    progress.console.print(
                        f"seed {seed}  {point.family:<18} {point.ratio:<4} reward {point.reward:.2f}  "
                        f"exact match {point.exact_match:.3f}  perplexity {point.perplexity:.2f}",
                        highlight=False,
                        soft_wrap=True,
                    )
                    points.append(point)
    return points


if __name__ == "__main__":
    main()
