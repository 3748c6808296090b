from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from folders import load, manifest_of, recipe_of
from mergekit_files import models, slices
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fused_merge.eager.merge import Coefficients
from fused_merge.merge.mergekit import plan_mergekit, read_mergekit
from fused_merge.methods import MERGE_METHODS

DATA = Path(__file__).parent / "mergekit"
CASES = sorted(path.stem for path in DATA.glob("*.yaml"))

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Q0, *UPS = [f"model.layers.{name}.weight" for name in ("0.self_attn.q_proj", *(f"{i}.mlp.up_proj" for i in range(3)))]
UP0, UP1, UP2 = UPS
NAMES = [EMBED, Q0, *UPS, NORM, HEAD]


def weights(recipe, names=NAMES):
    coefficients = recipe.coefficients(names)
    assert [*coefficients] == names
    return [pytest.approx(coefficients[name].weights) for name in names]


def options_of(recipe):
    return tuple(recipe.options[name] for name in ("normalize", "rescale", "scale"))


# --- what mergekit made of the same files


def ordered(tensor):
    """Bit patterns as integers in the order of the values: neighbors are one ulp apart."""
    pattern = tensor.bfloat16().view(torch.int16).long()
    return torch.where(pattern >= 0, pattern, torch.iinfo(torch.int16).min - pattern)


def test_there_are_files_of_every_method_that_is_not_random(monkeypatch):
    monkeypatch.chdir(DATA)
    methods = {read_mergekit(f"{case}.yaml").method.name for case in CASES}
    assert methods == set(MERGE_METHODS) - {"dare_linear", "della_linear"}


@pytest.mark.parametrize("case", CASES)
def test_files_run_unchanged_and_mean_what_they_meant(case, tmp_path, monkeypatch, small_blocks):
    monkeypatch.chdir(DATA)
    recipe = read_mergekit(f"{case}.yaml")
    (out,) = plan_mergekit(f"{case}.yaml", tmp_path / "out").run(progress=False)
    made, expected = load(out), load_file(DATA / "expected" / f"{case}.safetensors")
    assert made.keys() == expected.keys()
    models = [load(model) for model in (*recipe.models, recipe.base) if model is not None]
    for name, theirs in expected.items():
        ours = made[name]
        assert ours.dtype == theirs.dtype
        assert (ordered(ours) - ordered(theirs)).abs().max() <= 1, name
        if recipe.method.deltas and recipe.method.weights_from == "given":
            assert torch.equal(ours, theirs), name
        elif theirs.dtype != torch.bfloat16:
            # Where terms cancel, an ulp of the result is less than fp32 can tell apart in them.
            largest = torch.stack([x.abs() for x in (*(model[name] for model in models), theirs)]).amax(0)
            assert ((ours - theirs).abs() <= 1e-6 * largest).all(), name
    config = json.loads((out / "config.json").read_text())
    source = json.loads((recipe.options["config_from"] / "config.json").read_text())
    written = "bfloat16" if recipe.options["dtype"] == torch.bfloat16 else "float32"
    assert config == {**source, "torch_dtype": written}
    LlamaForCausalLM.from_pretrained(out)


def test_the_recipe_of_a_file_is_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA)
    (out,) = plan_mergekit("ties.yaml", tmp_path / "out", max_shard_size=3000).run(progress=False)
    recipe = recipe_of(out)
    assert recipe["mergekit"] == Path("ties.yaml").read_text()
    assert [Path(model["path"]).name for model in recipe["models"]] == ["a", "b"]
    assert all(model.keys() == {"path", "bytes"} for model in recipe["models"])
    (tmp_path / "again.yaml").write_text(recipe["mergekit"])
    again = plan_mergekit(tmp_path / "again.yaml", tmp_path / "out", max_shard_size=recipe["max_shard_size"])
    assert again.identity == manifest_of(out)["plan"]
    # It is there already.
    assert again.run() == [tmp_path / "out"]
    with pytest.raises(FileExistsError, match="out exists; pass overwrite=True"):
        plan_mergekit("ties.yaml", tmp_path / "out")
    plan_mergekit("ties.yaml", tmp_path / "out", overwrite=True).run()
    assert not (out / "model.safetensors.index.json").exists()


# --- what a file says, by hand


