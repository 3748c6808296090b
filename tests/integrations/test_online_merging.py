"""Merges around optimizers that frameworks bring or wrap, on the CPU."""

from __future__ import annotations

import runpy
from itertools import product
from pathlib import Path

import accelerate
import pytest
import torch
from bits import assert_same_bits
from merged_around import METHODS, assert_merged_by_the_equation, delta_of_two, merging_of, sgd_run, weights
from models import run

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("every", "options"), list(product((1, 3), METHODS)), ids=str)
def test_the_8_bit_adamw_of_torchao(every, options):
    optim = pytest.importorskip("torchao.optim")
    # It would compile its step, for half a minute.
    with torch.compiler.set_stance("force_eager"):
        assert_merged_by_the_equation(lambda named: optim.AdamW8bit(named, lr=1e-2), delta_of_two(), every, options)


def test_the_optimizer_within_that_of_accelerate():
    delta = delta_of_two()
    model, optimizer, merging = sgd_run(delta)
    merging.remove()
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert merging_of(wrapped, delta).optimizer is optimizer
    run(wrapped, model, 2)
    peer, other, _ = sgd_run(delta)
    run(other, peer, 2)
    assert_same_bits(weights(model), weights(peer))


def test_the_example_with_muon(capsys):
    runpy.run_path(str(EXAMPLES / "online_merging_muon.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 11
    assert losses[-1] < 0.9 * losses[0]
