"""What the configuration and the factors of an adapter say: scales, ranks, and what is no product."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapters import adapted, load_adapter, save_adapter
from safetensors.torch import load_file, save_file

from fused_merge.io.adapters import is_adapter, read_adapter
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


def changed(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 5}, r"is \[4, 24\] and .* which are no factors of the rank 5 that adapter_config.json says"),
        ({"r": None}, "gives 'model.layers.0.mlp.down_proj.weight' the rank None"),
        ({"lora_alpha": math.inf}, "the rank 4 and alpha inf"),
        ({"something_new": {"on": True}}, "is more than products of factors, as something_new = {'on': True} says"),
        ({"peft_type": "IA3"}, "is an adapter of the type 'IA3', .* and only LoRA is read"),
    ],
)
def test_configurations_that_do_not_fit(keys, message, tmp_path):
    folder = save_adapter(tmp_path / "adapter", 0)
    changed(folder, **keys)
    with pytest.raises(ValueError, match=message):
        read_adapter(open_source(folder))


def test_files_that_do_not_fit(tmp_path):
    folder = save_adapter(tmp_path / "adapter", 0)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "lora_B" in name)
    save_file({each: x for each, x in whole.items() if each != name}, file)
    with pytest.raises(ValueError, match=r"holds only one of two factors, '.*lora_A.weight'; save it again"):
        read_adapter(open_source(folder))
    save_file({**whole, "more": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="holds 'more', which is no factor of LoRA; merge it into its base first"):
        read_adapter(open_source(folder))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json is not a JSON object; save the adapter again"):
        open_source(folder)


def test_an_adapter_beside_a_model_is_not_read(tmp_path):
    folder = save_adapter(tmp_path / "adapter", 0)
    assert is_adapter(open_source(folder))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    assert list(open_source(folder)) == ["w"]
    assert not is_adapter(open_source(folder))


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