def test_a_merge_of_deltas(read):
    more = "parameters: {normalize: yes, rescale: false, lambda: 0.7, int8_mask: true, t: 3}\n"
    more += "tokenizer_source: b\ndtype: float32\nout_dtype: torch.float16\n"
    entries = ("a", "weight: 0.5, density: 0.3"), ("base", ""), ("./b", "weight: 2")
    recipe = read(models("dare_ties", *entries, more=more))
    assert (recipe.path, recipe.method.name) == (Path("merge.yaml"), "dare_ties")
    assert (recipe.base, recipe.models) == (Path("base"), (Path("a"), Path("b")))
    assert options_of(recipe) == (True, False, 0.7)
    assert (recipe.options["dtype"], recipe.options["tokenizer_from"]) == (torch.float16, Path("b"))
    for coefficients in recipe.coefficients(NAMES).values():
        assert coefficients == Coefficients((0.5, 2.0), (0.3, 1.0))


def test_what_a_file_leaves_out(read):
    recipe = read(models("ties", ("a", "weight: 1")))
    assert recipe.method == MERGE_METHODS["ties"]
    assert options_of(recipe) == (None, None, 1.0)
    assert (recipe.options["dtype"], recipe.options["tokenizer_from"]) == (None, Path("base"))
    assert read(models("ties", ("a", "weight: 1"), more="dtype: bfloat16")).options["dtype"] == torch.bfloat16
    recipe = read(models("linear", ("b", "weight: 1"), ("a", "weight: 1"), base=None))
    assert (recipe.base, recipe.models, recipe.options["tokenizer_from"]) == (None, (Path("b"), Path("a")), Path("b"))
    assert recipe.coefficients(NAMES)[EMBED].densities is None


def test_what_a_method_does_not_have_is_passed_over(read):
    recipe = read(models("slerp", ("a", "weight: 9, t: 9"), more="parameters: {t: 0.5, lambda: 2, normalize: true}"))
    assert options_of(recipe) == (None, None, 1.0)
    assert recipe.coefficients(NAMES)[HEAD] == Coefficients((0.5,))
    recipe = read(models("linear", ("a", "weight: 1, density: 9"), base=None, more="parameters: {rescale: true}"))
    assert recipe.options["rescale"] is None
    text = models("model_stock", ("a", "weight: 9"), ("b", ""), more="parameters: {lambda: 2, filter_wise: false}")
    assert (weights(read(text)), options_of(read(text))) == ([(1, 1)] * 7, (None, None, 1.0))
    assert read(models("ties", ("a", "weight: 1, gamma: 9, nuslerp_flatten: false"))).method.name == "ties"
    # Options that all models share are not looked for at one of them.
    assert read(models("ties", ("a", "weight: 1, lambda: 3, normalize: false"))).method.scale == 1.0


def test_the_base_joins_a_mean_of_models(read):
    recipe = read(models("linear", ("a", "weight: 3"), more="parameters: {weight: 1}"))
    assert (recipe.base, recipe.models) == (None, (Path("a"), Path("base")))
    assert (recipe.options["config_from"], recipe.options["tokenizer_from"]) == (Path("base"), Path("base"))
    assert weights(recipe) == [(3, 1)] * 7
    recipe = read(models("linear", ("base", "weight: 2"), ("a", "weight: 3")))
    assert (recipe.models, recipe.coefficients(NAMES)[NORM].weights) == ((Path("base"), Path("a")), (2, 3))


@pytest.mark.parametrize("base", ["base", None])
def test_nuslerp_with_and_without_a_base(base, read):
    recipe = read(models("nuslerp", ("b", "weight: 0.5"), ("a", "weight: [1, 3]"), base=base))
    assert (recipe.base, recipe.models) == (base and Path("base"), (Path("b"), Path("a")))
    assert recipe.method.deltas == (base is not None)
    assert weights(recipe, [UP0, UP1, HEAD]) == [(0.5, 1), (0.5, 3), (0.5, 1)]


def test_gamma_and_epsilon_of_each_model(read):
    entries = ("a", "weight: 1, density: 0.5, gamma: [0.1, 0.3]"), ("b", "weight: 1")
    recipe = read(models("breadcrumbs", *entries, more="parameters: {epsilon: 7}"))
    coefficients = recipe.coefficients([UP0, UP1])
    assert [coefficients[name].margins for name in (UP0, UP1)] == [(0.1, 0.01), (0.3, 0.01)]
    recipe = read(models("della", *entries, more="parameters: {epsilon: 0.25}"))
    assert recipe.coefficients([HEAD])[HEAD] == Coefficients((1, 1), (0.5, 1.0), (0.25, 0.25))
    assert read(models("della", *entries)).coefficients([HEAD])[HEAD].margins == (0.15, 0.15)


