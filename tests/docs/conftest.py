"""What the code of the documentation finds where it runs: a folder with small models, the environment of a reader."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed

import fused_merge as fm

CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
PROMPTS = ("Tell me about the sea.", "What is a merge?", "Write a short poem.", "How far is the moon?")
SCORES = '''\
"""Two scorers: more of `reward` is better, less of `loss`."""

import torch


def reward(model, tokenizer):
    tokens = tokenizer("What is a merge?", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=tokens).logits.mean().item()


def loss(model):
    tokens = torch.arange(3, 35).view(1, -1)
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()
'''


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that a page may say anything."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **special)


def tuned(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Change a model a little, as a training does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def contents(tmp_path_factory) -> Path:
    """The folder as every page finds it; CONTRIBUTING.md lists what is in it."""
    folder, words = tmp_path_factory.mktemp("contents"), tokenizer()
    for name, seeds in {"base": [], "sft": [1], "rlhf": [1, 2], "code": [3]}.items():
        model = llama(0, tied=False, vocabulary=len(words))
        for seed in seeds:
            tuned(model, seed)
        save(model, folder / name)
        words.save_pretrained(folder / name)
    fm.ReferenceDelta.from_checkpoints(folder / "base", folder / "sft").save(folder / "tau.safetensors")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "scores.py").write_text(SCORES)
    return folder


@pytest.fixture
def folder(contents, tmp_path, monkeypatch) -> Path:
    """A copy of the contents to work in, as the working directory, and nothing of the caller's environment."""
    shutil.copytree(contents, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before, modules = dict(os.environ), dict(sys.modules)
    for name in before:
        if name.startswith("FUSED_MERGE_"):
            del os.environ[name]
    # Commands are those of this environment, and nobody looks for models elsewhere. On models so small, threads of two
    # processes would do nothing but wait for one another.
    os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{before['PATH']}", "HF_HUB_OFFLINE": "1"}
    os.environ["OMP_NUM_THREADS"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    set_seed(0)
    yield tmp_path
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
    for name in sys.modules.keys() - modules.keys():
        if not getattr(sys.modules[name], "__spec__", None) or (tmp_path / f"{name}.py").exists():
            del sys.modules[name]
    sys.modules.update(modules)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Leave `torch.empty` as a reader has it; tests/conftest.py poisons it for all other tests."""
