"""Deltas that know their model's order of parameters, and what an optimizer makes of parameters without names."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from bits import same_bits
from deltas import assert_same
from families import FAMILIES, family_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import llama, save

import fused_merge as fm
from fused_merge.delta.reference_delta import ReferenceDelta


def bare_files(folder, models):
    """The files of two models, with no configuration beside them, and the folder that has it."""
    files = []
    for i, model in enumerate(models):
        model.save_pretrained(folder / "model")
        files.append(folder / f"{i}.safetensors")
        (folder / "model" / "model.safetensors").rename(files[-1])
    return *files, folder / "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_gives_files_the_names_and_the_order_of_the_model(family, tmp_path):
    models = [family_model(family, seed) for seed in (0, 1)]
    base, tuned, config = bare_files(tmp_path, models)
    whole = ReferenceDelta.from_models(*models)
    assert not ReferenceDelta.from_checkpoints(base, tuned).ordered
    delta = ReferenceDelta.from_checkpoints(base, tuned, config=config)
    assert_same(delta, whole)
    assert delta.names == tuple(name for name, _ in models[0].named_parameters())
    assert delta.ordered
    states = (load_file(base), load_file(tuned))
    of_states = ReferenceDelta.from_models(*states, config=config / "config.json")
    assert (of_states.names, of_states.identity, of_states.ordered) == (delta.names, delta.identity, True)


def test_a_path_alone_steps_parameters_without_names(tmp_path):
    base, tuned, config = bare_files(tmp_path, [llama(0), llama(1)])
    saved = ReferenceDelta.from_checkpoints(base, tuned, config=config).save(tmp_path / "tau.safetensors")
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["ordered"]) is True
    models = [llama(1), llama(1)]
    for model, given in zip(models, (models[0].parameters(), models[1].named_parameters()), strict=True):
        optimizer = fm.OnDAREAdamW(given, reference_delta=str(saved), alpha=0.3, reserve_rate=0.5, lr=1e-2)
        torch.manual_seed(0)
        model(torch.randint(48, (2, 8)), labels=torch.randint(48, (2, 8))).loss.backward()
        optimizer.step()
    assert all(map(same_bits, models[0].parameters(), models[1].parameters()))
    assert not any(map(same_bits, models[0].parameters(), llama(1).parameters()))


def test_a_delta_of_files_alone_says_how_it_learns_the_order(tmp_path):
    base, tuned, _ = bare_files(tmp_path, [llama(0), llama(1)])
    delta = ReferenceDelta.from_checkpoints(base, tuned)
    with pytest.raises(ValueError, match=r"or make the delta with config=, the folder of the model's config\.json"):
        fm.OnDAREAdamW(llama(1).parameters(), reference_delta=delta, lr=1e-3, reserve_rate=0.5).bind()


def test_files_from_before_the_order_was_saved(tmp_path):
    saved = ReferenceDelta.from_models(llama(0), llama(1)).save(tmp_path / "tau.safetensors")
    with safe_open(saved, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "ordered"}
    save_file(load_file(saved), saved, metadata=metadata)
    assert not ReferenceDelta.load(saved).ordered


def test_prefixes_are_stripped_before_the_model_is_asked(tmp_path):
    base, tuned, config = bare_files(tmp_path, [llama(0), llama(1)])
    for file in (base, tuned):
        save_file({f"net.{name}": tensor for name, tensor in load_file(file).items()}, file)
    delta = ReferenceDelta.from_checkpoints(base, tuned, config=config, strip_prefix="net.")
    assert_same(delta, ReferenceDelta.from_models(llama(0), llama(1)))
    assert delta.names == tuple(name for name, _ in llama(0).named_parameters())
    assert delta.ordered


def test_a_pickled_delta_finds_the_configuration_from_elsewhere(tmp_path, monkeypatch):
    base, tuned, _ = bare_files(tmp_path, [llama(0), llama(1)])
    monkeypatch.chdir(tmp_path)
    delta = ReferenceDelta.from_checkpoints(base, tuned, config="model")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(delta))
    assert (again.names, again.ordered, again.identity) == (delta.names, True, delta.identity)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ReferenceDelta.from_checkpoints("~/0.safetensors", "~/1.safetensors", config="~/model").ordered


def test_a_file_of_a_folder_has_its_configuration(tmp_path):
    files = [save(llama(seed), tmp_path / str(seed)) / "model.safetensors" for seed in (0, 1)]
    assert ReferenceDelta.from_checkpoints(*files).ordered


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        (None, FileNotFoundError, r"config\.json does not exist; give the folder with the configuration of the model"),
        (
            {},
            ValueError,
            r"Transformers makes no model of .*config\.json \(ValueError: .*\); give the conf",
        ),
        ({"model_type": "llama"}, ValueError, r"its 'architectures' are missing, not one class"),
        ({"architectures": ["Nobody"], "model_type": "llama"}, ValueError, r"makes no model of .* \(AttributeError: "),
        (
            "gpt2",
            ValueError,
            r"the model of .* does not have the tensors of .*0\.safetensors and .*1\.safetensors",
        ),
        ("more layers", ValueError, "does not have the tensors of"),
    ],
    ids=str,
)
def test_configurations_that_do_not_serve(config, error, sentence, tmp_path):
    base, tuned, folder = bare_files(tmp_path, [llama(0), llama(1)])
    if config is None:
        (folder / "config.json").unlink()
    elif config == "gpt2":
        FAMILIES["gpt2"][1]().save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
        (folder / "config.json").write_text(json.dumps(told))
    elif config == "more layers":
        told = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
        (folder / "config.json").write_text(json.dumps(told))
    else:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=sentence):
        ReferenceDelta.from_checkpoints(base, tuned, config=folder)
