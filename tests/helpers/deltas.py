"""Pairs of models for the tests of reference deltas, and what makes two deltas the same."""

from __future__ import annotations

import torch
from bits import same_bits
from safetensors.torch import save_file
from tiny import llama

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity

RANDOM = Sparsity("random", 0.1, 7)
MAGNITUDE = Sparsity("magnitude", 0.1, 0)


def two_models():
    return llama(0, dtype=torch.bfloat16), llama(1, dtype=torch.bfloat16)


def checkpoints(folder, base, tuned):
    """The delta of two state dicts, saved as files."""
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return ReferenceDelta.from_checkpoints(folder / "base.safetensors", folder / "tuned.safetensors")


def of_tensors(tensors):
    """The delta that these tensors are."""
    return ReferenceDelta.from_models({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors)


def mixed():
    """Tensors of all dtypes, of sizes that fill no block."""
    torch.manual_seed(0)
    wide = {"brain": torch.randn(40, 60).bfloat16(), "double": torch.randn(33).double(), "single": torch.randn(3, 5, 7)}
    return wide | {"half": torch.randn(1025).half(), "none": torch.randn(0, 4), "one": torch.randn(())}


def assert_same(one: ReferenceDelta, other: ReferenceDelta) -> None:
    assert set(one.names) == set(other.names)
    assert one.identity == other.identity
    for name in one.names:
        assert one.shape(name) == other.shape(name)
        assert one.dtype(name) == other.dtype(name)
        assert same_bits(one.tensor(name), other.tensor(name))
