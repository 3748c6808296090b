"""DeepSpeed on the CPU, two processes."""

from __future__ import annotations

import pytest
import torch
from processes import Pair

pytest.importorskip("deepspeed")
pytest.importorskip("trl")

import zero
import zero_trainers

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    # Trainers take their time where other tests run.
    pair = Pair(tmp_path_factory.mktemp("pair"), ready=zero_trainers.ready, seconds=200)
    # Started here, so that it is no test's time.
    pair(abs)
    yield pair
    pair.stop()


SHARDED = {
    "1": (FP32, zero.config_of(1, {})),
    "1 bf16": (BF16, zero.config_of(1, {}, BF16)),
    "1 bf16, gradients in fp32": (BF16, zero.config_of(1, {}, BF16, data_types={"grad_accum_dtype": "fp32"})),
    "2": (FP32, zero.config_of(2, {})),
    "2 bf16": (BF16, zero.config_of(2, {}, BF16)),
    "2 round robin": (FP32, zero.config_of(2, {"round_robin_gradients": True})),
    "2 aligned": (FP32, zero.config_of(2, {"round_robin_gradients": True, "parameter_alignment": True})),
    "2 offloaded": (FP32, zero.config_of(2, {"offload_optimizer": {"device": "cpu"}})),
    "3": (FP32, zero.config_of(3, {})),
    "3 bf16": (BF16, zero.config_of(3, {"stage3_param_persistence_threshold": 0}, BF16)),
    "3 in subgroups": (FP32, zero.config_of(3, {"sub_group_size": 20})),
    "3 offloaded": (BF16, zero.config_of(3, {"offload_optimizer": {"device": "cpu"}}, BF16)),
}
ALL = {"0": (FP32, zero.config_of(0, {})), "0 bf16": (BF16, zero.config_of(0, {}, BF16))} | SHARDED


@pytest.mark.parametrize("layout", SHARDED)
def test_every_element_of_a_flat_tensor_is_found_in_its_parameter(pair, layout):
    dtype, config = SHARDED[layout]
    (first, _), (second, padding) = pair.both(zero.stretches, config, dtype)
    shapes = {name: p.shape for name, p in zero.Network().named_parameters() if p.requires_grad}
    # The same pieces in the same order on both, and each element on one of them.
    assert [piece[:3] for piece in first] == [piece[:3] for piece in second]
    assert {name for _, _, name, _, _ in first} == set(shapes)
    for (*_, name, start, stop), (*_, start_2, stop_2) in zip(first, second, strict=True):
        assert sorted([*range(start, stop), *range(start_2, stop_2)]) == list(range(shapes[name].numel()))
    assert padding > 0


@pytest.mark.parametrize("method", [{}, {"cls": "OnTIESAdamW"}], ids=["ondare", "onties"])
@pytest.mark.parametrize("layout", ALL)
def test_training_gives_the_bits_of_one_process(pair, layout, method):
    dtype, config = ALL[layout]
    assert pair.both(zero.differing, config, dtype, method) == [[], []]


def test_the_kernels_take_pieces(pair):
    dtype, config = ALL["2"]
    options = {"cls": "OnTIESAdamW", "impl": "triton"}
    assert pair.both(zero.differing, config, dtype, options, False, range(2)) == [[], []]


def test_a_model_that_was_made_in_parts(pair):
    _, config = ALL["3 in subgroups"]
    assert pair.both(zero.differing, config, FP32, {}, True) == [[], []]


def test_the_names_are_those_of_the_optimizer(pair):
    _, config = ALL["2 round robin"]
    assert pair.both(zero.renamed, config, False) == [[], []]
    for error in pair(zero.renamed, config, True):
        assert isinstance(error, ValueError)
        assert "give it only those that require a gradient" in str(error)


@pytest.mark.parametrize("layout", ["1", "2", "3 in subgroups"])
def test_a_projection_takes_the_product_of_the_whole_tensor(pair, layout):
    _, config = ALL[layout]
    options = {"cls": "OnProjAdamW", "reserve_rate": None}
    assert max(pair.both(zero.distance, config, options)) <= 2.0


