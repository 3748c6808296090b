from __future__ import annotations

import hashlib

import pytest

from fused_merge.names import canonical_name, layer_of, tensor_id


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("module.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.module.layers.0.weight", "layers.0.weight"),
        ("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        # A tensor of that very name, and a component that only contains a wrapper's name, stay.
        ("module", "module"),
        ("submodule.weight", "submodule.weight"),
        # What PEFT inserts in memory and not in files.
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_A.weight"),
        ("_orig_mod.base_model.model.q.lora_B.my_adapter.bias", "base_model.model.q.lora_B.bias"),
        ("embed.lora_embedding_A.ref", "embed.lora_embedding_A"),
        ("q.lora_magnitude_vector.default.weight", "q.lora_magnitude_vector"),
        ("lm_head.modules_to_save.default.out.weight", "lm_head.out.weight"),
        # Names of files, and a layer that is called lora.
        ("q.lora_A.weight", "q.lora_A.weight"),
        ("embed.lora_embedding_B", "embed.lora_embedding_B"),
        ("w_lora.lora.0.weight", "w_lora.lora.0.weight"),
    ],
)
def test_canonical_name(name, canonical):
    assert canonical_name(name) == canonical


def test_tensor_id_is_the_hash_of_the_canonical_name():
    digest = hashlib.sha256(b"layers.0.weight").digest()
    expected = digest[0] + (digest[1] << 8) + (digest[2] << 16) + (digest[3] << 24)
    assert tensor_id("layers.0.weight") == tensor_id("module.layers.0.weight") == expected
    # Written down once, so that no later version may change what a seed means.
    assert tensor_id("layers.0.weight") == 2910602600


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.7.self_attn.q_proj.weight", ("model.layers", 7)),
        ("model.layers.3.mlp.experts.12.up.weight", ("model.layers", 3)),
        ("encoder.block.11.layer.0.SelfAttention.q.weight", ("encoder.block", 11)),
        ("h.0.ln_1.bias", ("h", 0)),
        ("0.weight", ("", 0)),
        # Numbers within a component are part of its name.
        ("head2.weight", None),
        ("model.layer_norm1.weight", None),
        ("layers.-1.weight", None),
        ("scale", None),
    ],
)
def test_the_layer_of_a_name(name, place):
    assert layer_of(name) == place
