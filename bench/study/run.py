"""The study: every algorithm, every rival and every way of merging of the two papers, in small.

    python bench/study/run.py --quick    one seed, two algorithms, minutes on two CPU cores
    python bench/study/run.py            all of it: settings chosen on one seed, three others x two data orders
    python bench/study/run.py --model NAME --dataset NAME    the same on a real model: README.md

A run that was killed goes on where it was: every training leaves a file in runs/.
"""
# ruff: noqa: E402 - the environment below has to stand before torch and Transformers are imported.

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

os.environ.update(
    TQDM_DISABLE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
# TRL still asks Transformers for names that version 6 will drop.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
sys.path.insert(0, str(Path(__file__).parents[1] / "alignment_tax"))

import real
import torch
import transformers
from accelerate import PartialState
from plan import ADAMW, CONTENDERS, FULL, QUICK, Contender, Point, Size, middle, trainings
from study_jobs import Job, choose
from study_report import write_report
from toy import Toy
from worlds import World, from_first, is_first, processes, wait_for_all

from fused_merge.progress import progress_bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and data order, two algorithms, nothing chosen")
    parser.add_argument("--out", type=Path, help="folder for everything; out/study, with the model and -quick added")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the toy, trainings at once; CPU cores")
    real.add_arguments(parser)
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    named = f"-{Path(arguments.model).name}" if arguments.model else ""
    out = arguments.out or Path(f"out/study{named}{'-quick' if arguments.quick else ''}")
    world: World
    if arguments.model is None:
        if arguments.dataset is not None:
            parser.error("--dataset needs --model; without it the study trains the toy")
        world, workers = Toy(out, size), arguments.workers
    else:
        if "WORLD_SIZE" in os.environ:
            # The others wait while the first examines, however long that takes.
            PartialState(cpu=arguments.device == "cpu", timeout=timedelta(days=30))
        torch.set_float32_matmul_precision("high")
        world, workers = real.from_arguments(arguments, size, out), 0
        size = world.size
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with Study(world, size, out, workers) as study:
        points, chosen = study.run()
    if is_first():
        files = write_report(out, size, points, chosen)
        print(f"{(time.perf_counter() - began) / 60:.1f} minutes", *files, sep="\n")


def quiet() -> None:
    """What every process of the study begins with."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def begin_worker() -> None:
    """Let a worker take one core, and the same steps every time."""
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it would double the time of the training.
    torch.utils.deterministic.fill_uninitialized_memory = False


def run_job(job: Job) -> None:
    """Run a job, whose words would tear the progress bar."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        job.run()


def after_adamw() -> list[Contender]:
    """What is made of AdamW's run; not BEMA where several processes share it: TRL copies whole models for that."""
    return [c for c in CONTENDERS.values() if c.after_adamw and (c.name != "BEMA" or processes() == 1)]


class Study:
    """Starts, then the choice of settings, then what is measured; `with` keeps its worker processes.

    Without workers everything happens here: a large model has the whole device, or, in a group of processes that all
    run this, its share of every device.
    """

    def __init__(self, world: World, size: Size, out: Path, workers: int) -> None:
        self.world, self.size, self.out = world, size, out
        self.pool: ProcessPoolExecutor | None = None
        if workers:
            # A training of the toy is too small for two threads; two trainings at once are not. One thread each also
            # makes the numbers independent of how many run.
            os.environ["OMP_NUM_THREADS"] = "1"
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=begin_worker)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self) -> tuple[list[Point], dict[tuple[str, str], float]]:
        """Do what is missing; return everything that was measured, and the settings that were chosen."""
        size = self.size
        self._check_folder()
        tuned = [] if size.tuning_seed is None else [size.tuning_seed]
        points = self._finish("starts", [Job(self.world, self.out, seed) for seed in (*size.seeds, *tuned)])
        chosen = {
            (name, contender.name): middle(contender) for name in size.algorithms for contender in CONTENDERS.values()
        }
        if size.tuning_seed is not None:
            every = {contender.name: contender.settings for contender in after_adamw()}
            jobs = [
                Job(self.world, self.out, training.seed, training, every if training.contender == ADAMW else None)
                for training in trainings(size, size.tuning_seed, 0, None)
            ]
            tuning = self._finish("choosing settings", jobs)
            chosen = choose([p for p in points if p.seed == size.tuning_seed] + tuning, size)
            points += tuning
        jobs = []
        for seed in size.seeds:
            for order in size.orders:
                for training in trainings(size, seed, order, chosen):
                    afterwards = {
                        contender.name: (chosen[training.algorithm, contender.name],) for contender in after_adamw()
                    }
                    adamw = training.contender == ADAMW
                    jobs.append(
                        Job(self.world, self.out, seed, training, afterwards if adamw else None, averaged=adamw)
                    )
        # The longest first, so that no worker has to wait for one at the end.
        return points + self._finish("trainings", sorted(jobs, key=lambda job: not job.averaged)), chosen

    def _finish(self, what: str, jobs: Sequence[Job]) -> list[Point]:
        """Run the jobs that are not done; return the points of all, in their order."""
        missing = [jobs[index] for index in from_first([i for i, job in enumerate(jobs) if not job.done])]
        with progress_bar(what, len(jobs), unit="runs", enabled=is_first()) as advance:
            advance(len(jobs) - len(missing))
            for _ in self._run(missing):
                advance(1)
        return [point for job in jobs for point in job.points()]

    def _run(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Run jobs; yield after each."""
        if self.pool is not None:
            for future in as_completed([self.pool.submit(run_job, job) for job in jobs]):
                yield future.result()
            return
        for job in jobs:
            yield run_job(job)

    def _check_folder(self) -> None:
        """One folder holds one study."""
        file = self.out / "setting.json"
        text = json.dumps({"size": asdict(self.size), "world": repr(self.world)}, indent=1) + "\n"
        if file.exists() and file.read_text() != text:
            raise SystemExit(f"{self.out} holds another study; choose another --out, or remove it")
        wait_for_all()
        if is_first():
            file.write_text(text)


if __name__ == "__main__":
    quiet()
    main()
