"""The alignment tax on a small scale: train it, measure it, merge against it, and draw the picture.

    python bench/alignment_tax/run.py --quick     one seed, a few minutes on two CPU cores
    python bench/alignment_tax/run.py             three seeds x two data orders, with every control

Trains base -> SFT -> DPO for real, once for each optimizer, saves Hugging Face checkpoints, sweeps the
ratios between SFT and the preference-trained model, and measures reward and tax at each point.
"""
# ruff: noqa: E402 - the environment below has to stand before torch and Transformers are imported.

from __future__ import annotations

import argparse
import os
import shutil
import time
import warnings
from dataclasses import astuple, dataclass
from pathlib import Path

THREADS = 2
os.environ.update(
    OMP_NUM_THREADS=str(THREADS),
    OMP_DYNAMIC="FALSE",
    MKL_DYNAMIC="FALSE",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TQDM_DISABLE="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
# TRL still asks Transformers for names that version 6 will drop.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")

import datasets
import torch
import transformers
from board import Board
from data import build_tokenizer, chat_lines, chat_prompts, documents
from evaluate import Examination, Weights, along
from report import Point, write_report
from safetensors.torch import load_file
from settings import ADDED_TAU, FULL, QUICK, RATIOS, SFT_SHARE, Run, Setting
from train import build_optimizer, new_model, preference_pairs, train_base, train_dpo, train_sft
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import fused_merge as fm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, the main methods only")
    parser.add_argument("--out", type=Path, default=Path("out/alignment_tax"), help="folder for everything")
    arguments = parser.parse_args()
    setting = QUICK if arguments.quick else FULL

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it would double the time of the training.
    torch.utils.deterministic.fill_uninitialized_memory = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    # A table never mixes two runs: what an earlier one left is removed.
    shutil.rmtree(arguments.out / "checkpoints", ignore_errors=True)
    began = time.perf_counter()
    with Board(setting) as board:
        points = Experiment(setting, arguments.out, board).run()
    files = write_report(arguments.out, setting, points)
    minutes = (time.perf_counter() - began) / 60
    print((arguments.out / "table.md").read_text())
    print(f"{minutes:.1f} minutes. Checkpoints: {arguments.out / 'checkpoints'}", *files, sep="\n")


@dataclass(frozen=True)
class Start:
    """Where preference training begins: a checkpoint, and the way it came from the base."""

    seed: int
    name: str
    folder: Path
    weights: Weights
    tau: Weights


def open_start(seed: int, name: str, folder: Path) -> Start:
    """Read a start beside the base that it came from."""
    base, weights = read(folder / "base"), read(folder / name)
    return Start(seed, name, folder / name, weights, {key: weights[key] - base[key] for key in weights})


class Experiment:
    """The story, seed by seed; `points` collects what was measured."""

    def __init__(self, setting: Setting, out: Path, board: Board) -> None:
        self.setting = setting
        self.out = out
        self.board = board
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.examine = Examination(self.tokenizer)
        self.text = documents(held_out=False)
        self.points: list[Point] = []

    def run(self) -> list[Point]:
        for seed in self.setting.seeds:
            folder = self.out / "checkpoints" / f"seed{seed}"
            self.train_base_and_sft(seed, folder)
            for start in self.setting.starts:
                self.train_preferences(seed, start, folder)
        return self.points

    def train_base_and_sft(self, seed: int, folder: Path) -> None:
        """Make base/, sft-full/, and sft/, the point between them from which preferences are trained."""
        model = new_model(self.tokenizer, seed)
        with self.board.stage(f"seed {seed}: base", "base", self.setting.base_steps) as advance:
            train_base(model, self.tokenizer, self.text, self.setting.base_steps, seed, advance)
        self.save(model, folder / "base")
        with self.board.stage(f"seed {seed}: SFT", "sft", self.setting.sft_steps) as advance:
            lines = chat_lines(self.text)
            train_sft(model, self.tokenizer, lines, self.setting.sft_steps, seed, advance)
        self.save(model, folder / "sft-full")
        [between] = fm.interpolate_checkpoints(
            folder / "base", folder / "sft-full", ratios=[SFT_SHARE], out=folder, progress=False
        )
        between.rename(folder / "sft")
        start = open_start(seed, "sft", folder)
        for name in ("base", "sft-full", "sft"):
            self.measure(LlamaForCausalLM.from_pretrained(folder / name), start, "checkpoint", name)

    def train_preferences(self, seed: int, name: str, folder: Path) -> None:
        """Sample pairs from one start, then run every preference training that begins there."""
        start = open_start(seed, name, folder)
        model = LlamaForCausalLM.from_pretrained(start.folder)

        # Whoever wants to merge asks this first: is there anything to gain further along tau?
        sweep = fm.RatioSweep(model, folder / "base", start.folder)
        for c in ADDED_TAU:
            with sweep.at(1 + c) as further:
                self.measure(further, start, "pre-check", name, value=c)

        with self.board.stage(f"seed {seed}: preference pairs from {name}", "pairs") as advance:
            prompts = chat_prompts(chat_lines(self.text), self.setting.prompts, seed=seed)
            pairs = preference_pairs(model, self.tokenizer, prompts, seed)
            advance()

        for order in self.setting.orders:
            for run in self.setting.runs_from(name):
                self.train_one(run, start, pairs, order)

    def train_one(self, run: Run, start: Start, pairs: datasets.Dataset, order: int) -> None:
        """One preference training; for AdamW also the line back to the start, and tau added afterwards."""
        target = start.folder.parent / f"order{order}" / f"rlhf-{run.name}"
        model = LlamaForCausalLM.from_pretrained(start.folder)
        optimizer = build_optimizer(run, model, self.reference(run, start), seed=1000 * start.seed + order)
        what = f"seed {start.seed}, order {order}: DPO, {run.name}"
        with self.board.stage(what, "dpo", self.setting.dpo_steps) as advance:
            steps = self.setting.dpo_steps
            train_dpo(model, self.tokenizer, pairs, optimizer, steps, order, target, advance)
        self.save(model, target)
        self.measure(model, start, run.role, run.name, order)
        if run.role == "adamw":
            self.sweep_ratios(model, run, start, target, order)
            self.add_tau_afterwards(model, run, start, target, order)

    def sweep_ratios(self, model: LlamaForCausalLM, run: Run, start: Start, target: Path, order: int) -> None:
        """Measure the line from the start to the trained model; files and memory must agree on it."""
        sweep = fm.RatioSweep(model, start.folder, target)
        folders = fm.interpolate_checkpoints(start.folder, target, ratios=RATIOS, out=target / "sweep", progress=False)
        for ratio, folder in zip(RATIOS, folders, strict=True):
            with sweep.at(ratio) as between:
                written, held = read(folder), weights_of(between)
                if any(not torch.equal(written[key], held[key]) for key in held):
                    raise RuntimeError(f"{folder} does not hold the weights that RatioSweep gives for {ratio}")
                self.measure(between, start, "interpolation", run.name, order, value=ratio)

    def add_tau_afterwards(self, model: LlamaForCausalLM, run: Run, start: Start, target: Path, order: int) -> None:
        """The free control of online merging: train with AdamW, then add c*tau once."""
        trained = read(target)
        sweep = fm.RatioSweep(model, trained, {key: trained[key] + start.tau[key] for key in trained})
        for c in ADDED_TAU:
            with sweep.at(c) as shifted:
                self.measure(shifted, start, "tau afterwards", run.name, order, value=c)

    def reference(self, run: Run, start: Start) -> fm.ReferenceDelta:
        """Tau for the merging optimizers; shuffled within each tensor it keeps its sizes, not its meaning."""
        base_folder = start.folder.parent / "base"
        if run.tau == "sft":
            return fm.ReferenceDelta.from_checkpoints(base_folder, start.folder)
        generator = torch.Generator().manual_seed(start.seed)
        base = read(base_folder)
        shuffled = {
            key: base[key] + tau.flatten()[torch.randperm(tau.numel(), generator=generator)].view_as(tau)
            for key, tau in start.tau.items()
        }
        return fm.ReferenceDelta.from_models(base, shuffled)

    def measure(
        self,
        model: LlamaForCausalLM,
        start: Start,
        role: str,
        run: str,
        order: int | None = None,
        value: float | None = None,
    ) -> None:
        """Examine the model and keep the result."""
        scores = self.examine(model)
        content, cosine = along(start.weights, weights_of(model), start.tau)
        self.points.append(Point(start.seed, order, start.name, role, run, value, *astuple(scores), content, cosine))
        self.board.measured(self.points[-1])

    def save(self, model: LlamaForCausalLM, folder: Path) -> None:
        """Write a checkpoint that any Hugging Face tool opens."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def read(folder: Path) -> Weights:
    """The tensors of a checkpoint."""
    return load_file(folder / "model.safetensors")


def weights_of(model: LlamaForCausalLM) -> Weights:
    """The tensors of a model; tied ones once, as in its checkpoint."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main()
