"""The two models of a seed, before and after preference training: base -> SFT -> DPO, as the demo trains them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from data import chat_lines, chat_prompts, documents
from experiment import Setting, new_model
from settings import MAIN, SFT_SHARE
from train import build_optimizer, preference_pairs, train_base, train_dpo, train_sft
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import fused_merge as fm

# Shows a stage of so many steps, and yields what to call after each.
Stage = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


def train_pair(
    tokenizer: PreTrainedTokenizerFast, setting: Setting, seed: int, folder: Path, stage: Stage
) -> LlamaForCausalLM:
    """Write the checkpoints sft/ and rlhf/ into `folder`; return the model, which holds the weights of the latter."""
    text = documents(held_out=False)
    lines = chat_lines(text)
    model = new_model(tokenizer, setting, seed)
    with stage("base", setting.base_steps) as advance:
        train_base(model, tokenizer, text, setting.base_steps, seed, advance)
    base = copy.deepcopy(model.state_dict())
    with stage("SFT", setting.sft_steps) as advance:
        train_sft(model, tokenizer, lines, setting.sft_steps, seed, advance)
    [start] = fm.interpolate(base, model.state_dict(), [SFT_SHARE])
    model.load_state_dict(start)
    model.save_pretrained(folder / "sft")
    with stage("preference pairs", 1) as advance:
        pairs = preference_pairs(model, tokenizer, chat_prompts(lines, setting.prompts, seed=seed), seed)
        advance()
    with stage("DPO", setting.dpo_steps) as advance:
        optimizer = build_optimizer(MAIN, model, fm.ReferenceDelta.from_models(base, start), seed)
        train_dpo(model, tokenizer, pairs, optimizer, setting.dpo_steps, 0, folder / "rlhf", advance)
    model.save_pretrained(folder / "rlhf")
    for name in ("sft", "rlhf"):
        tokenizer.save_pretrained(folder / name)
    return model
