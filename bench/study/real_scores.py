"""What a real model earns and keeps: a reward model, tasks for any tokenizer, held-out text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from data import TASKS, Example, documents
from evaluate import Scores, sample
from plan import Size
from real_data import Row, user
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SHOTS = 4  # solved examples before each toy task
WINDOW = 128  # tokens of held-out text whose perplexity is taken together
WINDOWS = 256


class Examination:
    """The same questions for every model: held-out prompts, tasks, held-out text."""

    def __init__(
        self, tokenizer: Any, size: Size, prompts: list[str], reward: Reward, tasks: list[Example], text: Path | None
    ) -> None:
        self.tokenizer, self.size, self.prompts, self.reward, self.tasks = tokenizer, size, prompts, reward, tasks
        self.answer_tokens = 8 + max(len(tokenizer(task.answer)["input_ids"]) for task in tasks)
        self.windows = _windows(tokenizer, text)

    @torch.no_grad()
    def __call__(self, model: Any) -> Scores:
        """Mean reward at temperature 1, share of tasks whose first line is the answer, perplexity per token."""
        at_once = self.size.generation_batch
        asked = [task.prompt for task in self.tasks]
        tokens = self.answer_tokens
        greedy = sample(model, self.tokenizer, asked, greedy=True, new_tokens=tokens, at_once=at_once)
        right = [first_line(text) == task.answer.strip() for text, task in zip(greedy, self.tasks, strict=True)]
        # The same random numbers for every model: differences between models carry less noise.
        torch.manual_seed(4)
        drawn = sample(model, self.tokenizer, self.prompts, new_tokens=self.size.new_tokens, at_once=at_once)
        rewards = self.reward(self.prompts, drawn)
        loss = 0.0
        for rows in self.windows.split(16):
            rows = rows.to(model.device)
            loss += len(rows) / len(self.windows) * model(input_ids=rows, labels=rows).loss.item()
        return Scores(sum(rewards) / len(rewards), sum(right) / len(right), math.exp(loss))


class Reward:
    """A model with one output as a function of prompts and completions.

    One that the study has trained reads what it was trained on, the rendered prompt and the completion. Another gets
    the conversation in its own template, or, where it has none, prompt and completion as a pair.
    """

    def __init__(
        self, name: str | Path, own: bool, tokenizer: Any, rows: Sequence[Row], size: Size, device: str
    ) -> None:
        self.name, self.own, self.size, self.device = name, own, size, device
        # A prompt also comes back from tokens, without those of the chat template.
        plain = tokenizer.batch_decode(
            tokenizer([row["prompt"] for row in rows])["input_ids"], skip_special_tokens=True
        )
        self.asked = {key: row for text, row in zip(plain, rows, strict=True) for key in (text, row["prompt"])}

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer, loaded when they are first needed."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = AutoModelForSequenceClassification.from_pretrained(self.name, dtype=dtype).to(self.device).eval()
        if model.config.num_labels != 1:
            raise SystemExit(f"{self.name} has {model.config.num_labels} outputs; --reward takes a model with one")
        tokenizer = AutoTokenizer.from_pretrained(self.name, padding_side="right", truncation_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One number for each completion."""
        model, tokenizer = self.loaded
        rewards: list[float] = []
        for first in range(0, len(prompts), self.size.generation_batch):
            chosen = slice(first, first + self.size.generation_batch)
            inputs = self._read(tokenizer, [self.asked[prompt] for prompt in prompts[chosen]], completions[chosen])
            rewards += model(**inputs.to(model.device)).logits[:, 0].float().tolist()
        return rewards

    def _read(self, tokenizer: Any, rows: list[Row], completions: Sequence[str]) -> Any:
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        if self.own:
            texts = [row["prompt"] + text + tokenizer.eos_token for row, text in zip(rows, completions, strict=True)]
            return tokenizer(texts, **options)
        if tokenizer.chat_template is None:
            return tokenizer([row["prompt"] for row in rows], list(completions), **options)
        texts = [
            tokenizer.apply_chat_template(
                [*(row["messages"] or [user(row["prompt"])]), {"role": "assistant", "content": text}], tokenize=False
            )
            for row, text in zip(rows, completions, strict=True)
        ]
        return tokenizer(texts, add_special_tokens=False, **options)


def few_shot_tasks(per_task: int) -> list[Example]:
    """The toy's tasks as plain text that any model can go on with: lines `copy hhf = hhf`, the last without answer."""
    rng = random.Random(1)
    examples = []
    for name, make in TASKS.items():
        for _ in range(per_task):
            solved = [f"{name} {question} = {answer}" for question, answer in (make(rng) for _ in range(SHOTS))]
            question, answer = make(rng)
            examples.append(Example("\n".join([*solved, f"{name} {question} ="]), answer))
    return examples


def first_line(text: str) -> str:
    """What counts as the answer."""
    return text.strip().partition("\n")[0].strip()


def _windows(tokenizer: Any, file: Path | None) -> torch.Tensor:
    """Rows of WINDOW tokens from the beginning of a text."""
    text = documents(held_out=True) if file is None else file.read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(WINDOWS, len(ids) // WINDOW)
    if not count:
        raise SystemExit(f"{file} has {len(ids)} tokens, fewer than a window of {WINDOW}; give --text a longer file")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
