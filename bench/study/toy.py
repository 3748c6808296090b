"""The demo's world: its tokenizer, texts, tasks, reward, base and SFT, for two CPU cores."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from data import build_tokenizer, chat_lines, chat_prompts, documents, reward
from evaluate import Examination
from plan import Size
from settings import SFT_SHARE
from train import new_model, sft_batches, train_base, train_sft
from transformers import LlamaForCausalLM
from worlds import Batch, Start, write_data

import fused_merge as fm

# Two layers have no thirds and no sixths; attention and the two halves of an MLP do. What is outside the layers goes
# with its neighbor; the head is tied to the embeddings.
SLICES = (
    r"model\.embed_tokens\..*|model\.layers\.0\.(input_layernorm|self_attn)\..*",
    r"model\.layers\.0\.(post_attention_layernorm|mlp\.(gate|up)_proj)\..*",
    r"model\.layers\.0\.mlp\.down_proj\..*",
    r"model\.layers\.1\.(input_layernorm|self_attn)\..*",
    r"model\.layers\.1\.(post_attention_layernorm|mlp\.(gate|up)_proj)\..*",
    r"model\.layers\.1\.mlp\.down_proj\..*|model\.norm\..*",
)


@dataclass(frozen=True)
class Toy:
    """The world of `bench/alignment_tax`."""

    out: Path
    size: Size

    def prepare(self, seed: int) -> None:
        """Train base and SFT as the demo does, and let the start answer."""
        folder = self.out / f"seed{seed}"
        if folder.exists():
            return
        staging = folder.with_name(folder.name + ".part")
        shutil.rmtree(staging, ignore_errors=True)
        tokenizer, text = build_tokenizer(), documents(held_out=False)
        model = new_model(tokenizer, seed)
        train_base(model, tokenizer, text, self.size.base_steps, seed, lambda: None)
        model.save_pretrained(staging / "base")
        base = copy.deepcopy(model.state_dict())
        train_sft(model, tokenizer, chat_lines(text), self.size.sft_steps, seed, lambda: None)
        [start] = fm.interpolate(base, model.state_dict(), [SFT_SHARE])
        model.load_state_dict(start)
        model.save_pretrained(staging / "sft")
        for name in ("base", "sft"):
            tokenizer.save_pretrained(staging / name)
        prompts = chat_prompts(chat_lines(text), self.size.prompts, seed=seed)
        write_data(self._open(seed, staging), prompts)
        staging.rename(folder)

    def start(self, seed: int) -> Start:
        """Open the start of a seed."""
        return self._open(seed, self.out / f"seed{seed}")

    def _open(self, seed: int, folder: Path) -> Start:
        tokenizer = build_tokenizer()

        def replay(seed: int) -> Iterator[Batch]:
            lines = chat_lines(documents(held_out=False))
            return sft_batches(tokenizer, lines, 2 * self.size.batch, random.Random(seed))

        return Start(
            seed=seed,
            folder=folder,
            size=self.size,
            tokenizer=tokenizer,
            load=LlamaForCausalLM.from_pretrained,
            examine=Examination(tokenizer, self.size.examined_tasks, self.size.examined_prompts, repeats=1),
            reward=_rewards,
            replay=replay,
            parts=_parts,
        )


def _rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The demo's reward, which does not look at the prompt."""
    return [reward(completion) for completion in completions]


def _parts(count: int, ratio: float) -> fm.LayerRatios:
    """The slices from low to high, so many to a part."""
    width = len(SLICES) // count
    patterns = ["|".join(SLICES[first : first + width]) for first in range(0, len(SLICES), width)]
    with torch.device("meta"):
        names = [name for name, _ in new_model(build_tokenizer(), 0).named_parameters()]
    return fm.LayerRatios.by_patterns(names, dict.fromkeys(patterns, ratio))
