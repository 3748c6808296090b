"""Models that Transformers loads by itself, those that a function of the caller loads, and those that neither does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import llama, save
from word_tokens import tokenizer

from fused_merge.io.transformers import ModelLoader, text_tokenizer

CPU = torch.device("cpu")


def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "falcon", "architectures": ["RWForCausalLM"]}, "AutoModelForCausalLM"),
        ({"model_type": "llava"}, "AutoModelForImageTextToText"),
        # Of two classes the one that wrote the folder; a text model alone would leave out the images' weights.
        ({"model_type": "mllama", "architectures": ["MllamaForCausalLM"]}, "AutoModelForCausalLM"),
        (
            {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]},
            "AutoModelForImageTextToText",
        ),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_loads_a_folder(config, kind, tmp_path, monkeypatch):
    asked = []
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        loads = lambda folder, *, name=name, **options: asked.append((name, folder, options)) or torch.nn.Linear(1, 1)  # noqa: E731
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loads)
    folder = write_config(tmp_path / "m", **config)
    model, nothing = ModelLoader(folder).load(CPU, torch.bfloat16, tokenizer=False)
    options = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.bfloat16}
    assert asked == [(kind, folder, options)]
    assert (model.training, model.weight.requires_grad, nothing) == (False, False, None)


def test_a_vision_language_model(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4), text_config=llama(0).config
    )
    folder = save(transformers.LlavaForConditionalGeneration(config), tmp_path / "m")
    words = tokenizer()
    words.save_pretrained(folder)
    model, found = ModelLoader(folder).load(CPU, None)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    # Without the processor of images it is asked in words.
    assert text_tokenizer(found).vocab_size == words.vocab_size


@pytest.mark.parametrize(
    ("config", "holds"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "holds a BertForMaskedLM"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "holds a LlamaForSequenceClass"),
        ({"model_type": "t5"}, "holds a t5"),
        ({}, "holds a model without a type"),
    ],
)
def test_a_model_that_no_class_loads(config, holds, tmp_path):
    rest = r"which neither AutoModelForCausalLM nor AutoModelForImageTextToText of Transformers loads; pass loader="
    with pytest.raises(ValueError, match=rf"m {holds}.* {rest}'module:function' with a function that does"):
        ModelLoader(write_config(tmp_path / "m", **config))


def test_a_folder_without_a_configuration(tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no configuration of a model; correct it"):
        ModelLoader(tmp_path / "list")
    with pytest.raises(FileNotFoundError, match=r"has no config.json, .*; give a model folder, or pass loader="):
        ModelLoader(tmp_path)


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_words"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_folder_is_run_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = save(llama(0), tmp_path / "m")
    marker = tmp_path / "was_run"
    (folder / "own.py").write_text(CODE + f"open({str(marker)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_config(folder, **config | {"model_type": "own_words", "architectures": ["OwnModel"], "auto_map": own})
    sentence = r"m needs code of its own \(auto_map in config.json\), which is not run; pass trust_remote_code=True if"
    with pytest.raises(ValueError, match=sentence):
        ModelLoader(folder)
    assert not marker.exists()
    model, _ = ModelLoader(folder, trust_remote_code=True).load(CPU, None, tokenizer=False)
    assert (type(model).__name__, marker.exists()) == ("OwnModel", True)
    assert torch.equal(model.lm_head.weight, llama(0).lm_head.weight)


LOADERS = """
import torch
asked = []
def plain(folder, device, dtype):
    asked.append((folder, device, dtype))
    return torch.nn.Linear(3, 1, device=device, dtype=dtype)
def with_words(folder, device, dtype=None):
    return plain(folder, device, dtype), "words"
def fails(*arguments): raise KeyError("no such layer")
def nothing(folder, device, dtype): return {"weight": 1}
def short(folder): pass
"""


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    (tmp_path / "own_loaders.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_loaders", None)


def test_a_function_that_loads(loaders, tmp_path):
    # Neither a configuration nor a tokenizer is needed.
    model, words = ModelLoader(tmp_path, loader="own_loaders:plain").load(CPU, torch.float64, tokenizer=False)
    assert (model.weight.dtype, model.training, model.weight.requires_grad, words) == (
        torch.float64,
        False,
        False,
        None,
    )
    assert ModelLoader(tmp_path, loader="own_loaders:with_words").load(CPU, None)[1] == "words"
    assert sys.modules["own_loaders"].asked == [(tmp_path, CPU, torch.float64), (tmp_path, CPU, None)]
    tokenizer().save_pretrained(tmp_path)
    write_config(tmp_path, model_type="llama")
    assert ModelLoader(tmp_path, loader="own_loaders:plain").load(CPU, None)[1].vocab_size == 48


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("own_loaders", ValueError, "'own_loaders' is no loader; write module:function"),
        ("own_loaders:gone", ValueError, "has no function 'gone'; correct the loader 'own_loaders:gone'"),
        (
            "own_loaders:short",
            ValueError,
            r"loader 'own_loaders:short' takes \(folder\); let it take \(folder, device, d",
        ),
        (
            "own_loaders:fails",
            RuntimeError,
            "loader 'own_loaders:fails' raised KeyError: 'no such layer' for .*; correct",
        ),
        ("own_loaders:nothing", ValueError, r"returned a dict; let it return a model, or \(model, tokenizer\)"),
    ],
)
def test_functions_that_do_not_load(name, error, sentence, loaders):
    with pytest.raises(error, match=sentence):
        ModelLoader(Path("m"), loader=name).load(CPU, None)
