"""A real model with real data: base -> SFT -> preferences, on one device or sharded over several."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl
from data import TASKS, Example
from datasets import Dataset
from evaluate import Weights
from plan import ALGORITHMS, SEARCHED_PARTS, Size
from real_data import Row, answered, pairs_of, preference_rows, task_rows
from real_scores import Examination, Reward, few_shot_tasks
from training import common_arguments, whole_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
)
from worlds import Batch, Start, from_first, is_first, processes, wait_for_all, write_data

import fused_merge as fm

SFT_LR = 1e-5  # of the SFT and of the reward model, one epoch each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a real model needs to be told; each has one meaning, and without --model there is none of it."""
    real = parser.add_argument_group("a real model", "instead of the toy; see README.md")
    real.add_argument("--model", help="the base: a folder or a name of the Hub")
    real.add_argument("--dataset", help="preferences: a folder, a .json file, or NAME[:SPLIT] of the Hub")
    real.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    real.add_argument("--sft", help="a finished SFT of the base; default: made from one half of the dataset")
    real.add_argument("--reward", help="a reward model; default: made from the same half")
    real.add_argument(
        "--tasks", help="a dataset of prompt and answer; default: the toy's tasks with four examples each"
    )
    real.add_argument("--text", type=Path, help="a file for the perplexity; default: Python's help texts")
    real.add_argument("--lr", type=float, default=1e-6, help="of DPO, the others in proportion; default: 1e-6")
    real.add_argument("--steps", type=int, default=64, help="of each training; default: 64")
    real.add_argument("--batch", type=int, default=64, help="pairs or answers in a step; default: 64")
    real.add_argument("--micro-batch", type=int, default=4, help="of these at once on a device; default: 4")
    real.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer; default: 1024")
    real.add_argument("--new-tokens", type=int, default=256, help="longest answer in tokens; default: 256")


def from_arguments(arguments: argparse.Namespace, size: Size, out: Path) -> Real:
    """The world that the command line describes, with a size for it."""
    if arguments.dataset is None:
        raise SystemExit("--model needs --dataset, the preferences to train on")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; train on the CPU with --device cpu")
    count = processes()
    if count > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        raise SystemExit(
            "several processes share a model by FSDP2: accelerate launch --config_file bench/study/fsdp2.yaml"
        )
    at_once = arguments.micro_batch * count
    if arguments.batch % math.lcm(4, at_once):
        raise SystemExit(
            f"--batch {arguments.batch} must be a multiple of 4, GRPO's answers to a prompt, and of {at_once}, "
            "--micro-batch times the number of processes"
        )
    if arguments.new_tokens >= arguments.max_length:
        raise SystemExit(f"--max-length {arguments.max_length} must be more than --new-tokens {arguments.new_tokens}")
    size = replace(
        size,
        steps=arguments.steps,
        batch=arguments.batch,
        micro_batch=arguments.micro_batch,
        warmup=arguments.steps // 10,
        prompts=arguments.steps * arguments.batch,  # one pass
        samples=4,
        new_tokens=arguments.new_tokens,
        max_length=arguments.max_length,
        generation_batch=64,
        generated_at_once=4 * arguments.batch,
    )
    names = ("model", "dataset", "device", "sft", "reward", "tasks", "text", "lr")
    return Real(out, size, **{name: getattr(arguments, name) for name in names})