@pytest.mark.parametrize(
    "written",
    ["{path: a}", "{model: a}", "{model: {path: a}}", "{model: {path: a, revision: null}, lora: null}", "~/a", "./a"],
)
def test_ways_to_name_a_folder(written, read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = read(models("ties", (written, "weight: 1")))
    assert [model.samefile("a") for model in recipe.models] == [True]
    more = f"base_model: {written}\ntokenizer_source: {written}\n"
    assert read(models("ties", ("b", "weight: 1"), base=None, more=more)).options["tokenizer_from"].samefile("a")


def test_a_folder_may_have_any_name(read):
    for name in ("a+lora", "a@main", "b+c@d"):
        with pytest.raises(ValueError, match=rf"models\[0\] is '{re.escape(name)}', which is no folder; revisions \(@"):
            read(models("ties", (name, "weight: 1")))
        Path(name).mkdir()
        assert read(models("ties", (name, "weight: 1"))).models == (Path(name),)


def test_a_gradient_runs_over_the_layers(read):
    recipe = read(models("ties", ("a", "weight: [1, 0, 4], density: [0.2, 0.6]")))
    assert weights(recipe) == [(1,), (1,), (1,), (0,), (4,), (1,), (1,)]
    densities = [recipe.coefficients(NAMES)[name].densities[0] for name in (Q0, UP1, UP2, HEAD)]
    assert densities == pytest.approx([0.2, 0.4, 0.6, 0.2])
    # Between two points of it.
    assert weights(read(models("ties", ("a", "weight: [0, 8, 2, 1]"))), [UP1, UP2]) == [(5,), (1,)]
    # A single layer is the last.
    assert weights(recipe, [EMBED, UP0]) == [(1,), (4,)]


def test_each_stack_has_its_own_layers(read):
    recipe = read(models("ties", ("a", "weight: [0, 6]")))
    names = ["vision.blocks.1.proj", "vision.blocks.3.proj", "model.layers.1.experts.5.w", "model.layers.2.experts.0.w"]
    assert weights(recipe, names) == [(2,), (6,), (3,), (6,)]


def test_filters_are_parts_of_names_and_the_first_one_decides(read):
    text = """weight: [{filter: mlp, value: [2, 4]}, {filter: layers.0, value: 7}, {filter: "*", value: 1}]"""
    assert weights(read(models("ties", ("a", text)))) == [(1,), (7,), (2,), (3,), (4,), (1,), (1,)]
    assert weights(read(models("ties", ("a", "weight: {value: 2}")))) == [(2,)] * 7
    # What no filter matches is looked for further out, and so is an empty list.
    outer = "parameters: {weight: [{value: 5, filter: norm}, {value: 6}]}"
    recipe = read(models("ties", ("a", "weight: [{filter: mlp, value: 2}]"), more=outer))
    assert weights(recipe, [UP0, Q0, NORM]) == [(2,), (6,), (5,)]
    assert weights(read(models("ties", ("a", "weight: []"), more=outer)), [UP0, NORM]) == [(6,), (5,)]


def test_numbers_may_be_written_as_strings(read):
    recipe = read(models("ties", ("a", "weight: 2e-1"), ("b", "weight: ['1', 2e0]"), more="parameters: {lambda: 1e-2}"))
    assert weights(recipe, [UP0, UP1]) == [(0.2, 1), (0.2, 2)]
    assert recipe.method.scale == 0.01


def test_slices_and_the_nearest_parameter(read):
    first = ((0, 2), "weight: [{filter: mlp, value: [1, 2]}]", "weight: 3")
    last = ((2, 3), "", "weight: [{filter: norm, value: 4}]")
    more = "base_model: base\nparameters: {weight: [5, 6]}\n"
    recipe = read(slices("task_arithmetic", first, last, more=more))
    assert (recipe.base, recipe.models) == (Path("base"), (Path("a"),))
    # Embeddings belong to the first slice, what follows the layers to the last.
    assert weights(recipe) == [(3,), (3,), (1,), (2,), (6,), (4,), (5,)]
    assert weights(recipe, [*NAMES, "gpt_neox.embed_out.weight"])[-1] == (5,)
    # A gradient runs over the layers of its slice.
    recipe = read(slices("ties", ((0, 1), "weight: [1, 2]", ""), ((1, 3), "weight: [3, 4]", "")))
    assert weights(recipe) == [(1,), (2,), (2,), (3,), (4,), (3,), (3,)]


def test_weights_of_a_sum_may_cancel(read):
    text = models("linear", ("a", "weight: 1"), ("b", "weight: -1"), base=None, more="parameters: {normalize: false}")
    assert weights(read(text)) == [(1, -1)] * 7


def test_slices_of_slerp_and_their_base(read):
    recipe = read(slices("slerp", ((0, 3), "", "t: [0, 1]"), more="base_model: a\n"))
    assert (recipe.base, recipe.models) == (Path("a"), (Path("base"),))
    assert weights(recipe) == [(0,), (0,), (0,), (0.5,), (1,), (0,), (0,)]
    text = slices("slerp", ((0, 3), "", "t: 0.5"), more="")
    assert read(text.replace("  - parameters", "  - base_model: a\n    parameters")).base == Path("a")


def test_options_may_stand_at_every_slice(read):
    own = "weight: 1, lambda: 0.5, normalize: true"
    recipe = read(slices("ties", ((0, 2), "", own), ((2, 3), "", own)))
    assert (recipe.method.scale, recipe.method.normalize) == (0.5, True)


# --- what is refused

TIES = "merge_method: ties"
OTHERS = r"slices\[1\] has other sources or another base than slices\[0\]"


def ties(*entries, **more):
    return models("ties", *entries, **more)


def sliced(*ranges, own=("", ""), more="base_model: base\n"):
    """Slices of ties whose source a has no parameters."""
    return slices("ties", *((each, "", text) for each, text in zip(ranges, own, strict=False)), more=more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "merge.yaml is not one YAML document: while parsing"),
        ("a: 1\n---\nb: 2", "merge.yaml is not one YAML document: expected a single document"),
        ("- ties", r"merge.yaml must be a mapping, got \['ties'\]"),
        ("", "merge.yaml must be a mapping, got None"),
        (
            "merge_methods: ties",
            "supported are merge_method, .*, out_dtype, tokenizer_source, tokenizer, chat_template$",
        ),
        ("merge_method: sce", "merge.yaml has merge_method 'sce'; supported are 'breadcrumbs', 'breadcrumbs_ties', 'd"),
        ("merge_method: [ties]", r"merge.yaml has merge_method \['ties'\]; supported are"),
        ("models: []", "merge.yaml has merge_method None; supported are"),
        (f"{TIES}\nmodules: {{default: {{}}}}", "merge.yaml: modules are not supported; list whole models under m"),
        (f"{TIES}\nchat_template: chatml", "chat_template 'chatml' is not supported, since templates are only copied"),
        (
            ties(("a", ""), more="tokenizer: {tokens: {x: {source: a}}}"),
            "tokenizer has tokens, but no embedding is made",
        ),
        (ties(("a", ""), more="tokenizer: {pad_to_multiple_of: 8}"), "tokenizer has pad_to_multiple_of, but no embed"),
        (ties(("a", ""), more="tokenizer: {sources: a}"), "tokenizer has the key 'sources'; supported are source$"),
        (ties(("a", ""), more="tokenizer: {}\ntokenizer_source: a"), "has tokenizer and tokenizer_source; leave one"),
        (ties(("{model: {path: a, revision: main}}", "")), "has the revision 'main', which is not supported; name a f"),
        (ties(("{model: a, lora: {path: b}}", "")), "has the lora {'path': 'b'}, which is not supported; name a fold"),
        (ties(("{model: a, path: b}", "")), r"models\[0\] must name the folder of a model, got None"),
        (ties(("{folder: a}", "")), r"models\[0\] has the key 'folder'; supported are model, path$"),
        (TIES, "merge.yaml must have either models or slices"),
        (f"{TIES}\nmodels: []\nslices: []", "merge.yaml must have either models or slices"),
        (f"{TIES}\nmodels: []", r"merge.yaml, models must be a list with an entry, got \[\]"),
        (f"{TIES}\nmodels: [a]", r"merge.yaml, models\[0\] must be a mapping, got 'a'"),
        (f"{TIES}\nmodels: [{{model: 3}}]", r"merge.yaml, models\[0\] must name the folder of a model, got 3"),
        (ties(("a", ""), ("./a", "")), "merge.yaml, models names 'a' twice"),
        (ties(("a", ""), base=None), "merge.yaml has no base_model, or slices without it, and 'ties' starts from one"),
        (sliced((0, 3), more="base_model: b\n"), "no base_model, or slices without it, and 'ties'"),
        (ties(("base", "")), "merge.yaml: there is no model to merge; pass at least one"),
        (
            models("slerp", ("a", ""), ("b", "")),
            "merge.yaml: method 'slerp' goes from the base to one model, got 2 models",
        ),
        (models("nuslerp", ("a", "")), "method 'nuslerp' goes from one model to another, got 1 besides a base"),
        (models("model_stock", ("a", ""), base=None), "no base_model, or slices without it, and 'model_stock' starts"),
        (models("model_stock", ("a", "")), "method 'model_stock' needs the angle between two models or more, got 1"),
        (
            models("nuslerp", ("a", ""), ("b", ""), more="parameters: {nuslerp_flatten: false}"),
            "nuslerp_flatten False is not supported for 'nuslerp': it is of whole tensors, not of their rows or col",
        ),
        (
            models("model_stock", ("a", ""), ("b", ""), more="parameters: {filter_wise: true}"),
            "filter_wise True is not supported for 'model_stock': it takes the angles of whole tensors, not of filters",
        ),
        (ties(("a", "gama: 1")), r"has the key 'gama'; supported are weight, density, gamma, .*, rescale, lambda$"),
        (ties(("a", "weight: x")), r"models\[0\], parameters, weight is 'x'; write a number, or a list of num"),
        (ties(("a", "weight:")), r"models\[0\], parameters, weight is None; write a number, or a list of num"),
        (ties(("a", "weight: [1, [2]]")), r"parameters, weight is \[1, \[2\]\]; write a number, or a list of n"),
        (ties(("a", "weight: [{value: 1}, 2]")), "parameters, weight must be a mapping, got 2"),
        (ties(("a", "weight: [{valu: 1}]")), "parameters, weight has the key 'valu'; supported are filter, val"),
        (ties(("a", "weight: [{filter: mlp}]")), "parameters, weight is None; write a number, or a list of nu"),
        (ties(("a", "weight: [{filter: 3, value: 1}]")), "weight has the filter 3; write a part of tensors' names"),
        (ties(("a", ""), more="parameters: 3"), "merge.yaml, parameters must be a mapping, got 3"),
        (ties(("a", ""), more="dtype: int64"), "merge.yaml: dtype must be 'bfloat16'"),
        (ties(("a", ""), more="out_dtype: 16"), "merge.yaml: out_dtype must be 'bfloat16'"),
        (ties(("a", ""), more="tokenizer_source: b"), "tokenizer_source 'b', which is neither the base nor a model"),
        (models("linear", ("a", ""), base=None, more="tokenizer_source: base"), "'base', but no base_model"),
        (ties(("a", ""), more="parameters: {rescale: true}"), "rescale is not supported for 'ties', whose paper"),
        (ties(("a", ""), more="parameters: {normalize: 2}"), "normalize must be true or false, got 2.0"),
        (ties(("a", ""), more="parameters: {lambda: [1, 2]}"), "lambda must be one value for all tensors; gradients"),
        (ties(("a", ""), more="parameters: {lambda: [{filter: mlp, value: 1}]}"), "lambda must be one value for all"),
        (sliced((0, 2), (2, 3), own=("lambda: 1", "")), "lambda must be one value for all tensors"),
        (sliced((1, 3)), r"slices\[0\] does not take the layers that follow, .* but .*1, 3"),
        (sliced((0, 2), (1, 3)), r"slices\[1\] does not take the layers that follow"),
        (sliced((0, 2), (3, 4)), r"slices\[1\] does not take the layers that follow"),
        (sliced((2, 2)), r"slices\[0\], sources has layer_range \[2, 2\]; write .first, last"),
        (sliced((0, "x")), r"slices\[0\], sources has layer_range \[0, 'x'\]; write \[first, last"),
        (sliced((0, 3)).replace("[0, 3]", "[0, 2]", 1), r"slices\[0\] .* \[\(0, 2\), \(0, 3\)\]; stack"),
        (sliced((0, 2), (2, 3)).replace("a, layer_range: [2", "b, layer_range: [2"), f"{OTHERS}, or another order of"),
        (sliced((0, 2), (2, 3)) + "    base_model: a\n", OTHERS),
        (f"{TIES}\nslices: [{{residual_weight: 1}}]", r"slices\[0\] has the key 'residual_weight'; supported are"),
    ],
)
def test_files_that_ask_for_something_else(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ties(("a", "")), "merge.yaml gives no weight for 'model.embed_tokens.weight' in 'a'; write it"),
        (ties(("a", "weight: {filter: x, value: 1}")), "merge.yaml gives no weight for 'model.embed_tokens.weight'"),
        (models("slerp", ("a", "t: 1")), "merge.yaml gives no t for 'model.embed_tokens.weight'; write it under param"),
        (models("linear", ("a", "weight: 1")), "merge.yaml gives no weight for 'model.embed_tokens.weight' in 'base'"),
        (ties(("a", "weight: 1, density: 0")), r"tensor 'model.embed_tokens.weight': density must lie in \(0"),
        (ties(("a", "weight: .nan")), "tensor 'model.embed_tokens.weight': a weight must be finite, got nan"),
        (models("linear", ("a", "weight: 0"), base=None), "a mean of models divides by the sum of .* use normal"),
        (sliced((0, 2), own=["weight: 1"]), r"the slices of merge.yaml are 2 layers, but the models have 3 \("),
        (sliced((0, 4), own=["weight: 1"]), r"are 4 layers, but the models have 3 \(model.layers\); sl"),
    ],
)
def test_tensors_that_a_file_does_not_fit(read, text, message):
    recipe = read(text)
    with pytest.raises(ValueError, match=message):
        recipe.coefficients(NAMES)


