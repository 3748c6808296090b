"""Tiny adapters of PEFT on the tiny model, on disk and in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import llama

# Transformers and PEFT warn of what a tiny model lacks.
logging.getLogger("transformers").setLevel(logging.ERROR)


def adapted(seed: int, base=None, **config) -> PeftModel:
    """The tiny model with an adapter of random factors, none of them zero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(llama(0, tied=False) if base is None else base, LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()


def save_adapter(folder: Path, seed: int, base=None, **config) -> Path:
    """Write such an adapter as PEFT does, and return its folder."""
    adapted(seed, base, **config).save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_adapter(folder: Path, base=None) -> PeftModel:
    """The tiny model with the adapter of a folder."""
    return PeftModel.from_pretrained(llama(0, tied=False) if base is None else base, str(folder)).eval()


def products(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the active adapter adds to each weight, in fp64, as PEFT's own layers have it."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            found[f"{name}.weight"] = module.double().get_delta_weight(adapter).detach()
    return found