@pytest.mark.parametrize("layout", ["2", "2 round robin", "3 in subgroups"])
def test_groups_that_are_stepped_one_by_one_keep_their_own_options(pair, layout):
    _, config = ALL[layout]
    options = {"merge_every": 2, "of_vectors": {"merge_every": 3, "seed": 5, "lr": 3e-3}}
    assert pair.both(zero.differing, config, FP32, options) == [[], []]


@pytest.mark.parametrize("layout", ["0 bf16", "2", "3 in subgroups"])
def test_statistics_are_of_whole_tensors(pair, layout):
    dtype, config = ALL[layout]
    for found, alone in pair.both(zero.statistics, config, dtype, {"stats_every": 2}):
        assert found.keys() == alone.keys()
        for name, stats in found.items():
            assert stats == pytest.approx(alone[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("bind_first", [True, False], ids=["bound before", "bound after"])
@pytest.mark.parametrize("layout", ["0 bf16", "1 bf16, gradients in fp32", "2", "2 offloaded", "3 in subgroups"])
def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not(pair, layout, bind_first, tmp_path):
    dtype, config = ALL[layout]
    assert pair.both(zero.resumed, config, dtype, str(tmp_path), bind_first) == [[], []]


@pytest.mark.parametrize("layout", ["0 bf16", "1", "1 bf16, gradients in fp32", "2", "3", "3 in subgroups"])
def test_until_it_is_bound_no_step_is_taken(pair, layout):
    dtype, config = ALL[layout]
    for sentence, moved in pair.both(zero.unbound, config, dtype):
        assert "call fused_merge.bind_deepspeed(engine) after deepspeed.initialize" in sentence
        assert moved == []


def test_what_cannot_be_bound(pair):
    for error in pair(zero.refused, zero.config_of(2, {}), False, {"max_grad_norm": 1.0}):
        assert isinstance(error, ValueError)
        assert "set gradient_clipping in the configuration of DeepSpeed" in str(error)
    one, other = pair(zero.lacking, zero.config_of(3, {"sub_group_size": 20}))
    assert "the reference delta lacks 'norm.bias'" in str(one)
    assert str(one) == str(other)
    for error in pair(zero.refused, zero.config_of(2, {}), True, {}):
        assert isinstance(error, TypeError)
        assert "steps a AdamW, which does not merge" in str(error)


@pytest.mark.parametrize("way", ["optimizer", "configuration"])
@pytest.mark.parametrize("layout", ["0", "2", "3 in subgroups"])
def test_an_optimizer_is_injected_where_a_framework_offers_no_choice(pair, layout, way):
    _, config = ALL[layout]
    assert pair.both(zero.differing_if_injected, config, way) == [[], []]


@pytest.mark.parametrize(
    ("kind", "stage", "options", "way"),
    [("dpo", 2, {}, "attach"), ("plain", 3, {"sub_group_size": 500}, "factory")],
    ids=["TRL, 2", "Transformers, 3"],
)
def test_a_trainer_takes_the_steps_of_its_gradients(pair, kind, stage, options, way, tmp_path):
    assert pair.both(zero_trainers.differing, kind, stage, options, way, str(tmp_path)) == [[], []]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_resumes_from_its_checkpoint(pair, stage, tmp_path):
    assert pair.both(zero_trainers.differing_if_resumed, stage, str(tmp_path)) == [[], []]


AROUND = {"ondare": {}, "onties, K = 2": {"method": "onties", "merge_every": 2}}


@pytest.mark.parametrize("wrap_first", [True, False], ids=["wrapped before", "wrapped after"])
@pytest.mark.parametrize("options", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("layout", ["0", "0 bf16", "1 bf16", "2", "2 round robin", "3 in subgroups", "3 offloaded"])
def test_merging_around_sgd_gives_the_bits_of_one_process(pair, layout, options, wrap_first):
    dtype, config = ALL[layout]
    assert pair.both(zero.differing_around, config, dtype, options, wrap_first) == [[], []]


@pytest.mark.parametrize("wrap_first", [True, False], ids=["wrapped before", "wrapped after"])
def test_merging_around_waits_until_it_is_bound(pair, wrap_first):
    for sentence in pair.both(zero.unbound_around, zero.config_of(2, {}), wrap_first):
        assert "fused_merge.bind_deepspeed(engine)" in sentence


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_merging_around_the_optimizer_of_the_configuration(pair, stage):
    assert pair.both(zero.differing_by_config, zero.config_of(stage, {})) == [[], []]
