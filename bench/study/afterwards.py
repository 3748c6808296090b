"""What needs no further training: merging after AdamW, and averages of the start and what AdamW has trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evaluate import Weights
from plan import MEAN_RATIO, OBJECTIVES, PART_RATIOS, SEARCHED_PARTS, UNIFORM_RATIOS
from worlds import Start, weights_in

import fused_merge as fm
from fused_merge.adapt.answers import Answer, answer_batches, best_answers, sample_answers

THIRDS = ("low", "middle", "high")


def merged(contender: str, setting: float, start: Start, trained: Path, work: Path) -> Weights:
    """The start and a trained checkpoint merged, or tau added to it.

    The models of TIES and DARE are deltas to the base, and have half the weight each.
    """
    if contender == "+ c tau":
        return {name: tensor + setting * start.tau[name] for name, tensor in weights_in(trained).items()}
    base, sft = start.folder / "base", start.folder / "sft"
    if contender == "linear merge":
        [out] = fm.interpolate_checkpoints(sft, trained, ratios=[setting], out=work, progress=False)
        return weights_in(out)
    method = {"TIES merge": "ties", "DARE merge": "dare_linear"}[contender]
    models = {sft: 0.5, trained: 0.5}
    options = {"density": setting, "seed": start.seed, "progress": False}
    return weights_in(fm.merge_checkpoints(base, models, method, work / f"{method}{setting:g}", **options))


# ---------------------------------------------------------------- ratios by part


def averages(start: Start, trained: Path, seed: int) -> Iterator[tuple[str, float, fm.LayerRatios]]:
    """Yield family, ratio and ratios by part of every average to measure; ratio 1 is what was trained.

    Args:
        start: ratio 0.
        trained: the checkpoint of ratio 1.
        seed: of the answers that the search learns from.
    """
    for ratio in UNIFORM_RATIOS:
        yield "uniform", ratio, start.parts(1, ratio)
    thirds = start.parts(3, 1.0)
    for k, part in enumerate(THIRDS):
        for ratio in PART_RATIOS:
            yield f"{part} third", ratio, thirds.replace([ratio if other == k else 1.0 for other in range(3)])
    model = start.model(weights_in(trained))
    search = _Search(model, start, trained, seed)
    for objective in OBJECTIVES:
        for parts in SEARCHED_PARTS:
            yield f"adaptive, K = {parts}, {objective}", MEAN_RATIO, search(parts, objective)


class _Search:
    """Finds ratios by one objective or another, from the same answers of the trained model."""

    def __init__(self, model: Any, start: Start, trained: Path, seed: int) -> None:
        self.model, self.start, self.trained, self.seed = model, start, trained, seed
        size = start.size
        self.prompts = start.data["prompts"][: size.answers]
        answers = sample_answers(
            model,
            start.tokenizer,
            self.prompts,
            max_new_tokens=size.new_tokens,
            batch_size=size.generation_batch,
            seed=seed,
            progress=False,
        )
        prompts = start.tokenizer.batch_decode([answer.prompt for answer in answers], skip_special_tokens=True)
        rewards = start.reward(prompts, [answer.text for answer in answers])
        self.batches = {
            "likelihood": self._batches(answers),
            "best answers": self._batches(best_answers(answers, rewards, size.best)),
        }

    def __call__(self, parts: int, objective: str) -> fm.LayerRatios:
        """The ratios found; the model holds the trained weights before and after."""
        size = self.start.size
        options: dict[str, Any] = {"mean_ratio": MEAN_RATIO, "parts": self.start.parts(parts, MEAN_RATIO)}
        options |= {"progress": False, "seed": self.seed}
        models = self.model, self.start.folder / "sft", self.trained
        if objective == "reward":
            prompts = [self.prompts[: size.reward_search_answers]]
            steps = size.reward_search_steps
            return fm.adapt_ratios(*models, self._no_reward, prompts, gradients=False, steps=steps, lr=0.4, **options)
        return fm.adapt_ratios(*models, fm.answer_loss, self.batches[objective], steps=size.search_steps, **options)

    def _batches(self, answers: list[Answer]) -> list[dict[str, torch.Tensor]]:
        padding = self.start.tokenizer.pad_token_id
        return answer_batches(answers, batch_size=32, padding=padding, device=self.start.device)

    def _no_reward(self, model: Any, prompts: list[str]) -> torch.Tensor:
        """Minus the mean reward of answers drawn from the model, with the same random numbers every time."""
        answers = self.start.answers(model, prompts, self.seed)
        return -torch.tensor(self.start.reward(prompts, answers)).mean()
