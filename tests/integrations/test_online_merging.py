"""Merges around optimizers that frameworks bring or wrap, on the CPU."""

from __future__ import annotations

from itertools import product

import accelerate
import pytest
import torch
import trainers
from bits import assert_same_bits, same_bits
from merged_around import METHODS, assert_merged_by_the_equation, delta_of_two, merging_of, sgd_run, weights
from models import run
from transformers import TrainerCallback

import fused_merge as fm


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


class Merging(TrainerCallback):
    """Merges around whatever optimizer a trainer makes; goes on from a saved state."""

    def __init__(self, saved=None):
        self.saved = saved

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        options = {"reference_delta": trainers.delta(), "names_of": model, "merge_every": 2, **trainers.MERGING}
        self.merging = fm.OnlineMerging(optimizer, **options)
        if self.saved:
            self.merging.load_state_dict(torch.load(self.saved))

    def on_save(self, args, state, control, **kwargs):
        torch.save(self.merging.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/merging.pt")

    def on_train_end(self, args, state, control, **kwargs):
        self.merging.remove()


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused"])
def test_a_trainer_merges_around_its_own_optimizer_and_resumes(optim, tmp_path):
    found, options = [], {"optim": optim, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    saved = tmp_path / "checkpoint-2"
    for resume in (None, str(saved)):
        merging = Merging(saved / "merging.pt" if resume else None)
        trainer = trainers.trainer_of("plain", tmp_path, callbacks=[merging], **options)
        found.append(trainers.train(trainer, resume_from_checkpoint=resume))
        # The first of the four steps is one at lr = 0.
        assert {own["step"] for own in merging.merging.state_dict()["state"].values()} == {3}
    assert_same_bits(*found)
    plain = trainers.train(trainers.trainer_of("plain", tmp_path / "plain", **options))
    assert not any(same_bits(plain[name], weight) for name, weight in found[0].items())
