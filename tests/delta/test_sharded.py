"""Deltas of models that two processes share: the delta of the whole models, held in parts."""

from __future__ import annotations

import re

import pytest
import sharded_delta
import torch
from deltas import MAGNITUDE, RANDOM
from parallel import KINDS
from processes import Pair, Ranks
from tiny import llama, save

from fused_merge.delta.tensors import Sparsity


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_processes_find_f_of_tau_together(dtype, pair, tmp_path):
    folders = [save(llama(seed, dtype=dtype), tmp_path / str(seed)) for seed in (0, 1)]
    pair.both(sharded_delta.sparsify, folders, [RANDOM, MAGNITUDE, Sparsity("soft_threshold", 0.2, 0)])


PLACED = [("fsdp", "fsdp"), ("parallel", "parallel"), ("fsdp state dict", "fsdp")]
PLACED += [("whole", "fsdp"), ("fsdp", "whole"), ("path", "fsdp"), ("parallel", "path")]


@pytest.mark.parametrize("placed", PLACED, ids=" and ".join)
def test_the_delta_of_sharded_models_is_that_of_whole_ones(placed, pair, tmp_path):
    for seed in (0, 1):
        save(llama(seed), tmp_path / str(seed))
    pair.both(sharded_delta.of_placed, placed, (torch.float32, torch.float32), tmp_path)


@pytest.mark.parametrize("dtypes", ["bfloat16 bfloat16", "bfloat16 float32", "float64 float64"])
def test_in_every_dtype(dtypes, pair, tmp_path):
    dtypes = [getattr(torch, dtype) for dtype in dtypes.split()]
    pair.both(sharded_delta.of_placed, ("fsdp", "fsdp"), dtypes, tmp_path)


def test_rows_that_one_of_two_vocabularies_lacks(pair, tmp_path):
    for answer in pair(sharded_delta.of_rows, tmp_path):
        with pytest.raises(
            ValueError, match=r"is sharded in two ways: this process holds \[.*\] in base and \[.*\] in"
        ):
            raise answer


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("nan", ValueError, "the reference delta of 'model.norm.weight' has a NaN or infinite element"),
        ("placed", ValueError, r"'.*' is sharded in two ways: this process holds \[0:.*; shard both models alike"),
        ("path", (FileNotFoundError, RuntimeError), "gone does not exist"),
        (
            "other tensors",
            ValueError,
            "the processes found different tensors in their models; pass",
        ),
        ("folder", (OSError, RuntimeError), r"cannot write .*tau\.safetensors"),
        ("later", (OSError, RuntimeError), "the disk is full"),
    ],
)
def test_processes_fail_together(fault, error, sentence, pair, tmp_path):
    save(llama(0), tmp_path / "base")
    for answer in pair(sharded_delta.badly, fault, tmp_path):
        assert isinstance(answer, error)
        assert re.search(sentence, str(answer))
    assert not [*tmp_path.glob("tau*")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_identity_of_tensors_that_are_longer_than_their_heads(dtype, pair):
    pair.both(sharded_delta.of_large_tensors, dtype)


def test_a_step_with_a_delta_that_is_held_in_parts(pair, tmp_path):
    pair.both(sharded_delta.step, [save(llama(seed), tmp_path / str(seed)) for seed in (0, 1)])


def test_collectives_are_few(pair):
    # One that says whether all could read, and one for the heads of all tensors.
    assert pair.both(sharded_delta.collectives) == [2, 2]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("four"), 4)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(("world", "kind"), [(world, kind) for world in KINDS for kind in KINDS[world]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_parallelism(world, kind, dtype, pair, four, tmp_path):
    (four if world == 4 else pair).all(sharded_delta.save_a_kind, kind, dtype, tmp_path)
