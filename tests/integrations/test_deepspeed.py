"""DeepSpeed on the CPU, two processes."""

from __future__ import annotations

import pytest
import torch
from processes import SECONDS_TO_START, Pair

pytest.importorskip("deepspeed")

import zero

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    pair(abs)
    # To import DeepSpeed is a matter of the disk, too.
    pair._answers(SECONDS_TO_START, zero.ready)
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
