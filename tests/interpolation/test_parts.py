"""Where `LayerRatios` puts every tensor of the common layouts, by depth and by kind, and what it refuses."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch
import transformers
from tiny import llama

from fused_merge.interpolation.layer_ratios import LayerRatios

IDS = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
SIZES = IDS | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
SIZES |= {"max_position_embeddings": 16, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
GPT2 = IDS | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 8}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
LAYOUTS = [
    ("LlamaForCausalLM LlamaForSequenceClassification Qwen2ForCausalLM Qwen3ForCausalLM MistralForCausalLM", GROUPED),
    ("GemmaForCausalLM Gemma2ForCausalLM Phi3ForCausalLM", GROUPED),
    ("BertForMaskedLM BertForPreTraining BertForSequenceClassification BertForQuestionAnswering", SIZES),
    ("RobertaForMaskedLM GPTNeoXForCausalLM", SIZES),
    ("Qwen3MoeForCausalLM", GROUPED | {"num_experts": 2, "moe_intermediate_size": 8}),
    ("MixtralForCausalLM", GROUPED | {"num_local_experts": 2}),
    ("GPT2LMHeadModel", GPT2),
    ("GPT2DoubleHeadsModel", GPT2 | {"num_labels": 1}),
    ("OPTForCausalLM", SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    ("PhiForCausalLM", SIZES | {"qk_layernorm": True}),
    ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    ("T5ForSequenceClassification", T5),
]
LAYOUTS = {layout: sizes for layouts, sizes in LAYOUTS for layout in layouts.split()}
KINDS = ["embeddings", "attention", "mlp", "norm", "head"]


@cache
def names_of(layout: str) -> list[str]:
    """The names of all floating tensors of a model, tied ones once, in the order of the module."""
    made = getattr(transformers, layout)
    with torch.device("meta"):
        model = made(made.config_class(**LAYOUTS[layout]))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name, _ in model.named_parameters()]


def layers(count: int, rest: tuple[str, ...] = ("self_attn.q_proj.weight",)) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in range(count) for name in rest]


def kinds_of(names: list[str]) -> dict[str, str]:
    """Name -> kind."""
    # So that every kind occurs.
    more = ["embed.x", "layers.0.attn.x", "layers.0.mlp.x", "norm.x", "lm_head.x"]
    ratios = LayerRatios.by_kind([*names, *more], {kind: i for i, kind in enumerate(KINDS)})
    return {name: KINDS[int(ratios[name])] for name in names}


LLAMA = {
    r"model\.embed_tokens\.weight": (0, "embeddings", 1),
    r"model\.layers\.(\d)\.self_attn\.[qkvo]_proj\.weight": (None, "attention", 12),
    r"model\.layers\.(\d)\.mlp\.(gate|up|down)_proj\.weight": (None, "mlp", 9),
    r"model\.layers\.(\d)\.(input|post_attention)_layernorm\.weight": (None, "norm", 6),
    r"model\.norm\.weight": (2, "norm", 1),
    r"lm_head\.weight": (2, "head", 1),
}
# The head is tied to wte.
GPT2_TENSORS = {
    r"transformer\.w[tp]e\.weight": (0, "embeddings", 2),
    r"transformer\.h\.(\d)\.attn\.c_(attn|proj)\.(weight|bias)": (None, "attention", 12),
    r"transformer\.h\.(\d)\.mlp\.c_(fc|proj)\.(weight|bias)": (None, "mlp", 12),
    r"transformer\.h\.(\d)\.ln_[12]\.(weight|bias)": (None, "norm", 12),
    r"transformer\.ln_f\.(weight|bias)": (2, "norm", 2),
}
# Five layers in three parts: both of the encoder, two of the decoder, the last.
T5_TENSORS = {
    r"shared\.weight": (0, "embeddings", 1),
    r"encoder\.block\.\d\.layer\.0\.SelfAttention\.[qkvo]\.weight": (0, "attention", 8),
    r"encoder\.block\.\d\.layer\.1\.DenseReluDense\.w(i_0|i_1|o)\.weight": (0, "mlp", 6),
    r"encoder\.block\.\d\.layer\.[01]\.layer_norm\.weight": (0, "norm", 4),
    r"decoder\.block\.[01]\.layer\.[01]\.(Self|EncDec)Attention\.[qkvo]\.weight": (1, "attention", 16),
    r"decoder\.block\.[01]\.layer\.2\.DenseReluDense\.w(i_0|i_1|o)\.weight": (1, "mlp", 6),
    r"decoder\.block\.[01]\.layer\.[012]\.layer_norm\.weight": (1, "norm", 6),
    r"decoder\.block\.2\.layer\.[01]\.(Self|EncDec)Attention\.[qkvo]\.weight": (2, "attention", 8),
    r"decoder\.block\.2\.layer\.2\.DenseReluDense\.w(i_0|i_1|o)\.weight": (2, "mlp", 3),
    r"decoder\.block\.2\.layer\.[012]\.layer_norm\.weight": (2, "norm", 3),
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": (0, "attention", 1),
    r"decoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": (1, "attention", 1),
    r"encoder\.final_layer_norm\.weight": (0, "norm", 1),
    r"decoder\.final_layer_norm\.weight": (2, "norm", 1),
}
BERT = {
    r"bert\.embeddings\.(word|position|token_type)_embeddings\.weight": (0, "embeddings", 3),
    r"bert\.embeddings\.LayerNorm\.(weight|bias)": (0, "embeddings", 2),
    r"bert\.encoder\.layer\.(\d)\.attention\.(self\.(query|key|value)|output\.dense)\..*": (None, "attention", 24),
    r"bert\.encoder\.layer\.(\d)\.(intermediate|output)\.dense\..*": (None, "mlp", 12),
    r"bert\.encoder\.layer\.(\d)\.(attention\.)?output\.LayerNorm\..*": (None, "norm", 12),
    r"bert\.pooler\.dense\.(weight|bias)": (2, "head", 2),
    # The weight of the decoder is tied to the embeddings, its bias to `cls.predictions.bias`.
    r"cls\.(predictions\.transform\.(dense|LayerNorm)|seq_relationship)\.(weight|bias)": (2, "head", 6),
    r"cls\.predictions\.bias": (2, "head", 1),
}


TABLES = {"LlamaForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2_TENSORS, "BertForPreTraining": BERT}
TABLES["T5ForConditionalGeneration"] = T5_TENSORS


@pytest.mark.parametrize("layout", TABLES)
def test_every_tensor_of_a_layout_is_where_it_belongs(layout):
    """Tables map patterns to part (None is the layer's own), kind and number of tensors."""
    names, tensors = names_of(layout), TABLES[layout]
    ratios, kinds = LayerRatios.by_parts(names, [0.0, 1.0, 2.0]), kinds_of(names)
    assert set(ratios) == set(names)
    counts = dict.fromkeys(tensors, 0)
    for name in names:
        ((pattern, found),) = [(p, found) for p in tensors if (found := re.fullmatch(p, name))]
        counts[pattern] += 1
        part, kind, _ = tensors[pattern]
        assert ratios[name] == (int(found[1]) if part is None else part), name
        assert kinds[name] == kind, name
    assert counts == {pattern: count for pattern, (_, _, count) in tensors.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_placed_and_rises_with_depth(layout):
    names = names_of(layout)
    stacks = ["encoder.block.", "decoder.block."] if "T5" in layout else [r"(?:layers?|h)\."]
    depths = {}
    for name in names:
        for i, stack in enumerate(stacks):
            if found := re.search(rf"(?:^|\.){stack}(\d+)\.", name):
                depths[name] = (i, int(found[1]))
    order = sorted(set(depths.values()))
    assert len(order) == (5 if "T5" in layout else 3)
    ratios = LayerRatios.by_parts(names, range(len(order)))
    assert list(ratios) == sorted(names, key=lambda name: ratios[name])
    assert set(ratios) == set(names)
    assert all(order[int(ratios[name])] == place for name, place in depths.items())

    kinds = kinds_of(names)
    for place in order:
        assert {kinds[name] for name in depths if depths[name] == place} == {"attention", "mlp", "norm"}
    for name, kind in kinds.items():
        inside = name in depths
        assert (kind in ("attention", "mlp")) <= inside
        assert (kind in ("embeddings", "head")) <= (not inside)
        # A module is called a norm, or attention, wherever it is one.
        *_, module, _ = name.split(".")
        if inside:
            assert (kind == "norm") == ("norm" in module.lower() or module.startswith("ln_"))
            assert (kind == "attention") == (bool(re.search("attn|attention", name, re.IGNORECASE)) and kind != "norm")
        elif kind == "embeddings":
            assert ratios[name] == 0
        elif kind == "head":
            assert ratios[name] == len(order) - 1


OTHERS = [
    (0, "embeddings", "model.decoder.project_in.weight gpt_neox.embed_in.weight tok_embeddings.weight"),
    (0, "embeddings", "transformer.word_embeddings_layernorm.bias vision_model.pre_layrnorm.weight"),
    (0, "embeddings", "model.rotary_emb.inv_freq"),
    (-1, "head", "model.decoder.project_out.weight embed_out.weight output.weight score.weight v_head.summary.weight"),
    (-1, "head", "v_head.layers.5.weight classifier.0.weight bert.pooler.dense.bias vocab_layer_norm.weight"),
    (-1, "head", "classification_head.out_proj.weight lm_head.layer_norm.weight"),
    (1, "attention", "model.layers.1.self_attn.rotary_emb.inv_freq model.layers.1.attention.masked_bias"),
    (1, "mlp", "model.layers.1.block_sparse_moe.experts.3.w1.weight model.layers.1.block_sparse_moe.gate.weight"),
    (1, "mlp", "model.layers.1.mlp.experts.gate_up_proj model.layers.1.feed_forward.w1.weight"),
    (1, "mlp", "model.layers.1.ffn.lin1.weight model.layers.1.fc2.bias"),
    (1, "norm", "model.layers.1.self_attn.q_norm.weight model.layers.1.pre_feedforward_layernorm.weight"),
    (1, "norm", "model.layers.1.ln1.weight"),
]


@pytest.mark.parametrize(("part", "kind", "name"), [(*row[:2], name) for row in OTHERS for name in row[2].split()])
def test_where_other_names_belong(part, kind, name):
    ratios = LayerRatios.by_parts([*layers(3), name], [0.0, 1.0, 2.0])
    assert ratios[name] == part % 3
    assert kinds_of([*layers(3), name])[name] == kind


@pytest.mark.parametrize("depth", [1, 2, 7, 12, 26, 32])
def test_equal_parts_are_those_of_the_definition(depth):
    for count in range(1, depth + 1):
        ratios = LayerRatios.by_parts(layers(depth), range(count))
        assert [*ratios.values()] == [i * count // depth for i in range(depth)]


def test_26_layers_in_three_parts():
    names = ["model.embed_tokens.weight", *layers(26), "model.norm.weight", "lm_head.weight"]
    thirds = LayerRatios.by_parts(names, [0.2, 0.5, 0.9])
    expected = {"layers 0-8": names[:10], "layers 9-17": names[10:19], "layers 18-25": names[19:]}
    assert {label: [*members] for label, members in thirds.parts.items()} == expected
    paper = LayerRatios.by_parts(names, [0.2, 0.5, 0.9], boundaries=[8, 16])
    counts = {label: len(members) for label, members in paper.parts.items()}
    assert counts == {"layers 0-7": 9, "layers 8-15": 8, "layers 16-25": 12}
    assert [paper[name] for name in names[8:10]] == [0.2, 0.5]
    low = LayerRatios.by_parts(names, [0, 1, 2], boundaries=torch.tensor([1, 2]))
    assert list(low.parts) == ["layer 0", "layer 1", "layers 2-25"]


def test_what_is_outside_goes_where_it_is_told_to():
    outer = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names = [*layers(3), *outer]

    def of(**outside):
        ratios = LayerRatios.by_parts(names, [0, 1, 2], outside=outside)
        return [ratios[name] for name in outer]

    assert of() == [0, 2, 2]
    assert of(embeddings=1, norm=0, head=-2) == [1, 0, 1]
    assert of(embeddings=-1) == [2, 2, 2]
    assert of(**{"model.norm.weight": 1, ".*head.*": 0}) == [0, 1, 0]
    # A kind that does not occur is no slip: the head of a tied model.
    tied = LayerRatios.by_parts(names[:-1], [0, 1, 2], outside={"embeddings": 2, "norm": 2, "head": 2})
    assert tied["model.embed_tokens.weight"] == 2


def test_names_that_are_given_a_part_are_outside_the_layers():
    """The tower of a vision model has one ratio, and the slices are those of the language model."""
    tower = [f"vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(9)]
    names = [*tower, "projector.weight", *layers(4)]
    ratios = LayerRatios.by_parts(names, [0.1, 0.2], outside={"vision_tower.*": 0, "projector.weight": -1})
    assert list(ratios.parts) == ["layers 0-1", "layers 2-3"]
    assert {ratios[name] for name in tower} == {0.1}
    assert [ratios[name] for name in names[9:]] == [0.2, 0.1, 0.1, 0.2, 0.2]


def test_stacks_follow_one_another_whatever_the_order_of_names():
    """A file is in the order of its names, where decoders come before encoders."""
    names = names_of("T5ForConditionalGeneration")
    ratios = LayerRatios.by_parts(names, range(5))
    assert dict(LayerRatios.by_parts(sorted(names), range(5))) == dict(ratios)
    assert ratios == LayerRatios.by_parts(names[::-1], range(5))
    stacks = ["vision_model.encoder.layers", "encoder.layers", "model.layers", "decoder.bert.encoder.layer"]
    names = sorted(f"{stack}.{i}.mlp.weight" for stack in stacks for i in range(2))
    ratios = LayerRatios.by_parts(names, range(8))
    assert [ratios[f"{stack}.{i}.mlp.weight"] for stack in stacks for i in range(2)] == [*range(8)]


def test_a_final_norm_is_with_the_last_layer_of_its_own_stack():
    stacks = {"vision.blocks": "vision.ln_post", "model.vision_tower.layers": "model.vision_tower.norm"}
    stacks |= {"model.layers": "model.norm", "model.mtp.layers": "model.mtp.norm", "text.encoder.layers": "text.ln_f"}
    names = [f"{stack}.{i}.mlp.weight" for stack in stacks for i in range(2)]
    ratios = LayerRatios.by_parts([*names, *(f"{norm}.weight" for norm in stacks.values())], range(10))
    for stack, norm in stacks.items():
        assert ratios[f"{norm}.weight"] == ratios[f"{stack}.1.mlp.weight"]
    # One that has no stack of its own is behind everything.
    assert LayerRatios.by_parts([*names, "norm.weight"], range(10))["norm.weight"] == 9


def test_names_are_made_canonical():
    names = [f"_orig_mod.module.{name}" for name in [*layers(2), "lm_head.weight"]]
    assert list(LayerRatios.by_parts(names, [0.1, 0.2])) == [*layers(2), "lm_head.weight"]


GIVE = r"in no list of layers, .* give its part with outside=\{'logit_scale': 0\}"
TAKES = "outside takes 'head', 'embeddings', 'norm'"


@pytest.mark.parametrize(
    ("names", "ratios", "options", "sentence"),
    [
        (layers(2), [0.1, 0.2, 0.3], {}, "3 parts need as many layers, and there are 2; give fewer ratios"),
        (layers(2), [], {}, "ratios is empty; give a number for each part"),
        (layers(2), [0.1, math.nan], {}, "a ratio of 'layer 1' must be finite, got nan"),
        ([], [0.1], {}, "there is no floating tensor to give a ratio; pass a model"),
        (["lm_head.weight", "0.w"], [1], {}, "no name is that of a numbered layer, .* but 'lm_head.weight', '0.w'"),
        ([*layers(1), "logit_scale"], [0.1], {}, f"cannot tell where 'logit_scale' belongs: it is {GIVE}, or use by_p"),
        ([*layers(1), "a.x", "router.3.x", *"bcd"], [0.1], {}, "'a.x' belongs, nor 'router.3.x', 'b', 'c' and 1 m"),
        (layers(3)[:1] * 2, [0.1], {}, "'model.layers.0.self_attn.q_proj.weight' is named twice when prefixes of wrap"),
        # Layer 1 of 2 alone: the lower half is empty.
        (layers(2)[1:], [0.1, 0.2], {}, "part 'layer 0' holds no tensor"),
        (layers(2), [0.1, 0.2], {"boundaries": [2]}, r"first layers of .*, 1 rising numbers from 1 to 1, got \[2\]"),
        (layers(9), [0, 1, 2], {"boundaries": [0, 3]}, r"2 rising numbers from 1 to 8, got \[0, 3\]"),
        (layers(9), [0, 1, 2], {"boundaries": [3, 3]}, r"rising numbers .*, got \[3, 3\]"),
        (layers(9), [0, 1, 2], {"boundaries": [5, 3]}, r"rising numbers .*, got \[5, 3\]"),
        (layers(9), [0, 1, 2], {"boundaries": [3]}, r"2 rising numbers .*, got \[3\]"),
        (layers(9), [0, 1, 2], {"boundaries": [3, 4, 10]}, r"2 rising numbers .*, got \[3, 4, 10\]"),
        (layers(9), [0, 1], {"boundaries": 3}, "1 rising numbers .*, got 3"),
        (layers(9), [0, 1], {"boundaries": [2.5]}, r"rising numbers .*, got \[2.5\]"),
        (layers(3), [0, 1], {"outside": {"norm": 2}}, "outside puts 'norm' into part 2, but parts are 0 to 1, or -1"),
        (layers(3), [0, 1], {"outside": {"norm": -3}}, "outside puts 'norm' into part -3"),
        (layers(3), [0, 1], {"outside": {"norm": "last"}}, "outside puts 'norm' into part 'last'"),
        (layers(3), [0, 1], {"outside": {"embed": 0}}, f"{TAKES} and names, but part key 'embed' matches no tens"),
        (layers(3), [0, 1], {"outside": {"(": 0}}, r"outside takes .*part key '\(' is not a regular expression"),
    ],
)
def test_parts_that_cannot_be(names, ratios, options, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        LayerRatios.by_parts(names, ratios, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "ratios", "sentence"),
    [
        (layers(2), 0.5, "ratios must be a sequence of numbers, one for each part, got 0.5"),
        (layers(2), {"a": 0.5}, "ratios must be a sequence of numbers"),
        (llama(0).named_parameters(), [0.5], "a tensor must be given by its name, got a tuple; pass strings"),
        (7, [0.5], "names must be an iterable of strings, got 7"),
    ],
)
def test_what_is_no_number_and_no_name(names, ratios, sentence):
    with pytest.raises(TypeError, match=sentence):
        LayerRatios.by_parts(names, ratios)
