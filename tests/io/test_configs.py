"""What two configurations must agree on, whatever their spelling, and what they declare that is not there."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from fused_merge.io.configs import check_configs, declared_but_missing
from fused_merge.io.sources import open_source


def sources_of(folder: Path, *configs: dict | None):
    """Folders with a tensor and, unless it is None, a configuration."""
    found = []
    for i, config in enumerate(configs):
        (folder / "abc"[i]).mkdir(exist_ok=True)
        save_file({"w": torch.zeros(1)}, folder / "abc"[i] / "model.safetensors")
        if config is not None:
            (folder / "abc"[i] / "config.json").write_text(json.dumps(config))
        found.append(open_source(folder / "abc"[i]))
    return found


@pytest.fixture
def said(tmp_path, caplog):
    """Return the warnings of a comparison."""

    def said(*configs, **options):
        caplog.clear()
        check_configs(sources_of(tmp_path, *configs), **options)
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        return [record.getMessage() for record in caplog.records]

    return said


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
}
SCALED = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"model_type": "mistral"}, ["model_type ('llama' against 'mistral')"]),
        ({"rope_theta": 1e6}, ["rope_theta (10000.0 against 1000000.0)"]),
        ({"rope_scaling": SCALED}, ["rope_type ('default' against 'llama3')"]),
        (
            {"num_attention_heads": 2, "rms_norm_eps": 1e-5},
            ["num_attention_heads (4 against 2)", "rms_norm_eps (1e-06"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act ('silu' against 'gelu')"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings (False against True)"]),
        ({"sliding_window": 4096}, ["sliding_window (None against 4096)"]),
    ],
)
def test_one_warning_lists_keys_and_both_values(change, listed, said, tmp_path):
    (sentence,) = said(LLAMA, LLAMA | change)
    assert sentence.startswith(f"{tmp_path / 'a'} and {tmp_path / 'b'} differ in ")
    assert all(each in sentence for each in listed)
    assert sentence.count(" against ") == len(listed)
    # Also where it is one of several, or what a model of several parts consists of.
    assert said(LLAMA, LLAMA, LLAMA | change)[0].startswith(f"{tmp_path / 'a'} and {tmp_path / 'c'} differ in ")
    (nested,) = said({"text_config": LLAMA}, {"text_config": LLAMA | change})
    assert all(f"text_config.{each}" in nested for each in listed)


MEANINGLESS = {
    "_name_or_path": "x",
    "architectures": ["FSDPLlamaForCausalLM"],
    "transformers_version": "5.0",
    "torch_dtype": "float32",
    "dtype": "float32",
    "use_cache": False,
    "eos_token_id": [1, 2],
    "pad_token_id": 7,
    "attention_dropout": 0.1,
    "initializer_range": 0.5,
    "router_aux_loss_coef": 1,
    "vocab_size": 3,
    "num_hidden_layers": 9,
    "max_position_embeddings": 9,
    "quantization_config": {"model_type": "x", "act_order": True},
}


def test_what_means_nothing_to_the_weights_is_not_said(said):
    other = dict.fromkeys(MEANINGLESS) | {"quantization_config": {"model_type": "y", "act_order": False}}
    assert said(LLAMA | MEANINGLESS, LLAMA | other | {"architectures": LLAMA["architectures"]}) == []
    # What only one says, or leaves open.
    assert said(LLAMA | {"head_dim": 16, "logit_scale": 2}, LLAMA | {"head_dim": None}) == []
    # Of a window that is not used.
    unused = {"use_sliding_window": False}
    assert said(LLAMA | unused | {"max_window_layers": 2}, LLAMA | unused | {"sliding_window": 4096}) == []
    assert said(LLAMA, None) == said(None, LLAMA) == said(LLAMA, {}) == []


OLD_ROPES = {
    "llama": {"rope_theta": 5e5, "rope_scaling": SCALED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "mixtral": {"rope_scaling": None},
    "gpt_neox": {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    "gemma3_text": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    },
    "modernbert": {"global_rope_theta": 3e5, "local_rope_theta": 2e4},
    "qwen2_vl": {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "phi3": {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", OLD_ROPES)
def test_both_spellings_of_rotary_embeddings_mean_the_same(kind, said):
    old = {"model_type": kind, **OLD_ROPES[kind]}
    new = CONFIG_MAPPING[kind](**json.loads(json.dumps(OLD_ROPES[kind]))).to_dict()
    assert said(old, new) == []
    assert said(new, old) == []
    changed = json.loads(json.dumps(new).replace('"rope_theta": ', '"rope_theta": 7'))
    assert changed != new
    (sentence,) = said(old, changed)
    assert "rope_theta (" in sentence


def test_a_rotary_embedding_that_one_leaves_out_is_the_default_of_its_type(said, monkeypatch):
    without = {"model_type": "llama"}
    assert "rope_theta (10000.0 against 500000.0)" in said(without, LLAMA | {"rope_theta": 5e5})[0]
    assert said(without, LLAMA) == said({"model_type": "mixtral"}, {"model_type": "mixtral", "rope_theta": 1e6}) == []
    # Of a type that nobody knows, or without Transformers, there is none.
    assert said({"model_type": "x"}, {"model_type": "x", "rope_theta": 1e6}) == []
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert said(without, LLAMA | {"rope_theta": 5e5}) == []


def test_two_architectures_are_refused_unless_they_are_meant(said, tmp_path):
    other = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    message = r"a is a LlamaForCausalLM and .*b a MistralForCausalLM; take models of one .* any_architecture=True"
    with pytest.raises(ValueError, match=message):
        said(LLAMA, other)
    (sentence,) = said(LLAMA, other, any_architecture=True)
    assert "model_type ('llama' against 'mistral')" in sentence
    assert said(LLAMA, {}, LLAMA | {"architectures": None}) == []


def test_whose_configuration_it_is(tmp_path, caplog):
    folders = sources_of(tmp_path, LLAMA, LLAMA | {"rope_theta": 1e6})
    file = open_source(tmp_path / "b" / "model.safetensors")
    # A file of another name may be any model.
    elsewhere = (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "other.safetensors")
    check_configs([folders[0], open_source(elsewhere), open_source({"w": torch.zeros(1)})])
    assert caplog.messages == []
    check_configs([folders[0], file])
    assert "rope_theta" in caplog.text


def test_configurations_that_cannot_be_read(tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json is not a JSON object; download it again"):
        _ = open_source(tmp_path).config
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_source(tmp_path).config == {"time_step_limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON \(.*\); download it again"):
        check_configs([*sources_of(tmp_path, LLAMA), open_source(save(tmp_path))])


def save(folder: Path) -> Path:
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    return folder


LAYERS = [f"model.layers.{i}.mlp.weight" for i in range(4)]
VISION = [f"visual.blocks.{i}.mlp.weight" for i in range(9)]


@pytest.mark.parametrize(
    ("config", "names", "missing"),
    [
        ({"mtp_num_hidden_layers": 1, "num_hidden_layers": 4}, LAYERS, ["mtp_num_hidden_layers = 1"]),
        ({"mtp_num_hidden_layers": 1, "num_hidden_layers": 4}, [*LAYERS, "mtp.layers.0.weight"], []),
        ({"num_nextn_predict_layers": 1, "num_hidden_layers": 4}, LAYERS + VISION, ["num_nextn_predict_layers = 1"]),
        ({"num_nextn_predict_layers": 1, "num_hidden_layers": 3}, LAYERS, []),
        ({"num_mtp_layers": 0, "mtp_layer_types": ["x"], "num_hidden_layers": 4}, LAYERS, []),
        ({"text_config": {"num_mtp_layers": 2}}, LAYERS, ["text_config.num_mtp_layers = 2"]),
        ({"num_hidden_layers": 6, "vision_config": {"num_hidden_layers": 9}}, LAYERS, ["num_hidden_layers = 6"]),
        ({"num_hidden_layers": 12}, ["albert.layers.0.weight"], []),
        ({"num_hidden_layers": 12}, ["embed.weight"], []),
        ({}, LAYERS, []),
    ],
)
def test_what_a_configuration_declares_and_no_tensor_belongs_to(config, names, missing):
    assert declared_but_missing(config, names) == missing
