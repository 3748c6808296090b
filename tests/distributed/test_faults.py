"""What one process cannot do none of them does, and all say why; each reads what it holds and no more."""

from __future__ import annotations

import parallel
import parallel_faults
import pytest
import torch
from parallel import Network, tuned
from parallel_faults import BROKEN
from safetensors.torch import load_file

import fused_merge as fm

somewhere = pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("tp", 2), ("hsdp", 4), ("tp and fsdp", 4)])


@pytest.fixture
def folder(tmp_path):
    """Deltas: a good one, another one, and one whose numbers have become NaN on the disk."""
    good = parallel.delta().save(tmp_path / "good.safetensors")
    fm.ReferenceDelta.from_models(Network(0), tuned(5)).save(tmp_path / "another.safetensors")
    values = load_file(good)[BROKEN].numpy().tobytes()
    whole = good.read_bytes()
    assert whole.count(values) == 1
    nan = torch.tensor(float("nan")).numpy().tobytes()
    (tmp_path / "broken.safetensors").write_bytes(whole.replace(values, nan + values[len(nan) :]))
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("missing", "/0.safetensors"),
        ("another", "the processes have different reference deltas"),
        ("broken", f"{BROKEN!r}"),
    ],
)
@somewhere
def test_what_one_process_cannot_read_stops_all_with_one_sentence(
    fault, sentence, kind, world, where, folder, ranks_of
):
    # The first process holds the first elements of all tensors, so also the one that is no number.
    said = ranks_of(world, where).all(parallel_faults.step_with_a_fault, kind, 0, fault, folder)
    assert len(set(said)) == 1
    assert sentence in said[0]


@pytest.mark.parametrize("name", ["blocks.0.up.weight", "norm.bias"])
@somewhere
def test_a_tensor_without_a_delta_leaves_no_step_half_taken(name, kind, world, where, ranks_of):
    said = ranks_of(world, where).all(parallel_faults.step_without_a_tensor, kind, name)
    assert len(set(said)) == 1
    assert f"the reference delta lacks '{name}'" in said[0]


def test_a_gradient_that_cannot_be_used_on_one_process_stops_all(where, ranks_of):
    said = ranks_of(2, where).all(parallel_faults.step_without_a_tensor, "tp", "gradient")
    assert len(set(said)) == 1
    assert "the gradient of 'blocks.1.gain' is sparse" in said[0]


@pytest.mark.parametrize(
    "options", [{"reserve_rate": 1.0}, {"method": "onties", "reserve_rate": 0.1}], ids=["dense", "sparse"]
)
@somewhere
def test_each_process_reads_and_keeps_only_what_it_holds(options, kind, world, where, tmp_path, ranks_of):
    file = parallel.delta().save(tmp_path / "tau.safetensors")
    answers = ranks_of(world, where).all(parallel_faults.elements_read, kind, file, options)
    for read, kept, held in answers:
        assert kept == held
        # Where a process holds nothing of a tensor it does not read it.
        assert read == {name: count for name, count in held.items() if count}
    if kind == "fsdp":
        assert sum(sum(read.values()) for read, _, _ in answers) == sum(p.numel() for p in tuned().parameters())
