"""What is measured between two models: one ratio for all, ratios by depth, and ratios that are searched for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from data import chat_lines, chat_prompts, documents, reward
from evaluate import Examination
from experiment import PARTS, Setting
from transformers import LlamaForCausalLM

import fused_merge as fm
from fused_merge.adapt.answers import answer_batches, best_answers, sample_answers

UNIFORM = "uniform"  # one ratio for all

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Point:
    """One measured model: `ratio` is the mean over its parts, or that of the only part that is averaged."""

    seed: int
    family: str
    ratio: float
    ratios: tuple[float, ...]
    reward: float
    exact_match: float
    perplexity: float
    answer_loss: float


def one_part(part: str) -> str:
    """The family in which one third is averaged."""
    return f"{part} third alone"


def adaptive(parts: int) -> str:
    """The family of the ratios found for so many parts."""
    return f"adaptive, K = {parts}"


def answers_to_learn(model: LlamaForCausalLM, examine: Examination, setting: Setting, seed: int) -> list[Batch]:
    """The model's own best-rewarded answers, which the search makes likely: the paper's proxy for the reward.

    They answer training topics, and no prompt that the reward is measured on.
    """
    tokenizer, measured = examine.tokenizer, set(examine.prompts)
    prompts = chat_prompts(chat_lines(documents(held_out=False)), setting.answers, seed=1000 + seed)
    prompts = [prompt for prompt in prompts if prompt not in measured]
    answers = sample_answers(
        model, tokenizer, prompts, max_new_tokens=40, batch_size=512, seed=1000 + seed, progress=False
    )
    best = best_answers(answers, [reward(answer.text) for answer in answers], setting.best)
    return answer_batches(best, batch_size=64, padding=tokenizer.pad_token_id)


def measure_between(
    model: LlamaForCausalLM, sft: Path, tuned: Path, examine: Examination, setting: Setting, seed: int
) -> Iterator[Point]:
    """Measure every family in one resident model, point by point; no checkpoint is written.

    Args:
        model: holds the weights of `tuned`, and does so again at the end.
        sft: the checkpoint before preference training, ratio 0.
        tuned: the one after it, ratio 1.
        examine: what every model is asked.
        setting: the ratios.
        seed: of the answers that the search learns from.
    """
    answers = answers_to_learn(model, examine, setting, seed)
    # The search writes to the model itself, so all ratios are found before any is measured.
    planned = list(_planned(model, sft, tuned, answers, setting))
    sweep = fm.RatioSweep(model, sft, tuned)
    with sweep.at(1.0):
        for family, ratio, ratios in planned:
            sweep.move_to(ratios)
            scores = examine(model)
            yield Point(seed, family, ratio, ratios.ratios, *astuple(scores), _mean_loss(model, answers))


def _planned(
    model: LlamaForCausalLM, sft: Path, tuned: Path, answers: list[Batch], setting: Setting
) -> Iterator[tuple[str, float, fm.LayerRatios]]:
    """Yield family, ratio and ratios by depth of every model to measure."""
    for ratio in setting.uniform_ratios:
        yield UNIFORM, ratio, fm.LayerRatios.by_parts(model, [ratio])
    for k, part in enumerate(PARTS):
        for ratio in setting.part_ratios:
            alone = [ratio if other == k else 1.0 for other in range(len(PARTS))]
            yield one_part(part), ratio, fm.LayerRatios.by_parts(model, alone)
    for parts in setting.searched:
        for mean in setting.mean_ratios:
            found = fm.adapt_ratios(
                model,
                sft,
                tuned,
                fm.answer_loss,
                answers,
                mean_ratio=mean,
                parts=parts,
                steps=setting.search_steps,
                progress=False,
            )
            yield adaptive(parts), mean, found


@torch.no_grad()
def _mean_loss(model: LlamaForCausalLM, answers: list[Batch]) -> float:
    """What the search makes small, over all of its answers."""
    return sum(fm.answer_loss(model, batch).item() for batch in answers) / len(answers)
