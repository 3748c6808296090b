"""Small models of every kind of file, and a merge of every method, for the tests of merging finished models."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

NAMES = ["base", "a", "b", "c"]
SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (23, 83),
    "model.layers.1.mlp.up_proj.weight": (1025,),
    "model.norm.weight": (7,),
    "scalar": (),
    "none": (0, 4),
}
UP0, UP1, NORM, SCALAR, NONE = SHAPES
FILLED = {name: shape for name, shape in SHAPES.items() if name != NONE}

# method: weights of the models, and options; densities are as `fused_merge.eager.merge.merge` takes them.
CASES = {
    "linear": ("linear", [0.7, -0.4, 1.3], {}),
    "linear, one model": ("linear", [0.7], {}),
    "linear, a sum": ("linear", [0.7, -0.4, 1.3], {"normalize": False}),
    "slerp": ("slerp", [0.3], {}),
    "slerp, beyond": ("slerp", [1.7], {}),
    "task arithmetic": ("task_arithmetic", [0.7, -0.4, 1.3], {"scale": 0.8}),
    "task arithmetic, one model, a mean": ("task_arithmetic", [0.7], {"normalize": True}),
    "ties": ("ties", [0.7, 0.4, 1.3], {"densities": [0.3, 0.55, 1.0]}),
    "ties of everything": ("ties", [0.7, 0.4], {}),
    "ties, a sum": ("ties", [0.7, -0.4, 1.3], {"densities": [0.2, 0.2, 0.2], "normalize": False, "scale": 1.5}),
    "dare": ("dare_linear", [0.7, -0.4, 1.3], {"densities": [0.3, 0.55, 1.0], "seed": 11}),
    "dare, not rescaled": ("dare_linear", [0.7, 0.4], {"densities": [0.5, 0.5], "rescale": False}),
    "dare ties": ("dare_ties", [0.7, -0.4, 1.3], {"densities": [0.3, 0.55, 0.9], "seed": 2**63 + 5}),
    "dare ties, a mean": ("dare_ties", [0.7, 0.4], {"densities": [0.3, 0.9], "normalize": True, "scale": 0.5}),
    "nuslerp": ("nuslerp", [0.5, 1.3], {}),
    "nuslerp of models": ("nuslerp", [0.4, -1.3], {}),
    "nearswap": ("nearswap", [0.07], {}),
    "model stock": ("model_stock", [1.0, 1.0, 1.0], {}),
    "breadcrumbs": ("breadcrumbs", [0.7, -0.4, 1.3], {"densities": [0.3, 0.95, 1.0], "margins": [0.2, 0.1, 0.3]}),
    "breadcrumbs ties": ("breadcrumbs_ties", [0.7, 0.4], {"densities": [0.6, 0.8], "normalize": True}),
    "della": ("della", [0.7, 0.4, 1.3], {"densities": [0.5, 1.0, 0.9], "margins": [0.4, 0.9, 0.0], "seed": 5}),
    "della, a sum": ("della_linear", [0.7, -0.4], {"densities": [0.4, 0.6], "rescale": False, "scale": 0.5}),
}
# Of a method that may have a base, those without.
NO_BASE = ("linear", "linear, one model", "linear, a sum", "nuslerp of models")


def arguments_of(case):
    """The method, weights and options of a case as `merge_checkpoints` takes them, and whether it has a base."""
    method, weights, options = CASES[case]
    asked = dict(options)
    for eager, streamed in (("densities", "density"), ("margins", "gamma" if "crumbs" in method else "epsilon")):
        if eager in asked:
            asked[streamed] = asked.pop(eager)
    return method, weights, asked, case not in NO_BASE


def tensors_of(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(99)
    floating = {
        name: (torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }
    return {**floating, "count": torch.arange(5) + seed}


def write(folder, *files):
    """Write a model folder; the tensors of each mapping get a file to themselves."""
    folder.mkdir(parents=True)
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def split(tensors, *first):
    """The tensors of two files: those that are named, and the others."""
    return {name: tensors[name] for name in first}, {name: x for name, x in tensors.items() if name not in first}


def random_models(shape, dtype=torch.float32, count=3, seed=0):
    """A base and models near it: one tensor of each."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base.to(dtype), [(base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
