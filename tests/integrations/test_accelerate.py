"""Accelerate shards by FSDP2: it swaps parameters after the optimizer was made, and loads its state at once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import accelerated

EXAMPLE = Path(__file__).parents[2] / "examples/accelerate_fsdp2.py"
both_formats = pytest.mark.parametrize("format", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])


@pytest.mark.parametrize("world", [2, 4])
def test_steps_have_the_bits_of_one_process(world, ranks_of):
    whole = ranks_of(world).all(accelerated.train)
    assert not any(whole)


def test_the_steps_of_a_loss_are_those_of_its_gradients(ranks_of):
    ranks_of(2).all(accelerated.train_on_a_loss)


@both_formats
@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_a_saved_state_goes_on_with_another_number_of_processes(format, first, second, ranks_of, tmp_path):
    options = {"state_dict_type": format}
    ranks_of(first).all(accelerated.save, tmp_path, options)
    ranks_of(second).all(accelerated.resume, tmp_path, options)


def test_a_delta_that_lacks_tensors_is_refused_by_all(ranks_of):
    said = ranks_of(2).all(accelerated.wrong_delta)
    assert len(set(said)) == 1
    assert "the reference delta lacks 'blocks.1.gain', 'blocks.1.up.weight'" in said[0]


@pytest.mark.parametrize("kind", ["plain", "dpo"])
def test_trainers_take_the_steps_of_their_gradients(kind, ranks_of, tmp_path):
    assert ranks_of(2).all(accelerated.train_with_a_trainer, kind, tmp_path) == [3, 3]


def test_the_example_shards_where_accelerate_does(ranks_of):
    assert ranks_of(2).all(accelerated.run_example, EXAMPLE) == [[True], [True]]
