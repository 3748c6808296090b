"""What is read of adapters is what PEFT makes of them."""

from __future__ import annotations

import pytest
import torch
from adapters import adapted, load_adapter, save_adapter
from safetensors.torch import load_file

from fused_merge.io.adapters import read_adapter
from fused_merge.io.sources import open_source

CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 3, "q_proj": 5},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_ranks_and_scales_are_those_of_peft(kind, tmp_path):
    folder = save_adapter(tmp_path / "adapter", 0, **CONFIGS[kind])
    adapter, layers = read_adapter(open_source(folder)), 0
    for name, module in load_adapter(folder).get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            own = adapter.factors[f"{name}.weight"]
            assert (own.rank, own.scale) == (module.r["default"], module.scaling["default"])
            assert own.transposed == isinstance(module.base_layer, torch.nn.Embedding)
            layers += 1
    assert layers == len(adapter.factors) > 1


def test_of_a_model_with_adapters_the_active_one_is_read(tmp_path):
    model = adapted(0, modules_to_save=["lm_head"])
    model.add_adapter("ref", model.peft_config["default"])
    file = load_file(save_adapter(tmp_path / "adapter", 0, modules_to_save=["lm_head"]) / "adapter_model.safetensors")
    source = open_source(model)
    assert set(source) == set(file)
    assert all(torch.equal(source[name], file[name]) for name in file if "lora" in name)
    model.set_adapter("ref")
    name = next(name for name in file if "lora_B" in name)
    assert not torch.equal(open_source(model)[name], file[name])
    assert torch.equal(dict(model.named_parameters())[name.replace("lora_B", "lora_B.ref")], open_source(model)[name])
    model = adapted(0)
    model.add_adapter("ref", model.peft_config["default"])
    model.base_model.set_adapter(["default", "ref"])
    with pytest.raises(ValueError, match="has the adapters 'default', 'ref', of which 2 are active; choose one with"):
        open_source(model)
