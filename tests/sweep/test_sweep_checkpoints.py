"""Sweeps between checkpoints, with scorers of a module and tasks of the lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, save
from word_tokens import tokenizer

from fused_merge.interpolation.interpolate import interpolate
from fused_merge.sweep.evaluate import sweep_checkpoints
from fused_merge.sweep.results import read_results
from fused_merge.sweep.scorers import HarnessTask, ImportedScorer


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
    monkeypatch.setattr("fused_merge.sweep.evaluate.load_model", pytest.fail)
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
    monkeypatch.setattr("fused_merge.sweep.evaluate.load_model", pytest.fail)
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
    for missing, sentence in (
        ("matplotlib", r"pareto.png needs matplotlib: pip install 'fused_merge\[plots\]'"),
        ("transformers", r"models are loaded by Transformers: pip install 'fused_merge\[evaluation\]'"),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            refused(ImportError, sentence)


def test_models_and_tokenizers_that_transformers_cannot_load(ends, module, tmp_path):
    module("words", "def scorer(model, tokenizer):\n    return 1\n")
    for file in ends[1].glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"AutoTokenizer of Transformers cannot load .*tuned \(ValueError: Could"):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["words:scorer"])
    (ends[1] / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM of Transformers cannot load .*tuned \(ValueError: Un"):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["words:scorer"])


# --- the lm-evaluation-harness, as a stand-in


@pytest.fixture
def harness(monkeypatch):
    """A module with the names and the answers of lm_eval 0.4; remembers what it was asked."""
    asked = SimpleNamespace(wrapped=None, calls=[])

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            assert asked.wrapped is None
            self.model = pretrained
            asked.wrapped = (pretrained, tokenizer, batch_size)

    def simple_evaluate(model, tasks, task_manager, **options):
        assert task_manager == "every task"
        asked.calls.append((tasks, options))
        (task,) = tasks
        found = {"alias": task, "sample_len": 3, "acc,none": float(model.model.lm_head.weight.double().sum())}
        found |= {"acc_stderr,none": "N/A", "perplexity,none": 2.0}
        found |= {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}
        higher = {"acc": True, "perplexity": False, "exact_match": None}
        return {"results": {task: found}, "higher_is_better": {task: higher}}

    for name, content in (
        ("lm_eval", {"simple_evaluate": simple_evaluate}),
        ("lm_eval.models.huggingface", {"HFLM": HFLM}),
        ("lm_eval.tasks", {"TaskManager": lambda: "every task"}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    return asked


def test_tasks_of_the_harness(ends, harness, tmp_path):
    files = sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["first", "second"], batch_size=4)
    rows = read_results(files[0]).finished
    for row, folder in zip(rows, ends, strict=True):
        total = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double().sum().item()
        metrics = {"acc": total, "perplexity": 2.0, "exact_match,strict-match": 0.5}
        assert row.scores == {f"{task}/{name}": metrics[name] for task in ("first", "second") for name in metrics}
    model, words, batch_size = harness.wrapped
    assert (type(model).__name__, words.vocab_size, batch_size) == ("LlamaForCausalLM", 48, 4)
    assert [tasks for tasks, _ in harness.calls] == [["first"], ["second"]] * 2
    assert harness.calls[0][1] == {"bootstrap_iters": 0, "log_samples": False}
    # The harness knows of which less is better, and so does whoever goes on.
    assert results_of(tmp_path / "out")["lower_is_better"] == ["first/perplexity", "second/perplexity"]
    assert read_results(files[0]).maximize == [True, False, True] * 2
    sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["first", "second"])
    assert len(harness.calls) == 4
    assert read_results(files[0]).maximize == [True, False, True] * 2


def test_a_task_without_directions_is_to_be_maximized():
    task = HarnessTask("t", lambda **options: {"results": {"t": {"alias": "t", "acc,none": 0.5}}}, None, None)
    assert task(None) == {"acc": 0.5}
    assert task.lower_is_better == set()