def test_slices_of_models_with_several_stacks_or_none(read):
    recipe = read(sliced((0, 3), own=["weight: 1"]))
    with pytest.raises(ValueError, match=r"the models have 3 \(model.layers\) and 1 \(vision.blocks\)"):
        recipe.coefficients([*NAMES, "vision.blocks.0.proj"])
    with pytest.raises(ValueError, match="are 3 layers, but the models have 0; slices must be all"):
        recipe.coefficients([EMBED])


def test_files_and_folders_that_are_not_there(read):
    with pytest.raises(FileNotFoundError, match=r"models\[0\] is 'org/name', but there is no such folder; nothing is"):
        read(ties(("org/name", "")))
    with pytest.raises(FileNotFoundError, match=r"other\.yaml"):
        read_mergekit("other.yaml")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "merge.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"merge.yaml is not one YAML document: .*can't decode"):
        read_mergekit(tmp_path / "merge.yaml")


def test_without_a_reader_of_yaml(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ModuleNotFoundError, match=r"read with PyYAML: pip install 'fused_merge\[cli\]'"):
        read_mergekit("merge.yaml")


# --- the command line

COMMANDS = {
    "breadcrumbs": ("a=0.6 b=0.3", "--base base --density 0.7 --gamma 0.1", "{weight: 0.6}", "{weight: 0.3}"),
    "della_linear": ("a=0.6 b=0.3", "--base base --density 0.5 --epsilon 0.2", "{weight: 0.6}", "{weight: 0.3}"),
    "nearswap": ("a=0.02", "--base base", "{}", None),
    "model_stock": ("a=1 c=1", "--base base", "{}", "{}"),
    "nuslerp": ("a=1 b=3", "", "{weight: 1}", "{weight: 3}"),
}


