"""Sweeps between checkpoints, with scorers of a module, of models that Transformers or a function loads."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, save
from transformers import BertConfig, BertForMaskedLM
from word_tokens import tokenizer

from fused_merge.interpolation.interpolate import interpolate
from fused_merge.sweep.evaluate import sweep_checkpoints
from fused_merge.sweep.results import read_results
from fused_merge.sweep.scorers import ImportedScorer


def results_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def ends(tmp_path):
    """Two small models with a tokenizer."""
    folders = [save(llama(seed), tmp_path / name) for seed, name in enumerate(("base", "tuned"))]
    tokenizer().save_pretrained(folders[1])
    return folders


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write modules into the working directory, to be forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_checkpoints_are_scored_by_functions_of_a_module(ends, module, tmp_path):
    module(
        "my_scores",
        "import torch\n"
        "def total(model):\n"
        "    assert not model.training and not any(p.requires_grad for p in model.parameters())\n"
        "    return sum(p.double().sum() for p in model.parameters())\n"
        "def unknown(model, tokenizer, batch=8):\n"
        "    ids = tokenizer('w3 w4 c', return_tensors='pt')['input_ids']\n"
        "    assert ids.tolist() == [[3, 4, 0]]\n"
        "    return model(ids, labels=ids).loss\n",
    )
    scorers = ["my_scores:total", "my_scores:unknown"]
    files = sweep_checkpoints(*ends, [0, 0.3], tmp_path / "out", scorers=scorers, minimize=["unknown"])
    assert [file.name for file in files] == ["results.json", "results.md", "pareto.png"]
    rows = read_results(files[0]).finished
    points = interpolate(llama(0).state_dict(), llama(1).state_dict(), [0.0, 0.3])
    model = llama(2)
    for row, point in zip(rows, points, strict=True):
        model.load_state_dict(point)
        assert row.scores["total"] == pytest.approx(sum(p.double().sum().item() for p in model.parameters()))
        ids = torch.tensor([[3, 4, 0]])
        assert row.scores["unknown"] == model(ids, labels=ids).loss.item()
    belongs_to = results_of(tmp_path / "out")["sweep"]
    assert (belongs_to["scorers"], belongs_to["dtype"]) == (scorers, "float32")
    # A function of the same name in another module is another scorer.
    module("others", "def total(model):\n    return 1\ndef unknown(model):\n    return 1\n")
    with pytest.raises(ValueError, match="a sweep with other scorers"):
        sweep_checkpoints(*ends, [0, 0.3], tmp_path / "out", scorers=["others:total", "others:unknown"])
    assert set(results_of(tmp_path / "out")["sweep"]["checkpoints"]) == {"base", "tuned"}


def test_a_finished_sweep_loads_no_model_again(ends, module, tmp_path, monkeypatch):
    module("ones", "def one(model):\n    return 1\ndef two(model):\n    return 2\n")
    options = {"scorers": ["ones:one", "ones:two"]}
    sweep_checkpoints(*ends, [0, 1], tmp_path / "out", **options)
    (tmp_path / "out" / "pareto.png").unlink()
    monkeypatch.setattr("fused_merge.sweep.evaluate.ModelLoader.load", pytest.fail)
    assert sweep_checkpoints(*ends, [0, 1], tmp_path / "out", **options)[2].exists()


def test_the_model_has_the_dtype_of_the_files_whatever_its_configuration_says(ends, module, tmp_path):
    module("dtypes", "def size(model):\n    return model.dtype.itemsize\n")
    for folder in ends:
        weights = load_file(folder / "model.safetensors")
        save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((ends[1] / "config.json").read_text())["dtype"] == "float32"
    files = sweep_checkpoints(*ends, [0.5], tmp_path / "out", scorers=["dtypes:size"])
    assert read_results(files[0]).finished[0].scores == {"size": 2.0}


def test_the_model_may_have_another_dtype_than_the_files(ends, module, tmp_path):
    module("first", "def weight(model):\n    assert model.dtype.itemsize == 2\n    return model.lm_head.weight[0, 0]\n")
    files = sweep_checkpoints(*ends, [0, 0.3, 1], tmp_path / "out", scorers=["first:weight"], dtype="bfloat16")
    points = interpolate(llama(0).state_dict(), llama(1).state_dict(), [0, 0.3, 1])
    assert [row.scores["weight"] for row in read_results(files[0]).finished] == [
        point["lm_head.weight"][0, 0].bfloat16().item() for point in points
    ]
    # Another dtype is another sweep.
    with pytest.raises(ValueError, match="a sweep with other dtype"):
        sweep_checkpoints(*ends, [0, 0.3, 1], tmp_path / "out", scorers=["first:weight"])


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("scores", ValueError, "'scores' is no scorer; write module:function, such as scores:reward"),
        ("scores:", ValueError, "'scores:' is no scorer"),
        (":reward", ValueError, "':reward' is no scorer"),
        ("nowhere:reward", ImportError, r"'nowhere:reward' cannot be imported \(ModuleNotFoundError: No module"),
        ("broken:reward", ImportError, r"'broken:reward' cannot be imported \(SyntaxError: .*; correct its module"),
        ("fine:other", ValueError, r"module 'fine' \(.*fine.py\) has no function 'other'; correct the scorer"),
        ("fine:number", ValueError, r"module 'fine' \(.*fine.py\) has no function 'number'"),
        ("fine:nothing", ValueError, r"'fine:nothing' takes \(\); let it take \(model\) or \(model, tokenizer\)"),
        ("fine:three", ValueError, r"scorer 'fine:three' takes \(model, tokenizer, data\)"),
    ],
)
def test_scorers_that_cannot_be_had(text, error, sentence, module):
    module("broken", "def reward(:")
    module("fine", "number = 3\ndef nothing(): pass\ndef three(model, tokenizer, data): pass\n")
    with pytest.raises(error, match=sentence):
        ImportedScorer(text)


WITH_TOKENIZER = ["model, tokenizer", "model, words", "model, tokenizer=None"]


@pytest.mark.parametrize("parameters", [*WITH_TOKENIZER, "model", "model, batch=8", "model, *, batch=8"])
def test_a_scorer_gets_what_its_signature_asks_for(parameters, module):
    module("asks", f"def scorer({parameters}):\n    return list(locals().values())\n")
    scorer, takes_tokenizer = ImportedScorer("asks:scorer"), parameters in WITH_TOKENIZER
    assert (scorer.name, scorer.takes_tokenizer) == ("scorer", takes_tokenizer)
    scorer.tokenizer = "T"
    answer = scorer("M")
    assert answer[0] == "M"
    assert ("T" in answer) == takes_tokenizer


def test_what_is_known_before_a_model_is_loaded(ends, module, tmp_path, monkeypatch):
    monkeypatch.setattr("fused_merge.sweep.evaluate.ModelLoader.load", pytest.fail)
    module("ones", "def one(model):\n    return 1\n")
    out, scorers = tmp_path / "out", ["ones:one"]
    base, tuned = ends

    def refused(error, message, *, base=base, tuned=tuned, **options):
        with pytest.raises(error, match=message):
            sweep_checkpoints(base, tuned, [0, 1], out, **{"scorers": scorers} | options)
        assert not out.exists()

    refused(FileNotFoundError, "nowhere does not exist; give a local", tuned="nowhere")
    refused(FileNotFoundError, "nowhere does not exist; give a local", base="nowhere")
    no_config = "model.safetensors has no config.json, so nothing says what model it is; give a model folder"
    refused(FileNotFoundError, no_config, tuned=tuned / "model.safetensors")
    refused(ValueError, "device must be 'cpu' or 'cuda', got 'fast'", device="fast")
    refused(ValueError, "device 'meta' cannot compute here; use 'cpu'", device="meta")
    refused(ValueError, "dtype must be 'bfloat16', .* got 'int8'", dtype="int8")
    refused(ValueError, "two scorers are called 'one'; rename one", scorers=scorers * 2)
    refused(ValueError, "there is no scorer", scorers=[])
    no_harness = r"tasks need the lm-evaluation-harness \(.*\): pip install 'fused_merge\[evaluation\]'"
    refused(ImportError, no_harness, tasks=["t"])
    refused(FileNotFoundError, "gone.json", compare=["gone.json"])
    (tmp_path / "begun.json").write_text('{"sweep": {}, "rows": []}')
    refused(ValueError, "begun.json has no finished ratio yet; run that sweep first", compare=[tmp_path / "begun.json"])
    refused(ValueError, "'nowhere' is no loader; write module:function", loader="nowhere")
    refused(ValueError, "num_fewshot must be at least 0, got -1", num_fewshot=-1)
    for limit in (0, 2.5):
        refused(ValueError, f"limit must be a whole number, or a share between 0 and 1, got {limit}", limit=limit)
    refused(NotADirectoryError, "include_path .*/nowhere is no folder; give one that holds", include_path=["nowhere"])
    refused(TypeError, r"include_path must be a sequence, got 'here'; write \['here'\]", include_path="here")
    idle = "apply_chat_template is for tasks of the lm-evaluation-harness; give tasks, or leave it out"
    refused(ValueError, idle, apply_chat_template=True)
    for missing, sentence in (
        ("matplotlib", r"pareto.png needs matplotlib: pip install 'fused_merge\[plots\]'"),
        ("transformers", r"models are loaded by Transformers: pip install 'fused_merge\[evaluation\]'"),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            refused(ImportError, sentence)
    for name in ("results.json", "results.md", "pareto.png"):
        (out / name).mkdir(parents=True)
        with pytest.raises(IsADirectoryError, match=f"{name} is a folder and should become a file; remove it, or"):
            sweep_checkpoints(base, tuned, [0, 1], out, scorers=scorers)
        (out / name).rmdir()


def test_models_and_tokenizers_that_transformers_cannot_load(ends, module, tmp_path):
    module("words", "def scorer(model, tokenizer):\n    return 1\n")
    for file in ends[1].glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"AutoTokenizer of Transformers cannot load .*tuned \(ValueError: Could"):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["words:scorer"])
    for end in ends:
        (end / "model.safetensors").unlink()
        save_file({"lm_head.weight": torch.zeros(3)}, end / "model.safetensors", {"format": "pt"})
    module("one", "def scorer(model):\n    return 1\n")
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM of Transformers cannot load .*tuned \("):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["one:scorer"])


MASKED = """
import torch, transformers
calls = []
def load(folder, device, dtype):
    calls.append(folder)
    model = transformers.BertForMaskedLM.from_pretrained(folder, dtype=dtype).to(device)
    return model, "a tokenizer"
def bias(model, tokenizer):
    assert tokenizer == "a tokenizer" and not model.training
    return model.bert.embeddings.word_embeddings.weight.double().sum()
"""


def test_a_model_that_a_function_loads(module, tmp_path):
    module("masked", MASKED)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=12, **size)
    ends = [save(BertForMaskedLM(config), tmp_path / name) for name in ("base", "tuned")]
    with pytest.raises(ValueError, match=r"holds a BertForMaskedLM, which neither .*; pass loader='module:function'"):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", scorers=["masked:bias"])
    assert not (tmp_path / "out").exists()
    files = sweep_checkpoints(*ends, [0, 1], tmp_path / "out", scorers=["masked:bias"], loader="masked:load")
    totals = [load_file(end / "model.safetensors")["bert.embeddings.word_embeddings.weight"] for end in ends]
    scores = [row.scores["bias"] for row in read_results(files[0]).finished]
    assert scores == pytest.approx([total.double().sum().item() for total in totals])
    assert sys.modules["masked"].calls == [ends[1]]
    assert results_of(tmp_path / "out")["sweep"]["loader"] == "masked:load"
    module("others", MASKED)
    with pytest.raises(ValueError, match="a sweep with other loader"):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", scorers=["masked:bias"], loader="others:load")
