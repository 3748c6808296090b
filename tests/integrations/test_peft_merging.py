"""Adapters merged by the product of their factors, as PEFT loads what was written."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import load_adapter, products, save_adapter
from bits import assert_same_bits
from folders import load, recipe_of
from peft import PeftModel
from tiny import llama, save
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import fused_merge as fm
from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.eager.merge import merge

Q = "model.layers.0.self_attn.q_proj.weight"
QUIET = {"progress": False}


def logits(model):
    with torch.no_grad():
        return model.double()(torch.arange(9)[None]).logits


def sum_of(folders, numbers, base=None):
    """The base with number * product of each adapter added to its weights, in fp64 by PEFT's own products."""
    model = (llama(0, tied=False) if base is None else base()).double().eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for folder, number in zip(folders, numbers, strict=True):
            for name, delta in products(load_adapter(folder, None if base is None else base())).items():
                weights[name] += number * delta
    return model


def assert_is(folder, model, base=None, tolerance=2e-6):
    """PEFT loads a folder, and it computes what a model does."""
    torch.testing.assert_close(
        logits(load_adapter(folder, None if base is None else base())), logits(model), rtol=0, atol=tolerance
    )


KINDS = {
    "alike": ({}, {}),
    "ranks and scales": ({"r": 4, "lora_alpha": 12}, {"r": 3, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"down_proj": 2, r"layers.1.self_attn.q_proj": 5}},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 6}},
    ),
    "modules": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "up_proj"], "r": 2}),
    "layers": ({"target_modules": "all-linear"}, {"layers_to_transform": [1]}),
    "embeddings": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "r": 7},
    ),
}


@pytest.fixture
def pair(tmp_path):
    def pair(kind="alike", **more):
        folders = [tmp_path / "first", tmp_path / "second"]
        for seed, (folder, config) in enumerate(zip(folders, KINDS[kind], strict=True)):
            save_adapter(folder, seed, **{**config, **more})
        return folders

    return pair


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_one_of_products(kind, pair, tmp_path):
    folders = pair(kind)
    written = fm.interpolate_checkpoints(*folders, [0.0, 0.3, 1.0, 1.5], tmp_path / "line", **QUIET)
    for folder, ratio in zip(written, (0.0, 0.3, 1.0, 1.5), strict=True):
        assert_is(folder, sum_of(folders, (1 - ratio, ratio)))
        verify_checkpoint(folder)
    for folder, end in zip(written[::2], folders, strict=True):
        assert_same_bits(load(folder), load(end))
        assert json.loads((folder / "adapter_config.json").read_text()) == json.loads(
            (end / "adapter_config.json").read_text()
        )
        assert "library_name: peft" in (folder / "README.md").read_text()
    assert recipe_of(written[1])["ratio"] == 0.3


def test_patterns_of_the_output_name_whole_modules(pair, tmp_path):
    folders = pair("patterns")
    merged = fm.merge_checkpoints(None, dict.fromkeys(folders, 1.0), "linear", tmp_path / "out", **QUIET)
    config = json.loads((merged / "adapter_config.json").read_text())
    ranks = {name: x.shape[0] for name, x in load(merged).items() if "lora_A" in name}
    assert sorted(ranks.values()) == sorted([4 + 6, 5 + 6, 2 + 4, 2 + 4])
    assert config["r"] in ranks.values()
    assert all(pattern.startswith("^model") for pattern in config["rank_pattern"])


@pytest.mark.parametrize("normalize", [True, False])
def test_a_mean_and_a_sum(normalize, pair, tmp_path):
    folders = pair("ranks and scales")
    weights = dict(zip(folders, (0.5, 1.5), strict=True))
    merged = fm.merge_checkpoints(None, weights, "linear", tmp_path / "out", normalize=normalize, **QUIET)
    total = 2.0 if normalize else 1.0
    assert_is(merged, sum_of(folders, [weight / total for weight in weights.values()]))


def test_task_arithmetic_from_an_adapter(pair, tmp_path):
    folders = [*pair("ranks and scales"), save_adapter(tmp_path / "third", 7, r=1)]
    models = {folders[1]: 0.5, folders[2]: 2.0}
    merged = fm.merge_checkpoints(folders[0], models, "task_arithmetic", tmp_path / "out", scale=0.4, **QUIET)
    assert_is(merged, sum_of(folders, (1 - 0.4 * 2.5, 0.4 * 0.5, 0.4 * 2.0)))


# --- into the weights of the base


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=True))


