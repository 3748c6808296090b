"""torch's ZeroRedundancyOptimizer on two processes: each steps its parameters, which are passed without names."""

from __future__ import annotations

import pytest
from bits import assert_same_bits
from processes import Pair
from zero_redundancy import load_into_one_process, resume_with_another_delta, train_and_resume, unnamed


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.mark.parametrize("grouped", ["one", "groups", "a rank without parameters"])
@pytest.mark.parametrize("form", ["keywords", "partial"])
def test_sharded_and_resumed_it_is_the_run_of_one_process(grouped, form, pair):
    (runs, names, saved), (other_runs, other_names, _) = pair.both(train_and_resume, grouped, form)
    assert_same_bits(runs, other_runs)
    sharded, resumed, whole = runs
    assert_same_bits(sharded, whole)
    assert_same_bits(resumed, whole)
    assert names
    assert other_names
    assert not set(names) & set(other_names)
    # Two moments of 315 numbers in fp32, and no third.
    assert saved < 4 * 2 * 315 + 20_000


def test_a_consolidated_state_dict_goes_on_without_sharding(pair):
    for sharded, alone in pair.both(load_into_one_process):
        assert_same_bits(sharded, alone)


def test_without_names_it_is_refused(pair):
    for error in pair(unnamed):
        with pytest.raises(ValueError, match=r"unnamed parameters do not match the 6 tensors .*; pass names_of=model"):
            raise error


def test_a_resumed_run_with_another_delta_is_refused(pair):
    for error in pair(resume_with_another_delta):
        with pytest.raises(ValueError, match=r"the state dict was saved with the reference delta"):
            raise error
