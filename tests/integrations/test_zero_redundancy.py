"""torch's ZeroRedundancyOptimizer on two processes: each steps its parameters, which are passed without names."""

from __future__ import annotations

import pytest
from bits import assert_same_bits
from zero_redundancy import (
    few_parameters,
    grown,
    load_into_one_process,
    resume_with_another_delta,
    train_and_resume,
    unnamed,
)


@pytest.mark.parametrize("grouped", ["one", "groups", "a rank without parameters"])
@pytest.mark.parametrize("form", ["keywords", "partial"])
def test_sharded_and_resumed_it_is_the_run_of_one_process(grouped, form, ranks_of):
    (runs, names, saved), (other_runs, other_names, _) = ranks_of(2).all(train_and_resume, grouped, form)
    assert_same_bits(runs, other_runs)
    sharded, resumed, whole = runs
    assert_same_bits(sharded, whole)
    assert_same_bits(resumed, whole)
    assert names
    assert other_names
    assert not set(names) & set(other_names)
    # Two moments of 315 numbers in fp32, and no third.
    assert saved < 4 * 2 * 315 + 20_000


def test_a_consolidated_state_dict_goes_on_without_sharding(ranks_of):
    for sharded, alone in ranks_of(2).all(load_into_one_process):
        assert_same_bits(sharded, alone)


def test_without_names_it_is_refused(ranks_of):
    for error in ranks_of(2)(unnamed):
        with pytest.raises(ValueError, match=r"unnamed parameters do not match the 6 tensors .*; pass names_of=model"):
            raise error


def test_a_resumed_run_with_another_delta_is_refused(ranks_of):
    for error in ranks_of(2)(resume_with_another_delta):
        with pytest.raises(ValueError, match=r"the state dict was saved with the reference delta"):
            raise error


def test_a_group_may_be_added_by_name(ranks_of):
    for sharded, whole in ranks_of(2).all(grown):
        assert_same_bits(sharded, whole)


def test_a_process_may_have_no_parameter_at_all(ranks_of):
    for sharded, whole in ranks_of(2).all(few_parameters):
        assert_same_bits(sharded, whole)
