"""Adapters of LoRA on the model of `tiny.llama`, written and read without PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from folders import load
from safetensors.torch import save_file
from torch import Tensor

# Modules and their inputs and outputs.
Q_AND_DOWN = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(2)}
Q_AND_DOWN |= {f"model.layers.{i}.mlp.down_proj": (24, 16) for i in range(2)}


def write_adapter(folder: Path, seed: int, *, modules=Q_AND_DOWN, r: int = 4, lora_alpha: float = 8, **config) -> Path:
    """Write an adapter of random factors as PEFT names them, and return its folder."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for module, (columns, rows) in modules.items():
        form = "lora_embedding_{}" if "embed" in module else "lora_{}.weight"
        for name, shape in (("A", (r, columns)), ("B", (rows, r))):
            factors[f"base_model.model.{module}.{form.format(name)}"] = torch.randn(shape, generator=generator) / 4
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in modules})
    content = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def change(folder: Path, **keys) -> None:
    """Change keys of the configuration of an adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def products_of(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight, in fp64, by the scales that PEFT finds in its configuration."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load(folder)
    found = {}
    for a in (name for name in tensors if name.endswith(".lora_A.weight")):
        module = a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha, rank = config["lora_alpha"], config["r"]
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            alpha = own if re.fullmatch(pattern, module) else alpha
        for pattern, own in (config.get("rank_pattern") or {}).items():
            rank = own if re.fullmatch(pattern, module) else rank
        assert tensors[a].shape[0] == rank
        b = tensors[a.replace("lora_A", "lora_B")]
        found[f"{module}.weight"] = alpha / rank * (b.double() @ tensors[a].double())
    return found