@dataclass(frozen=True)
class Real:
    """The world of a causal language model of Transformers and a dataset of preferences.

    Attributes:
        out: the folder of the study.
        size: how much is run.
        model: the base; a folder, or a name of the Hub.
        dataset: a preference dataset as TRL takes it, in strings or conversations.
        device: where everything happens; with several processes each has its own.
        sft: a finished SFT of the base, or None to make one.
        reward: a model with one output, or None to train one.
        tasks: a dataset of `prompt` and `answer`, or None for the toy's tasks.
        text: what the perplexity is taken of, or None for Python's help texts.
        lr: of DPO; the other algorithms keep their ratio to it.
    """

    out: Path
    size: Size
    model: str
    dataset: str
    device: str = "cuda"
    sft: str | None = None
    reward: str | None = None
    tasks: str | None = None
    text: Path | None = None
    lr: float = 1e-6

    def prepare(self, seed: int) -> None:
        """Write base, SFT, reward model and data of a seed.

        All processes train together; all else is done by the first.
        """
        folder = self.out / f"seed{seed}"
        if from_first(folder.exists()):
            return
        staging = folder.with_name(folder.name + ".part")
        tokenizer = self._tokenizer()
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
            _save(self._pretrained(self.model), tokenizer, staging / "base")
            _parts(staging / "base", max(SEARCHED_PARTS), 1.0)  # raises now, not after the first training
            (staging / "rows.json").write_text(json.dumps(self.split(tokenizer, seed)) + "\n")
        wait_for_all()
        rows = json.loads((staging / "rows.json").read_text())
        self._make_sft(tokenizer, rows["sft"], seed, staging)
        if self.reward is None:
            self._make_reward(tokenizer, rows["sft"], seed, staging)
        if is_first():
            prompts = [row["prompt"] for row in rows["preferences"]]
            write_data(self._open(seed, staging), prompts, pairs_of(rows["preferences"]))
            shutil.rmtree(staging / "trainer", ignore_errors=True)
            staging.rename(folder)
        wait_for_all()

    def start(self, seed: int) -> Start:
        """Open the start of a seed."""
        return self._open(seed, self.out / f"seed{seed}")

    # ------------------------------------------------------------ what prepare makes

    def _tokenizer(self) -> Any:
        """The tokenizer of the SFT, which knows the chat template, else of the base."""
        tokenizer = AutoTokenizer.from_pretrained(self.sft or self.model, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _pretrained(self, name: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    def split(self, tokenizer: Any, seed: int) -> dict[str, list[Row]]:
        """Held-out prompts, the same for every seed; of the others one half for SFT, the other for preferences."""
        size = self.size
        rows = preference_rows(self.dataset, tokenizer, size.max_length - size.new_tokens)
        if len(rows) < size.examined_prompts + 2:
            raise SystemExit(
                f"{self.dataset} has {len(rows)} different prompts that leave room for --new-tokens in --max-length; "
                f"{size.examined_prompts} are held out and two more needed; use a larger dataset or --max-length"
            )
        random.Random(0).shuffle(rows)
        held_out, rows = rows[: size.examined_prompts], rows[size.examined_prompts :]
        random.Random(seed).shuffle(rows)
        half = len(rows) // 2
        return {"examined": held_out, "sft": rows[:half], "preferences": rows[half:][: size.prompts]}

    def _make_sft(self, tokenizer: Any, rows: list[Row], seed: int, staging: Path) -> None:
        if self.sft is None:
            answered = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
            model = self._pretrained(staging / "base").to(self.device)
            weights = self._fit(trl.SFTTrainer, trl.SFTConfig, model, tokenizer, answered, seed, staging / "trainer")
        if is_first():
            if self.sft is None:
                model = self._pretrained(staging / "base")
                model.load_state_dict(weights, strict=False)
            else:
                model = self._pretrained(self.sft)
                _check_same_tensors(model, self._pretrained(staging / "base"), self.sft, self.model)
            _save(model, tokenizer, staging / "sft")
        wait_for_all()

    def _make_reward(self, tokenizer: Any, rows: list[Row], seed: int, staging: Path) -> None:
        def load(name: str, **options: Any) -> Any:
            return AutoModelForSequenceClassification.from_pretrained(
                staging / name, num_labels=1, dtype=torch.float32, **options
            )

        if is_first():
            model, loaded = load("sft", output_loading_info=True)
            # The head is new. What Transformers fills it with depends on more than a seed.
            generator = torch.Generator().manual_seed(seed)
            for name in sorted(loaded["missing_keys"]):
                torch.nn.init.normal_(model.get_parameter(name), std=0.02, generator=generator)
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            model.save_pretrained(staging / "reward")
            tokenizer.save_pretrained(staging / "reward")
        wait_for_all()
        model, pairs, work = load("reward").to(self.device), pairs_of(rows), staging / "trainer"
        weights = self._fit(trl.RewardTrainer, trl.RewardConfig, model, tokenizer, pairs, seed, work)
        if is_first():
            model = load("reward")
            model.load_state_dict(weights, strict=False)
            model.save_pretrained(staging / "reward")
        wait_for_all()

    def _fit(
        self, trainer_class: Any, config: Any, model: Any, tokenizer: Any, rows: list[Row], seed: int, work: Path
    ) -> Weights:
        """One epoch on rows of strings."""
        common = common_arguments(self.size, self.device, processes(), work)
        arguments = config(
            num_train_epochs=1, learning_rate=SFT_LR, max_length=self.size.max_length, seed=seed, **common
        )
        trainer = trainer_class(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return whole_weights(trainer.model)

    # ------------------------------------------------------------ what a start knows

    def _load(self, folder: Path) -> Any:
        # Trainers and models refer to one another in circles; this one may need the memory of those before.
        gc.collect()
        return self._pretrained(folder).to(self.device)

    def _examined_tasks(self) -> list[Example]:
        if self.tasks is None:
            return few_shot_tasks(self.size.examined_tasks)
        own = task_rows(self.tasks, AutoTokenizer.from_pretrained(self.sft or self.model))
        return own[: len(TASKS) * self.size.examined_tasks]

    def _open(self, seed: int, folder: Path) -> Start:
        tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
        # Prompts are rendered; nobody shall do it again.
        tokenizer.chat_template = None
        rows = json.loads((folder / "rows.json").read_text())
        asked = [*rows["examined"], *rows["preferences"]]
        reward = Reward(self.reward or folder / "reward", self.reward is None, tokenizer, asked, self.size, self.device)

        def replay(seed: int) -> Iterator[Batch]:
            rng = random.Random(seed)
            while True:
                yield answered(tokenizer, rng.choices(rows["sft"], k=self.size.micro_batch), self.size.max_length)

        examined = [row["prompt"] for row in rows["examined"]]
        return Start(
            seed=seed,
            folder=folder,
            size=self.size,
            tokenizer=tokenizer,
            load=self._load,
            examine=Examination(tokenizer, self.size, examined, reward, self._examined_tasks(), self.text),
            reward=reward,
            replay=replay,
            parts=lambda count, ratio: _parts(folder / "sft", count, ratio),
            device=self.device,
            processes=processes(),
            lr_factor=self.lr / ALGORITHMS["dpo"].lr,
        )


# ---------------------------------------------------------------- checkpoints


def _parts(checkpoint: Path, count: int, ratio: float) -> fm.LayerRatios:
    """The network cut by depth, all parts at one ratio."""
    try:
        return fm.LayerRatios.by_parts(checkpoint, [ratio] * count)
    except ValueError as error:
        raise SystemExit(
            f"the model cannot be cut into {count} parts ({error}); use one that has as many layers"
        ) from error


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint whose answers are drawn from the whole distribution, whatever its authors preferred."""
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_same_tensors(sft: Any, base: Any, sft_name: str, base_name: str) -> None:
    """Tau is a difference, so both need the same tensors."""
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (sft, base)]
    if different := {name for name, _ in shapes[0].items() ^ shapes[1].items()}:
        raise SystemExit(
            f"{sft_name} and {base_name} differ in {min(different)!r}; --sft takes a fine-tuning of --model with its "
            "layers and vocabulary"
        )
