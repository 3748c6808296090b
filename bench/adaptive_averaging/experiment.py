"""What is run: sizes, seeds and ratios, and the model that is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from settings import RATIOS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PARTS = ("low", "middle", "high")  # thirds by depth, as in the paper's figure


@dataclass(frozen=True)
class Setting:
    """Sizes, seeds and ratios. Ratio 0 is the model before preference training, 1 the one after it."""

    name: str
    seeds: tuple[int, ...]
    mean_ratios: tuple[float, ...]  # of the search; one ratio for all is measured there too
    more_ratios: tuple[float, ...]  # further ratios for all, beside 0 and 1
    part_ratios: tuple[float, ...]  # of one third, while the others stay at 1
    searched: tuple[int, ...] = (2, 3, 6)
    layers: int = 6
    hidden: int = 64
    mlp: int = 192
    heads: int = 4
    base_steps: int = 800
    sft_steps: int = 300
    dpo_steps: int = 100
    prompts: int = 700
    answers: int = 640
    best: float = 0.4  # the share of these answers that the search learns from, as in the paper
    search_steps: int = 30
    tasks: int = 60
    examined_prompts: int = 300

    @property
    def uniform_ratios(self) -> tuple[float, ...]:
        """Every ratio at which the whole network is measured."""
        return tuple(sorted({0.0, *self.mean_ratios, *self.more_ratios, 1.0}))

    @property
    def points(self) -> int:
        """How many models are measured for each seed."""
        parts, searched = len(PARTS) * len(self.part_ratios), len(self.searched) * len(self.mean_ratios)
        return len(self.uniform_ratios) + parts + searched


FULL = Setting(
    "full", seeds=(0, 1, 2), mean_ratios=(0.2, 0.4, 0.6, 0.8), more_ratios=RATIOS, part_ratios=(0.0, 0.25, 0.5, 0.75)
)

QUICK = Setting(
    "quick",
    seeds=(0,),
    mean_ratios=(0.4,),
    more_ratios=(),
    part_ratios=(0.0,),
    hidden=16,
    mlp=24,
    heads=2,
    base_steps=24,
    sft_steps=24,
    dpo_steps=3,
    prompts=16,
    answers=24,
    search_steps=2,
    tasks=1,
    examined_prompts=4,
)


def parse_arguments(description: str | None, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `setting` is what to run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed of a model that learns nothing, to try the code")
    parser.add_argument("--out", type=Path, default=Path("out/adaptive_averaging"), help="folder for everything")
    parser.add_argument("--record", action="store_true", help="keep table and picture in bench/results as well")
    arguments = parser.parse_args(given)
    if arguments.quick and arguments.record:
        parser.error("a quick run means nothing; leave out --quick or --record")
    arguments.setting = QUICK if arguments.quick else FULL
    return arguments


def new_model(tokenizer: PreTrainedTokenizerFast, setting: Setting, seed: int) -> LlamaForCausalLM:
    """The demo's Llama, deeper and narrower: K = 6 needs six layers.

    Its head is not tied to the embeddings, which would make one tensor of the lowest part and the highest.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=setting.hidden,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=256,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
