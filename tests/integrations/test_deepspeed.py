"""DeepSpeed on the CPU, two processes."""

from __future__ import annotations

import pytest
import torch
from processes import Pair

pytest.importorskip("deepspeed")

import zero

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


LAYOUTS = {
    "1": (1, {}, FP32, {}),
    "1 bf16": (1, {}, BF16, {}),
    "1 bf16, gradients in fp32": (1, {}, BF16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "2": (2, {}, FP32, {}),
    "2 bf16": (2, {}, BF16, {}),
    "2 round robin": (2, {"round_robin_gradients": True}, FP32, {}),
    "2 aligned": (2, {"round_robin_gradients": True, "parameter_alignment": True}, FP32, {}),
    "2 offloaded": (2, {"offload_optimizer": {"device": "cpu"}}, FP32, {}),
    "3": (3, {}, FP32, {}),
    "3 bf16": (3, {"stage3_param_persistence_threshold": 0}, BF16, {}),
    "3 in subgroups": (3, {"sub_group_size": 20}, FP32, {}),
    "3 offloaded": (3, {"offload_optimizer": {"device": "cpu"}}, BF16, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_a_flat_tensor_is_found_in_its_parameter(pair, layout):
    stage, options, dtype, config = LAYOUTS[layout]
    (first, _), (second, padding) = pair.both(zero.stretches, stage, options, dtype, config)
    shapes = {name: p.shape for name, p in zero.Network().named_parameters() if p.requires_grad}
    # The same pieces in the same order on both, and each element on one of them.
    assert [piece[:3] for piece in first] == [piece[:3] for piece in second]
    assert {name for _, _, name, _, _ in first} == set(shapes)
    for (*_, name, start, stop), (*_, start_2, stop_2) in zip(first, second, strict=True):
        assert sorted([*range(start, stop), *range(start_2, stop_2)]) == list(range(shapes[name].numel()))
    assert padding > 0
