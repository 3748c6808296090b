"""Merges of finished models: which models and tensors, what is written, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from bits import same_bits
from folders import everything_in, load, manifest_of, recipe_of
from merge_models import CASES, FILLED, NAMES, NORM, SCALAR, SHAPES, UP0, UP1, arguments_of, tensors_of, write
from safetensors.torch import load_file, save_file
from tiny import llama, save
from transformers import LlamaForCausalLM

from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.checkpoints.interpolate import interpolate_checkpoints
from fused_merge.eager.merge import merge as eager_merge
from fused_merge.merge import merge
from fused_merge.merge.merge import merge_checkpoints, plan_merge
from fused_merge.merge.options import MergePlanOptions
from fused_merge.methods import MERGE_METHODS
from fused_merge.options import options_of

# --- what is written


def test_folders_that_transformers_loads(tmp_path):
    originals = [llama(i, dtype=torch.bfloat16) for i in range(3)]
    originals[1].generation_config.temperature = 0.25
    originals[1].generation_config.do_sample = True
    folders = [save(model, tmp_path / name, "3KB") for name, model in zip(NAMES, originals, strict=False)]
    (folders[1] / "tokenizer.json").write_text("{}")
    models, options = {folders[1]: 0.5, folders[2]: 0.3}, {"config_from": folders[1], "overwrite": True}
    for size, files in ((None, True), ("5KB", True), ("1GB", False)):
        out = tmp_path / "out"
        merge_checkpoints(folders[0], models, "task_arithmetic", out, max_shard_size=size, **options)
        assert (out / "model.safetensors.index.json").exists() == files
        loaded = LlamaForCausalLM.from_pretrained(out, dtype="auto")
        assert loaded.generation_config.temperature == 0.25
        assert (out / "tokenizer.json").read_text() == "{}"
        states = [model.state_dict() for model in originals]
        for name, tensor in loaded.state_dict().items():
            thetas = [state[name] for state in states[1:]]
            want = eager_merge(states[0][name], thetas, [0.5, 0.3], method="task_arithmetic", name=name)
            assert same_bits(tensor, want), name


def test_the_card_has_the_recipe(models, tmp_path):
    folders, _ = models(*[torch.float16] * 3, shapes=FILLED)
    weights = {folders[0]: 0.5, folders[2]: 0.25}
    out = merge_checkpoints(folders[1], weights, "dare_ties", tmp_path / "merged", density=0.5)
    assert verify_checkpoint(out) == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    card = (out / "README.md").read_text()
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == recipe_of(out)
    assert "# merged" in card
    assert "Yu et al. 2024 (arXiv 2311.03099)" in card


def rerun(recipe, out):
    """The call that a recipe tells of."""
    models = recipe["models"]
    base = None if recipe["base"] is None else recipe["base"]["path"]
    options = {name: recipe[name] for name in options_of(MergePlanOptions) if name in recipe}
    for name in ("density", "gamma", "epsilon"):
        numbers = [model.get(name) for model in models]
        options[name] = numbers if any(number is not None for number in numbers) else None
    return plan_merge(base, {each["path"]: each["weight"] for each in models}, recipe["method"], out, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_is_everything_that_it_takes(case, models, tmp_path):
    method, weights, options, has_base = arguments_of(case)
    options = {"max_shard_size": "3KB", "dtype": "float32", **options}
    folders, _ = models(*[torch.bfloat16] * (len(weights) + has_base))
    if "density" in options and len(weights) > 1 and method != "della":
        options["density"] = [{UP0: 0.25, ".*": 0.5}, *options["density"][1:]]
    if method != "model_stock":
        weights = [{r".*\.layers\.0.*": np.float32(weights[0]), ".*": torch.tensor(0.5)}, *weights[1:]]
    base, own = folders[0] if has_base else None, dict(zip(folders[has_base:], weights, strict=True))
    out = merge_checkpoints(base, own, method, tmp_path / "out", config_from=folders[-1], **options)
    recipe = recipe_of(out)
    assert recipe["method"] == method
    assert rerun(recipe, out).identity == manifest_of(out)["plan"]
    (again,) = rerun(recipe, tmp_path / "again" / "out").run()
    assert everything_in(again) == everything_in(out)


# --- weights and densities by name


def test_weights_and_densities_by_regular_expression(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.float32] * 3)
    weights = {UP0: 0.9, r"model\.layers\.\d+\..*": 0.6, ".*": 0.1}
    densities = {r".*layers.*": 0.4, ".*": 1.0}
    own = {folders[1]: weights, folders[2]: 0.3}
    made = load(merge_checkpoints(folders[0], own, "ties", tmp_path / "out", density=[densities, 0.7]))
    for name, weight, density in ((UP0, 0.9, 0.4), (UP1, 0.6, 0.4), (NORM, 0.1, 1.0), (SCALAR, 0.1, 1.0)):
        thetas = [own[name] for own in tensors[1:]]
        want = eager_merge(tensors[0][name], thetas, [weight, 0.3], method="ties", name=name, densities=[density, 0.7])
        assert same_bits(made[name], want)


def test_one_density_for_all_models_and_none_for_some(models, tmp_path):
    folders, tensors = models(*[torch.float32] * 3)
    weights = dict.fromkeys(folders[1:], 1.0)
    for i, (density, first) in enumerate(((0.3, 0.3), ((0.3, 0.3), 0.3), ([None, 0.3], 1.0))):
        made = load(merge_checkpoints(folders[0], weights, "ties", tmp_path / str(i), density=density))
        for name in SHAPES:
            thetas = [own[name] for own in tensors[1:]]
            want = eager_merge(tensors[0][name], thetas, [1, 1], method="ties", name=name, densities=[first, 0.3])
            assert same_bits(made[name], want)


# --- tensors that are not merged, or not in all models


@pytest.mark.parametrize("config_source", [0, 1, 2])
def test_integers_and_booleans_come_from_the_model_whose_files_go_along(config_source, models, tmp_path, small_blocks):
    folders, _ = models(*[torch.float32] * 3)
    own = []
    for i, folder in enumerate(folders):
        file = sorted(folder.glob("*.safetensors"))[-1]
        own.append({"flag": torch.arange(9000) % (i + 2) == 0, "half": torch.full((3,), i, dtype=torch.uint16)})
        save_file({**load_file(file), **own[-1]}, file)
        if (index := folder / "model.safetensors.index.json").exists():
            listed = json.loads(index.read_text())["weight_map"]
            index.write_text(json.dumps({"weight_map": {**listed, "flag": file.name, "half": file.name}}))
    both, source = dict.fromkeys(folders[1:], 1), folders[config_source]
    made = load(merge_checkpoints(folders[0], both, "ties", tmp_path / "out", config_from=source))
    assert torch.equal(made["flag"], own[config_source]["flag"])
    assert made["half"].dtype == torch.uint16
    assert made["half"].tolist() == [config_source] * 3
    assert made["count"].tolist() == [*range(config_source, config_source + 5)]


def test_models_of_nothing_but_integers(tmp_path):
    folders = [write(tmp_path / name, {"count": torch.arange(4) + i}) for i, name in enumerate(NAMES)]
    for trim in ("tensor", "model"):
        out = merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / trim, density=0.5, trim=trim)
        assert load(out)["count"].tolist() == [0, 1, 2, 3]


def test_tensors_that_not_all_hold(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.bfloat16] * 3)
    adapter = torch.randn(1500).bfloat16()
    save_file({**load(folders[2]), "adapter": adapter}, folders[2] / "part-1.safetensors")
    (folders[2] / "part-0.safetensors").unlink()
    weight_map = dict.fromkeys([*tensors[2], "adapter"], "part-1.safetensors")
    (folders[2] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    arguments = folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties"
    with pytest.raises(ValueError, match=r"base lacks 'adapter' of .*b; both must hold the same tensors"):
        merge_checkpoints(*arguments, tmp_path / "out")
    dropped = load(merge_checkpoints(*arguments, tmp_path / "drop", unmatched="drop"))
    assert dropped.keys() == {*SHAPES, "count"}
    copied = load(merge_checkpoints(*arguments, tmp_path / "copy", unmatched="copy"))
    assert same_bits(copied.pop("adapter"), adapter)
    assert all(same_bits(copied[name], dropped[name]) for name in dropped)
    as_fp32 = load(merge_checkpoints(*arguments, tmp_path / "fp32", unmatched="copy", dtype="float32"))
    assert same_bits(as_fp32["adapter"], adapter.float())


VOCABULARY = {"embed.weight": (40, 30), "norm.weight": (30,)}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "della", "slerp"])
@pytest.mark.parametrize("config_source", [0, 1])
def test_vocabularies_of_two_sizes(method, config_source, models, tmp_path, small_blocks):
    folders, tensors = models(torch.float32, torch.float32, shapes=VOCABULARY)
    longer = torch.cat([tensors[1]["embed.weight"], torch.randn(3, 30)])
    folders[1] = write(tmp_path / "longer", {**tensors[1], "embed.weight": longer})
    has_base = MERGE_METHODS[method].has_base
    weights = [0.3] if has_base else [0.4, 0.3]
    arguments = folders[0] if has_base else None, dict(zip(folders[has_base:], weights, strict=True)), method
    with pytest.raises(ValueError, match=r"'embed.weight' is \[40, 30\] and \[43, 30\]; pass align_vocabulary=True"):
        merge_checkpoints(*arguments, tmp_path / "out")
    density = None if method in ("linear", "slerp") else 0.5
    options = {"align_vocabulary": True, "config_from": folders[config_source], "threads": 3, "density": density}
    made = load(merge_checkpoints(*arguments, tmp_path / "out", **options))["embed.weight"]
    base, *thetas = [*([] if has_base else [None]), tensors[0]["embed.weight"], longer[:40]]
    densities = None if density is None else [density]
    want = eager_merge(base, thetas, weights, method=method, name="embed.weight", densities=densities)
    assert same_bits(made[:40], want)
    assert same_bits(made[40:], longer[40:] if config_source else longer[:0])


# --- which models, and where


def test_bare_files_of_one_folder(tmp_path):
    (tmp_path / "runs").mkdir()
    files = [tmp_path / "runs" / f"{name}.safetensors" for name in NAMES[:3]]
    for i, file in enumerate(files):
        save_file(tensors_of(i), file)
    out = merge_checkpoints(files[0], {files[1]: 0.5, str(files[2]): 0.5}, "ties", tmp_path / "runs" / "merged")
    assert sorted(os.listdir(out)) == ["README.md", "fused_merge.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "runs")) == ["a.safetensors", "b.safetensors", "base.safetensors", "merged"]
    with pytest.raises(ValueError, match=r"runs holds the input .*base.safetensors, which it would replace"):
        merge_checkpoints(files[0], {files[1]: 0.5}, "ties", tmp_path / "runs", overwrite=True)


def test_a_model_given_twice_counts_twice_and_the_base_may_be_one(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    twice = {folders[1]: 0.25, str(folders[1]): 0.25}
    made = load(merge_checkpoints(folders[0], twice, "task_arithmetic", tmp_path / "twice"))
    once = load(merge_checkpoints(folders[0], {folders[1]: 0.5}, "task_arithmetic", tmp_path / "once"))
    assert all(same_bits(made[name], once[name]) for name in made)
    # Each time with a mask of its own.
    made = load(merge_checkpoints(folders[0], twice, "dare_linear", tmp_path / "dare2", density=0.5))
    once = load(merge_checkpoints(folders[0], {folders[1]: 0.5}, "dare_linear", tmp_path / "dare1", density=0.5))
    assert not torch.equal(made[UP0], once[UP0])
    made = load(merge_checkpoints(folders[0], {folders[0]: 0.5}, "task_arithmetic", tmp_path / "out"))
    assert all(same_bits(made[name], tensors[0][name]) for name in SHAPES)


def test_spellings_of_the_model_whose_files_go_along(models, tmp_path, monkeypatch):
    folders, _ = models(*[torch.float32] * 3)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"from": folder.name}))
    monkeypatch.chdir(tmp_path)
    spellings = [(None, "base"), ("base", "base"), (Path("a"), "a"), ("a/", "a"), ("./b//", "b"), (Path("b"), "b")]
    asked = [(("base", {"a/": 1, Path("b"): 1}, "ties"), *each) for each in spellings]
    # Without a base, "base" is a folder of that name.
    asked += [((None, {"a": 1, "base": 1}, "linear"), *each) for each in (("base", "base"), (None, "a"))]
    for arguments, config_from, want in asked:
        merge_checkpoints(*arguments, "out", config_from=config_from, overwrite=True)
        assert json.loads(Path("out/config.json").read_text()) == {"from": want}


def test_a_line_is_a_task_arithmetic_of_one_model(models, tmp_path):
    folders, _ = models(torch.bfloat16, torch.bfloat16)
    (line,) = interpolate_checkpoints(*folders, [0.25], tmp_path / "line")
    merged = merge_checkpoints(folders[0], {folders[1]: 0.25}, "task_arithmetic", tmp_path / "out")
    assert all(same_bits(load(line)[name], load(merged)[name]) for name in SHAPES)


# --- sentences

LINEAR = {"method": "linear", "base": None}
CANCELS = f"'{UP1}': a mean of models divides by the sum of .1.0, -1.0"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "tie"}, ValueError, "unknown merge method 'tie'; the methods are 'linear', 'slerp', 'nuslerp"),
        ({"base": None}, ValueError, "method 'ties' starts from a base; pass one"),
        ({"method": "linear"}, ValueError, "method 'linear' has no base; pass None, and it as a model"),
        ({"models": {}}, ValueError, "there is no model to merge; pass at least one"),
        ({"models": ["a", "b"]}, TypeError, "models must map paths to weights, got a list; write {path: weight}"),
        ({"models": {3: 1.0}}, TypeError, "a model must be the path of a safetensors file or a model folder, not a i"),
        ({"models": {"gone": 1.0}}, FileNotFoundError, "gone does not exist; give a local .safetensors file"),
        ({"models": {"a": "1"}}, TypeError, "a weight must be a number, got '1'"),
        ({"models": {"a": float("nan")}}, ValueError, "a weight must be finite, got nan"),
        ({"models": {"a": {"count": 1, ".*": 1}}}, ValueError, "weight key 'count' matches no tensor"),
        ({"models": {"a": {"x": 1}}}, ValueError, "no weight is given for 'model.layers.0.mlp.up_proj.weight'"),
        ({"method": "slerp"}, ValueError, ".*: method 'slerp' goes from the base to one model, got 2 models"),
        ({"method": "slerp", "normalize": True}, ValueError, "method 'slerp' has no option 'normalize'"),
        ({"rescale": True}, ValueError, "method 'ties' has no option 'rescale': it drops nothing at random"),
        (LINEAR | {"models": {"a": 1, "b": -1}}, ValueError, CANCELS),
        (LINEAR | {"scale": 2}, ValueError, "method 'linear' has no option 'scale'"),
        ({"method": "nuslerp", "models": {"a": 1}}, ValueError, "'nuslerp' goes from one model to another, got 1 bes"),
        ({"method": "model_stock"}, ValueError, r"'model_stock' has no weights: angles decide; .* 1, not \[1.0, 0.5\]"),
        ({"method": "nearswap", "models": {"a": -1}}, ValueError, "t of method 'nearswap' is a distance and must not"),
        ({"gamma": 0.1}, ValueError, "method 'ties' has no option 'gamma'; leave it out"),
        ({"method": "della", "gamma": 0.1}, ValueError, "method 'della' has no option 'gamma'; leave it out"),
        ({"method": "della", "epsilon": 0.1}, ValueError, "epsilon changes nothing where everything is kept; give a d"),
        ({"method": "della", "density": 0.9}, ValueError, r"density \+ epsilon at most 1, got 0.9, 0.15"),
        ({"method": "breadcrumbs", "gamma": [0.5]}, ValueError, "2 models need one gamma or as many, got 1"),
        ({"density": [0.5]}, ValueError, "2 models need one density or as many, got 1"),
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must lie in \(0, 1\], got 1.5"),
        ({"density": {UP0: 0.5}}, ValueError, "no density is given for 'model.layers.1.mlp.up_proj.weight'"),
        ({"method": "task_arithmetic", "density": 0.5}, ValueError, "'task_arithmetic' has no option 'density'"),
        ({"trim": "model", "method": "dare_ties"}, ValueError, "method 'dare_ties' has no option trim='model'"),
        ({"trim": "model", "density": {UP0: 0.5, ".*": 0.2}}, ValueError, "give one density for each model, and tens"),
        ({"config_from": "tuned"}, ValueError, "config_from must be one of 'base', 'a', 'b', got 'tuned'"),
        ({"models": {"a": 1}, "config_from": "b"}, ValueError, "config_from must be one of 'base', 'a', got 'b'"),
        (LINEAR | {"config_from": "base"}, ValueError, "config_from must be one of 'a', 'b', got 'base'"),
        ({"densty": 0.5}, TypeError, "there is no option 'densty'; did you mean 'density'?"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_is_written(change, kind, message, models, tmp_path, monkeypatch):
    models(*[torch.float32] * 3)
    monkeypatch.chdir(tmp_path)
    arguments = {"base": "base", "models": {"a": 1.0, "b": 0.5}, "method": "ties", "out": "out"}
    with pytest.raises(kind, match=message):
        merge_checkpoints(**{**arguments, **change})
    assert sorted(os.listdir()) == ["a", "b", "base"]


def test_rows_that_are_too_long_to_rank(models, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "_LONGEST_ROW", 100)
    folders, _ = models(torch.float32, torch.float32)
    message = f"'{UP1}' has rows of 1025 elements, and 'della_linear' ranks at most 100; keep all of it with a density"
    with pytest.raises(ValueError, match=message):
        plan_merge(folders[0], {folders[1]: 1}, "della_linear", tmp_path / "out", density=0.5)
    plan_merge(folders[0], {folders[1]: 1}, "della_linear", tmp_path / "out", density={UP1: 1.0, ".*": 0.5})


def test_a_trim_over_models_of_two_precisions(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    write(tmp_path / "mixed", {**tensors[1], NORM: tensors[1][NORM].double()})
    with pytest.raises(ValueError, match="give one density for each model, and tensors that are all float64 or none"):
        plan_merge(folders[0], {tmp_path / "mixed": 1}, "ties", tmp_path, density=0.5, trim="model", dtype="float32")