BASES = {
    "llama": (lambda: llama(0, tied=False), {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    # Weights are transposed, and files leave out the prefix that they have in memory.
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.fixture
def experts(tmp_path):
    def experts(family):
        make, config = BASES[family]
        base, folders = save(make(), tmp_path / "base"), []
        for seed in range(2):
            folders.append(tmp_path / f"expert{seed}")
            save_adapter(folders[-1], seed, make(), r=3 + seed, lora_alpha=5, **config)
        return make, base, folders

    return experts


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", BASES)
def test_into_the_base(family, experts, tmp_path):
    make, base, folders = experts(family)
    models = dict(zip(folders, (0.75, -0.5), strict=True))
    merged = fm.merge_checkpoints(base, models, "task_arithmetic", tmp_path / "out", **QUIET)
    torch.testing.assert_close(
        logits(loaded(merged)), logits(sum_of(folders, models.values(), make)), rtol=0, atol=2e-6
    )
    # What merge_and_unload() of PEFT makes of one, up to rounding.
    one = fm.merge_checkpoints(base, {folders[0]: 1.0}, "task_arithmetic", tmp_path / "one", **QUIET)
    theirs = PeftModel.from_pretrained(make(), str(folders[0])).merge_and_unload()
    found = loaded(one).state_dict()
    for name, x in theirs.state_dict().items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6)
    untouched = [name for name, x in load(base).items() if torch.equal(load(one)[name], x)]
    assert any("norm" in name or "ln_" in name for name in untouched)


def test_a_path_from_a_model_to_itself_with_an_adapter(experts, tmp_path):
    make, base, folders = experts("llama")
    written = fm.interpolate_checkpoints(base, folders[0], [0.0, 0.5, 1.0], tmp_path / "line", **QUIET)
    assert_same_bits(load(written[0]), load(base))
    for folder, ratio in zip(written, (0.0, 0.5, 1.0), strict=True):
        torch.testing.assert_close(
            logits(loaded(folder)), logits(sum_of(folders[:1], [ratio], make)), rtol=0, atol=2e-6
        )
        assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(("method", "options"), [("dare_linear", {"density": 0.5}), ("dare_ties", {"density": 0.7})])
def test_methods_of_single_elements_take_products_as_deltas(method, options, experts, tmp_path):
    _, base, folders = experts("llama")
    models = dict(zip(folders, (0.75, 0.5), strict=True))
    merged = fm.merge_checkpoints(base, models, method, tmp_path / "out", seed=3, **options, **QUIET)
    weight = load(base)[Q]
    deltas = [products(load_adapter(folder))[Q] for folder in folders]
    whole = merge(
        torch.zeros(weight.shape, dtype=torch.float64), deltas, [0.75, 0.5], method=method, name=Q, seed=3,
        densities=[options["density"]] * 2,
    )  # fmt: skip
    torch.testing.assert_close(load(merged)[Q].double(), weight.double() + whole, rtol=0, atol=1e-6)


def test_weights_larger_than_a_block(tmp_path):
    """Blocks that begin and end within rows, of both kinds of factors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=301, hidden_size=252, intermediate_size=700, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    base = save(make(), tmp_path / "base")
    save_adapter(tmp_path / "adapter", 1, make(), target_modules=["down_proj", "up_proj", "embed_tokens"])
    models = {tmp_path / "adapter": 1.0}
    outs = [
        load(fm.merge_checkpoints(base, models, "task_arithmetic", tmp_path / f"out{i}", **run, **QUIET))
        for i, run in enumerate([{}, {"threads": 1, "max_memory": 30_000}])
    ]
    assert_same_bits(*outs)
    for name, delta in products(load_adapter(tmp_path / "adapter", make())).items():
        torch.testing.assert_close(outs[0][name].double(), load(base)[name].double() + delta, rtol=0, atol=1e-6)


# --- what is refused


REFUSED = {
    "DoRA": ({"use_dora": True}, r"is more than products of factors, as use_dora = True says; .* merge_and_unload"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"as modules_to_save = \['lm_head'\] says"),
    "bias": ({"bias": "lora_only", "target_modules": ["q_proj"]}, "as bias = 'lora_only' says"),
    "another beginning": ({"init_lora_weights": "pissa"}, "as init_lora_weights = 'pissa' says"),
    "tokens": ({"trainable_token_indices": [1]}, r"as trainable_token_indices = \[1\] says"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_more_than_products(kind, tmp_path):
    config, message = REFUSED[kind]
    plain, more = save_adapter(tmp_path / "plain", 0), save_adapter(tmp_path / "more", 1, **config)
    for call in (
        lambda: fm.interpolate_checkpoints(plain, more, [0.5], tmp_path / "line"),
        lambda: fm.merge_checkpoints(None, {plain: 1.0, more: 1.0}, "linear", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