@pytest.mark.parametrize("method", COMMANDS)
def test_a_command_and_a_file_say_the_same(method, run, tmp_path, monkeypatch):
    monkeypatch.chdir(DATA)
    named, options, *parameters = COMMANDS[method]
    entries = [(each[0], own) for each, own in zip(named.split(), parameters, strict=False)]
    base = "base_model: base\n" if "--base" in options else ""
    more = "parameters: {density: %s, gamma: 0.1, epsilon: 0.2, t: 0.02}\n" % (0.7 if "crumbs" in method else 0.5)
    text = f"merge_method: {method}\n{base}{more}models:\n"
    text += "".join(f"  - model: {name}\n    parameters: {own}\n" for name, own in entries)
    (tmp_path / "merge.yaml").write_text(text)
    asked = [word for each in named.split() for word in ("--model", each)]
    command, file = tmp_path / "command", tmp_path / "file"
    assert run("merge", *asked, *options.split(), "--method", method, "--out", command) == (0, f"{command}\n", "")
    assert run("merge", tmp_path / "merge.yaml", file) == (0, f"{file}\n", "")
    made, other = load(command), load(file)
    assert all(torch.equal(made[name], other[name]) for name in made)
    assert not all(torch.equal(made[name], load(DATA / "base")[name]) for name in made)
