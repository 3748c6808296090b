"""What the configuration and the factors of an adapter say: scales, ranks, and what is no product."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_files import change, write_adapter
from safetensors.torch import load_file, save_file

from fused_merge.io.adapters import is_adapter, read_adapter
from fused_merge.io.sources import open_source


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": 5}, r"is \[4, 24\] and .* which are no factors of the rank 5 that adapter_config.json says"),
        ({"r": None}, "gives 'model.layers.0.mlp.down_proj.weight' the rank None"),
        ({"lora_alpha": math.inf}, "the rank 4 and alpha inf"),
        ({"rank_pattern": ["q_proj"]}, "must map regular expressions to numbers"),
        ({"alpha_pattern": {"q_(": 2}}, "must map regular expressions to numbers"),
        ({"something_new": {"on": True}}, "is more than products of factors, as something_new = {'on': True} says"),
        ({"peft_type": "IA3"}, "is an adapter of the type 'IA3', .* and only LoRA is read"),
    ],
)
def test_configurations_that_do_not_fit(keys, message, tmp_path):
    folder = write_adapter(tmp_path / "adapter", 0)
    change(folder, **keys)
    with pytest.raises(ValueError, match=message):
        read_adapter(open_source(folder))


def test_files_that_do_not_fit(tmp_path):
    folder = write_adapter(tmp_path / "adapter", 0)
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
    folder = write_adapter(tmp_path / "adapter", 0)
    assert is_adapter(open_source(folder))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    assert list(open_source(folder)) == ["w"]
    assert not is_adapter(open_source(folder))
