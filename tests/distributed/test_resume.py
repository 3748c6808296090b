"""Runs that torch.distributed.checkpoint saves go on with another number of processes, bit for bit."""

from __future__ import annotations

import parallel_resume
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

BF16 = torch.bfloat16
CASES = {
    "plain": {},
    "partly frozen": {"frozen": True},
    "without gradients": {"without gradients": True},
    "two groups": {"groups": "two"},
    "a group without parameters": {"groups": "empty"},
    "bf16 states": {"options": {"state_dtype": BF16}},
    "bf16 weights": {"dtype": BF16, "options": {"rounding": "stochastic"}},
    "anchors": {"options": {"merge_every": 3}},
    "fp32 masters": {"dtype": BF16, "options": {"master": "fp32", "merge_every": 3}},
    "split masters": {"dtype": BF16, "options": {"master": "split", "merge_every": 3}},
    "onties": {"options": {"method": "onties", "max_grad_norm": 1e3}},
}
# From where to where; 1 is a process of its own, without a group.
TWO, FOUR, ONE = ("fsdp", 2), ("fsdp", 4), ("whole", 1)
WAYS = [
    *((case, TWO, FOUR, flat) for case in CASES for flat in (False, True)),
    *(
        (case, *way, flat)
        for case in ("plain", "split masters")
        for way in ((FOUR, TWO), (TWO, ONE), (ONE, FOUR))
        for flat in (False, True)
    ),
    *(
        (case, *way, False)
        for case in ("plain", "split masters")
        for way in ((("tp and fsdp", 4), ("columns", 2)), (("hsdp", 4), ("tp", 2)), (("tp", 2), ("ddp", 4)))
    ),
]


@pytest.fixture
def on(ranks_of, where):
    """Call a function on processes by kind and number, or here."""

    def on(place, function, *arguments):
        kind, world = place
        return ranks_of(world, where).all(function, kind, *arguments) if world > 1 else function(0, kind, *arguments)

    return on


@pytest.mark.parametrize(("case", "first", "second", "flat"), WAYS, ids=str)
def test_a_run_goes_on_elsewhere(case, first, second, flat, on, tmp_path):
    def interrupted(ours, partial=False):
        folder = tmp_path / ("ours" if ours else "torch's")
        on(first, parallel_resume.save, CASES[case], folder, flat, 4, ours)
        on(second, parallel_resume.resume, CASES[case], folder, flat, 4, ours, partial)

    if case == "a group without parameters" and flat:
        for ours in (False, True):
            with pytest.raises(IndexError, match="list index out of range"):
                interrupted(ours)
        return
    if case == "without gradients":
        # The probe makes states for all parameters, of which the checkpoint lacks some.
        for ours in (False, True):
            with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.state"):
                interrupted(ours)
    interrupted(True, partial=case == "without gradients")


@pytest.mark.parametrize("case", ["plain", "anchors", "split masters", "partly frozen"])
@pytest.mark.parametrize(("kind", "world"), [("alone", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 2), ("tp and fsdp", 4)])
def test_asking_a_fresh_optimizer_for_its_state_moves_no_weight(case, kind, world, on):
    on((kind, world), parallel_resume.probe, CASES[case])
