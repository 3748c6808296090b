"""What a model earns (reward) and what it pays for it (tasks, perplexity)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from data import ROW, chat_lines, chat_prompts, documents, encode_rows, reward, task_answer, task_examples
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    greedy: bool = False,
    new_tokens: int = 40,
    at_once: int = 512,
) -> list[str]:
    """Completions of all prompts; draws from torch's global generator unless `greedy`."""
    completions: list[str] = []
    for start in range(0, len(prompts), at_once):
        inputs = tokenizer(list(prompts[start : start + at_once]), return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=not greedy,
            # None switches off the cut at 50 tokens that Transformers otherwise makes.
            top_k=None,
            max_new_tokens=new_tokens,
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return completions


@dataclass(frozen=True)
class Scores:
    """One point of the picture."""

    reward: float
    exact_match: float
    perplexity: float


class Examination:
    """The same questions for every model: held-out chat prompts, tasks, held-out base text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, per_task: int = 60, prompts: int = 300, repeats: int = 2
    ) -> None:
        text = documents(held_out=True)
        rng = random.Random(3)
        windows = [rng.randrange(len(text) - ROW) for _ in range(256)]
        self.tokenizer = tokenizer
        self.tasks = task_examples(per_task, seed=1)
        self.prompts = repeats * chat_prompts(chat_lines(text), prompts, seed=2)
        self.rows = encode_rows(tokenizer, [text[start : start + ROW] for start in windows])

    @torch.no_grad()
    def __call__(self, model: LlamaForCausalLM) -> Scores:
        """Mean reward at temperature 1, share of tasks answered exactly, perplexity per character."""
        greedy = sample(model, self.tokenizer, [task.prompt for task in self.tasks], greedy=True, new_tokens=20)
        right = [task_answer(text) == task.answer for text, task in zip(greedy, self.tasks, strict=True)]
        # The same random numbers for every model: differences between models carry less noise.
        torch.manual_seed(4)
        drawn = sample(model, self.tokenizer, self.prompts)
        loss = model(input_ids=self.rows, labels=self.rows).loss.item()
        return Scores(sum(map(reward, drawn)) / len(drawn), sum(right) / len(right), math.exp(loss))


def along(start: Weights, end: Weights, tau: Weights) -> tuple[float, float]:
    """How far `end` lies from `start` along tau, in units of tau, and the cosine of the two directions."""
    dot = moved = length = 0.0
    for name, direction in tau.items():
        step = end[name].double() - start[name].double()
        dot += (step * direction).sum().item()
        moved += step.square().sum().item()
        length += direction.double().square().sum().item()
    return dot / length, dot / math.sqrt(moved * length) if moved else 0.0
