"""Folders for many ratios; nothing left behind when something fails."""

from __future__ import annotations

import json
import os
import shutil
from types import MappingProxyType

import numpy as np
import pytest
import torch
from bits import same_bits
from folders import everything_in, load, manifest_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama, save
from transformers import LlamaForCausalLM

from fused_merge.checkpoints.interpolate import interpolate_checkpoints, plan_interpolation
from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.interpolation.interpolate import interpolate

RATIOS = [0.0, 0.1, 0.125, 1.0, -0.5]
NAMES = ["r0.00", "r0.10", "r0.125", "r1.00", "r-0.50"]


@pytest.fixture
def models():
    return llama(0, dtype=torch.bfloat16), llama(1, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    place = tmp_path_factory.mktemp("stored")
    return [save(llama(i, dtype=torch.bfloat16), place / name) for i, name in enumerate(("base", "tuned"))]


@pytest.fixture
def folders(stored, tmp_path):
    """Two models that a test may change."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in stored]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_folders_that_transformers_loads(models, tmp_path):
    base, tuned = models
    tuned.generation_config.temperature = 0.25
    tuned.generation_config.do_sample = True
    ends = save(base, tmp_path / "base", shard="3KB"), save(tuned, tmp_path / "tuned")
    out = tmp_path / "new" / "out"
    made = interpolate_checkpoints(*ends, RATIOS, str(out))
    assert made == [out / name for name in NAMES]
    assert sorted(os.listdir(out)) == sorted(NAMES)

    points = interpolate(base.state_dict(), tuned.state_dict(), RATIOS)
    for folder, point, ratio in zip(made, points, RATIOS, strict=True):
        weights = sorted(path.name for path in ends[0].glob("*.safetensors"))
        assert sorted(path.name for path in folder.glob("*.safetensors")) == weights
        for file in weights:
            with safe_open(ends[0] / file, "pt") as original, safe_open(folder / file, "pt") as copy:
                assert copy.keys() == original.keys()
                assert copy.metadata() == original.metadata()
        index = "model.safetensors.index.json"
        assert json.loads((folder / index).read_text()) == json.loads((ends[0] / index).read_text())

        loaded = LlamaForCausalLM.from_pretrained(folder)
        assert (loaded.generation_config.temperature == 0.25) == (ratio != 0)
        for name, tensor in loaded.state_dict().items():
            assert same_bits(tensor, point[name]), name


def test_overwrite_replaces_whole_folders(folders, out):
    (folder,) = interpolate_checkpoints(*folders, [0.5], out)
    (folder / "old").touch()
    before = everything_in(folder)
    with pytest.raises(FileExistsError, match=r"r0\.50 exists; pass overwrite=True to replace a folder, or choose"):
        interpolate_checkpoints(*folders, [0.25, 0.5], out)
    assert (os.listdir(out), everything_in(folder)) == (["r0.50"], before)
    interpolate_checkpoints(*folders, [0.5], out, overwrite=True)
    assert not (folder / "old").exists()
    assert os.listdir(out) == ["r0.50"]
    (out / "r0.75").touch()
    with pytest.raises(FileExistsError, match=r"r0\.75 exists"):
        interpolate_checkpoints(*folders, [0.75], out, overwrite=True)


@pytest.mark.parametrize(
    ("ratios", "names"),
    [
        ([0.1, 1, 2, -0.0], ["r0.10", "r1.00", "r2.00", "r0.00"]),
        ([0.1 + 0.2, 1 / 3], ["r0.30", "r0.333333333"]),
        ([1e-7, 0.995], ["r1e-07", "r0.995"]),
        (torch.linspace(0, 1, 5).tolist(), ["r0.00", "r0.25", "r0.50", "r0.75", "r1.00"]),
    ],
)
def test_names_of_folders(ratios, names, stored, out):
    assert [folder.name for folder in plan_interpolation(*stored, ratios, out).outputs] == names


@pytest.mark.parametrize(
    ("error", "ratios", "message"),
    [
        (ValueError, [], "ratios is empty"),
        (ValueError, [0.1, float("inf")], "a ratio must be finite, got inf"),
        (ValueError, [0.5, 0.25, 0.5], r"ratios 0.5 and 0.5 would share the folder r0.50; drop one"),
        (ValueError, [0.3, 0.1 + 0.2], "would share the folder r0.30"),
        (ValueError, [0.0, -0.0], "would share the folder r0.00"),
        (TypeError, 0.5, r"ratios must be a sequence, got 0.5; put it into a list"),
        (TypeError, "0.5", "a ratio must be a number, got '0'"),
        (TypeError, {"half": "0.5"}, "a ratio must be a number, got '0.5'"),
        (TypeError, [{".*": "0.5"}], r"a ratio of '\.\*' must be a number, got '0.5'"),
        *((ValueError, {label: 0.5}, rf"{label!r} cannot name the folder of a ratio; use a plain name such as")
          for label in ("", "a/b", "..", ".hidden", 5)),
    ],
)  # fmt: skip
def test_ratios_that_are_none(error, ratios, message, stored, out):
    with pytest.raises(error, match=message):
        interpolate_checkpoints(*stored, ratios, out)
    assert not out.exists()


def test_only_paths(out):
    with pytest.raises(TypeError, match="base must be the path of a safetensors file or a model folder, not a dict"):
        interpolate_checkpoints({}, {}, [0.5], out)


def test_an_output_that_would_replace_an_input(folders, tmp_path):
    held = shutil.copytree(folders[0], tmp_path / "r0.50" / "base")
    message = r"r0\.50 holds the input .*model.safetensors, which it would replace; choose"
    for ends in ((held, folders[1]), (folders[0], held)):
        with pytest.raises(ValueError, match=message):
            interpolate_checkpoints(*ends, [0.5], tmp_path, overwrite=True)


def test_a_place_that_is_no_folder_and_a_disk_that_is_too_small(stored, out, monkeypatch):
    file = stored[0] / "model.safetensors"
    with pytest.raises(OSError, match=r"cannot write to .*/out: .*model\.safetensors is not a folder that you may wri"):
        interpolate_checkpoints(*stored, [0.5], file / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * file.stat().st_size))
    with pytest.raises(OSError, match=r"out needs .* GB of .* GB free; make room or write less at once"):
        interpolate_checkpoints(*stored, [0.1, 0.2, 0.3], out)
    assert not out.exists()


def test_a_disk_that_fills_up_on_the_way(tmp_path, out, request):
    ends = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for end in ends:
        save_file({"w": torch.zeros(2**16)}, end)
    request.getfixturevalue("_small_files")
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: File too large; nothing of it is left"):
        interpolate_checkpoints(*ends, [0.1, 0.2], out)
    assert os.listdir(out) == []


# --- configuration, files, names


def test_an_output_dtype_is_written_into_every_configuration(folders, tmp_path):
    stored = folders[1] / "config.json"
    config = json.loads(stored.read_text())

    def of(dtype):
        own = {"dtype": dtype, "torch_dtype": dtype}
        return own | {"text_config": {"dtype": dtype, "inner": {"torch_dtype": dtype}, "hidden_size": 16}}

    config |= {**of("bfloat16"), "quantizer": {"dtype": None}, "dtypes": ["bfloat16"], "name": "dtype"}
    stored.write_text(json.dumps(config))
    (plain,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "plain")
    assert (plain / "config.json").read_bytes() == stored.read_bytes()
    (wide,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "wide", dtype="float32")
    assert json.loads((wide / "config.json").read_text()) == config | of("float32")


@pytest.mark.parametrize(("size", "dtype"), [(1, None), (3000, "float32"), ("5GB", "float16")])
def test_files_by_size_that_transformers_loads_in_their_dtype(size, dtype, models, tmp_path):
    ends = [save(model, tmp_path / name, "3KB") for model, name in zip(models, ["base", "tuned"], strict=True)]
    (folder,) = interpolate_checkpoints(*ends, [0.3], tmp_path / "out", max_shard_size=size, dtype=dtype)
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (size != "5GB")
    if index.exists():
        listed = json.loads(index.read_text())
        assert listed["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert listed["metadata"]["total_size"] == sum(x.nbytes for xs in files.values() for x in xs.values())
    (point,) = interpolate(*(model.float().state_dict() for model in models), [0.3])
    for name, tensor in LlamaForCausalLM.from_pretrained(folder, dtype="auto").state_dict().items():
        assert same_bits(tensor, point[name].to(getattr(torch, dtype or "bfloat16"))), name


# --- ratios by name


def test_ratios_of_patterns_and_of_exact_names(folders, tmp_path):
    base, tuned = map(load, folders)
    patterns = {"model.norm.weight": 0.9, r"model\.layers\.\d+\.mlp\..*": np.float32(0.25), ".*": 0.5}
    by_name = {name: 0.9 if name == "model.norm.weight" else 0.25 if ".mlp." in name else 0.5 for name in base}
    assert {*by_name.values()} == {0.9, 0.25, 0.5}
    labeled = {"patterns": patterns, "names": MappingProxyType(by_name), "all": 0.25}
    folders_made = interpolate_checkpoints(*folders, labeled, tmp_path / "out")
    assert [folder.name for folder in folders_made] == ["patterns", "names", "all"]
    for folder, ratio_of in zip(folders_made, (by_name.get, by_name.get, lambda name: 0.25), strict=True):
        made = load(folder)
        for name in base:
            assert same_bits(made[name], eager_interpolate(base[name], tuned[name], ratio_of(name))), name
    recipes = [manifest_of(folder)["recipe"]["ratio"] for folder in folders_made]
    assert recipes == [{**patterns, r"model\.layers\.\d+\.mlp\..*": 0.25}, by_name, 0.25]


# --- manifest and card


def test_the_recipe_is_everything_that_it_takes(folders, tmp_path):
    ratios = {"half": 0.5, "by name": {"model.norm.weight": np.float32(0.25), ".*": torch.tensor(0.75)}}
    asked = {"dtype": torch.float32, "unmatched": "copy", "config_from": "base", "max_shard_size": "3KB"}
    made = interpolate_checkpoints(*folders, ratios, tmp_path / "out", align_vocabulary=True, **asked)
    found = {}
    for folder in made:
        manifest = manifest_of(folder)
        recipe = manifest["recipe"]
        assert [recipe[end]["path"] for end in ("base", "tuned")] == [str(folder) for folder in folders]
        size = (folders[0] / "model.safetensors").stat().st_size
        assert recipe["base"]["bytes"] == {"model.safetensors": size}
        found[folder.name] = recipe["ratio"]
        card = (folder / "README.md").read_text()
        assert json.loads(card.split("```json\n")[1].split("```")[0]) == recipe
        assert f"# Ratio {folder.name}" in card
    options = ("dtype", "unmatched", "align_vocabulary", "config_from", "tokenizer_from", "max_shard_size")
    paths = (recipe[end]["path"] for end in ("base", "tuned"))
    again = plan_interpolation(*paths, found, tmp_path / "out", **{key: recipe[key] for key in options})
    assert again.identity == manifest["plan"]


def test_a_folder_made_twice_is_the_same(folders, tmp_path):
    first, again = (interpolate_checkpoints(*folders, [0.3], tmp_path / name) for name in ("first", "again"))
    assert everything_in(first[0]) == everything_in(again[0])
    assert interpolate_checkpoints(*folders, [0.3], tmp_path / "first") == first
