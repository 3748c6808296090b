"""Tasks of the lm-evaluation-harness: found before a model is loaded, asked as the options say, scored one by one.

A stand-in has the names, the calls and the answers of version 0.4.13. The last tests need the harness itself.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from types import SimpleNamespace

import pytest
from harness_tasks import write_tasks
from safetensors.torch import load_file
from tiny import llama, save
from word_tokens import tokenizer

from fused_merge.sweep.evaluate import sweep_checkpoints
from fused_merge.sweep.harness import HarnessTask
from fused_merge.sweep.results import read_results


@pytest.fixture
def ends(tmp_path):
    """Two small models with a tokenizer."""
    folders = [save(llama(seed), tmp_path / name) for seed, name in enumerate(("base", "tuned"))]
    tokenizer().save_pretrained(folders[1])
    return folders


def total_of(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double().sum().item()


class Task(SimpleNamespace):
    """A task; `metrics` are what it answers beside the sum of the model's head."""


class Group(SimpleNamespace):
    def get_all_tasks(self):
        return [
            task for child in self.children for task in ([child] if isinstance(child, Task) else child.get_all_tasks())
        ]


def names_of(built):
    """Return everything in a task or group by name, itself first."""
    inner = {} if isinstance(built, Task) else {k: v for child in built.children for k, v in names_of(child).items()}
    return {built.task_name if isinstance(built, Task) else built.name: built} | inner


@pytest.fixture
def harness(monkeypatch):
    """A module with the names and the answers of lm_eval; remembers what it was asked."""
    anatomy, law, sums = (Task(task_name=name, metrics={}) for name in ("anatomy", "law", "sums"))
    loss = Task(task_name="loss", metrics={"word_perplexity,none": 2.0}, higher={"word_perplexity": False})
    exact = Task(task_name="exact", metrics={"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A"})
    humanities = Group(name="humanities", children=[law], metrics=["acc,none"])
    known = {each.task_name: each for each in (anatomy, law, sums, loss, exact)} | {
        "humanities": humanities,
        "mmlu": Group(name="mmlu", children=[anatomy, humanities], metrics=["acc,none"]),
        "losses": Group(
            name="losses",
            children=[Group(name="inner", children=[loss], metrics=["word_perplexity,none"])],
            metrics=["word_perplexity,none"],
        ),
        "suite": Group(name="suite", children=[sums, humanities], metrics=[]),
        "tag": [anatomy, sums],
        "runs_code": Task(task_name="runs_code", metrics={}, UNSAFE_CODE=True),
        "of_images": Task(task_name="of_images", metrics={}, MULTIMODAL=True),
    }
    asked = SimpleNamespace(wrapped=[], calls=[], folders=[], loaded=[], scored=[], fails=None, known=known)

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model = pretrained
            asked.wrapped.append((pretrained, tokenizer, batch_size))

    class TaskManager:
        def __init__(self, include_path=None):
            asked.folders.append(include_path)
            self.all_tasks = sorted(known)

        def match_tasks(self, names):
            return sorted(name for name in known if any(fnmatch.fnmatch(name, each) for each in names))

        def load(self, names):
            (name,) = names
            asked.loaded.append(name)
            if name == "law":
                raise ConnectionError("no data set")
            found = known[name] if name in known else Task(task_name="of_file", metrics={})
            every = {
                k: v for each in (found if isinstance(found, list) else [found]) for k, v in names_of(each).items()
            }
            groups = {k: v for k, v in every.items() if isinstance(v, Group)}
            children = {k: list(dict.fromkeys(next(iter(names_of(c))) for c in v.children)) for k, v in groups.items()}
            return {
                "tasks": {k: v for k, v in every.items() if k not in groups},
                "groups": groups,
                "group_map": children,
            }

    def simple_evaluate(model, tasks, task_manager, **options):
        (built,) = tasks
        assert isinstance(task_manager, TaskManager)
        every = names_of(built)
        asked.calls.append((next(iter(every)), options))
        if asked.calls[-1][0] == asked.fails:
            raise KeyboardInterrupt
        total, results = float(model.model.lm_head.weight.double().sum()), {}
        for name, each in every.items():
            metrics = {"acc,none": total, "acc_stderr,none": "N/A"} if isinstance(each, Task) else {}
            metrics |= each.metrics if isinstance(each, Task) else dict.fromkeys(each.metrics, total / 2)
            results[name] = {"alias": name, "name": name, "sample_len": 3, **metrics}
        groups = {k: v for k, v in every.items() if isinstance(v, Group)}
        members = {k: [next(iter(names_of(child))) for child in v.children] for k, v in groups.items()}
        higher = {k: getattr(v, "higher", {"acc": True}) for k, v in every.items() if k not in groups}
        return {"results": results, "group_subtasks": members, "higher_is_better": higher}

    for name, content in (
        ("lm_eval", {"simple_evaluate": simple_evaluate}),
        ("lm_eval.models.huggingface", {"HFLM": HFLM}),
        ("lm_eval.tasks", {"TaskManager": TaskManager}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    return asked


DEFAULTS = {"num_fewshot": None, "limit": None, "apply_chat_template": False, "fewshot_as_multiturn": False}
DEFAULTS |= {"confirm_run_unsafe_code": False, "bootstrap_iters": 0, "log_samples": False}


def test_tasks_of_the_harness(ends, harness, tmp_path):
    tasks = ["sums", "loss", "exact"]
    files = sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=tasks, batch_size=4)
    for row, folder in zip(read_results(files[0]).finished, ends, strict=True):
        metrics = {f"{task}/acc": total_of(folder) for task in tasks}
        assert row.scores == metrics | {"loss/word_perplexity": 2.0, "exact/exact_match,strict": 0.5}
    ((model, words, batch_size),) = harness.wrapped
    assert (type(model).__name__, words.vocab_size, batch_size) == ("LlamaForCausalLM", 48, 4)
    assert harness.calls == [(task, DEFAULTS) for task in tasks] * 2
    assert (harness.loaded, harness.folders) == (tasks, [None])
    # The harness knows of which less is better, and so does whoever goes on.
    for _ in range(2):
        assert json.loads(files[0].read_text())["lower_is_better"] == ["loss/word_perplexity"]
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=tasks)
    assert len(harness.calls) == 6


def test_groups_tags_patterns_and_files(ends, harness, tmp_path):
    (tmp_path / "own.yaml").write_text("task: of_file\n")
    tasks = ["mmlu", "tag", "l?sses", "suite", str(tmp_path / "own.yaml")]
    files = sweep_checkpoints(*ends, [1], tmp_path / "out", tasks=tasks)
    results, total = read_results(files[0]), total_of(ends[1])
    # A group is one score, with its tasks in detail; a tag is its tasks, and so is a group without a score of its own.
    assert results.finished[0].scores == {
        "mmlu/acc": total / 2,
        "mmlu/anatomy/acc": total,
        "mmlu/humanities/acc": total / 2,
        "mmlu/law/acc": total,
        "anatomy/acc": total,
        "sums/acc": total,
        "losses/word_perplexity": total / 2,
        "losses/inner/word_perplexity": total / 2,
        "losses/loss/acc": total,
        "losses/loss/word_perplexity": 2.0,
        "suite/sums/acc": total,
        "suite/humanities/acc": total / 2,
        "suite/law/acc": total,
        "of_file/acc": total,
    }
    counting = [
        "mmlu/acc",
        "anatomy/acc",
        "sums/acc",
        "losses/word_perplexity",
        "suite/sums/acc",
        "suite/humanities/acc",
    ]
    assert results.scores == [*counting, "of_file/acc"]
    # Directions pass through groups of groups.
    lower = {"losses/word_perplexity", "losses/inner/word_perplexity", "losses/loss/word_perplexity"}
    assert set(results.lower_is_better) == lower
    names = ["mmlu", "anatomy", "sums", "losses", "suite", str(tmp_path / "own.yaml")]
    assert json.loads(files[0].read_text())["sweep"]["scorers"] == names


def test_every_option_reaches_the_harness_and_belongs_to_the_sweep(ends, harness, tmp_path):
    words = tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    words.save_pretrained(ends[1])
    (tmp_path / "more").mkdir()
    options = {"num_fewshot": 0, "limit": 0.25, "apply_chat_template": True, "confirm_run_unsafe_code": True}
    options |= {"include_path": [tmp_path / "more"], "trust_remote_code": True}
    files = sweep_checkpoints(*ends, [0], tmp_path / "out", tasks=["runs_code"], **options)
    asked = {name: options[name] for name in DEFAULTS if name in options}
    assert harness.calls == [("runs_code", DEFAULTS | asked | {"fewshot_as_multiturn": True})]
    assert harness.folders == [[str(tmp_path / "more")]]
    belongs_to = json.loads(files[0].read_text())["sweep"]
    assert {name: belongs_to[name] for name in options} == options | {"include_path": [str(tmp_path / "more")]}
    assert "loader" not in belongs_to
    for name in options:
        fewer = {key: value for key, value in options.items() if key != name}
        tasks = ["sums"] if name == "confirm_run_unsafe_code" else ["runs_code"]
        with pytest.raises(ValueError, match=f"results of a sweep with other (scorers and )?{name}; choose"):
            sweep_checkpoints(*ends, [0], tmp_path / "out", tasks=tasks, **fewer)
    with pytest.raises(ValueError, match="results of a sweep with other limit; choose"):
        sweep_checkpoints(*ends, [0], tmp_path / "out", tasks=["runs_code"], **options | {"limit": 10})


def test_what_the_harness_would_refuse_is_known_before_a_model_is_loaded(ends, harness, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: loaded.append(1))

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            sweep_checkpoints(*ends, [0, 1], tmp_path / "out", **options)
        assert not loaded
        assert not (tmp_path / "out").exists()

    unknown = "the lm-evaluation-harness has no task 'sum', nor is it a file; did you mean 'sums'"
    refused(unknown, tasks=["anatomy", "sum"])
    refused("no task 'qqqq', nor is it a file; `lm_eval ls tasks` lists all", tasks=["qqqq"])
    refused("no task 'gone/own.yaml', nor is it a file", tasks=["gone/own.yaml"])
    refused(r"cannot build task 'law' \(ConnectionError: no data set\); correct it, or give the folder", tasks=["law"])
    refused("task 'of_images' asks about images or sounds; take a scorer of your own", tasks=["of_images"])
    refused("task 'runs_code' runs code that the model writes; pass confirm_run_unsafe_code=True", tasks=["runs_code"])
    files = [tmp_path / "own.yaml", tmp_path / "other.yaml"]
    for file in files:
        file.write_text("task: of_file\n")
    refused("two scorers are called 'of_file'; rename one", tasks=list(map(str, files)))
    refused("minimize names 'sums2', which is no score of 'sums'; correct it", tasks=["sums"], minimize=["sums2"])


def test_a_model_that_the_harness_cannot_ask(ends, harness, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="the tokenizer has no chat template; leave out apply_chat_template, or give it"
    ):
        sweep_checkpoints(*ends, [0], tmp_path / "out", tasks=["sums"], apply_chat_template=True)
    monkeypatch.setattr(sys.modules["lm_eval.models.huggingface"], "HFLM", lambda **_: {}["device"])
    sentence = r"cannot use a LlamaForCausalLM with a \w+ \(KeyError: 'device'\); score it with functions of your own"
    with pytest.raises(ValueError, match=sentence):
        sweep_checkpoints(*ends, [0], tmp_path / "out", tasks=["sums"])


def test_a_killed_sweep_goes_on_with_the_task_that_is_missing(ends, harness, tmp_path):
    tasks = ["mmlu", "sums", "exact"]
    whole = sweep_checkpoints(*ends, [0, 1], tmp_path / "whole", tasks=tasks)[0].read_bytes()
    harness.fails = "exact"
    with pytest.raises(KeyboardInterrupt):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=tasks)
    harness.fails = None
    harness.calls.clear()
    assert sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=tasks)[0].read_bytes() == whole
    assert [name for name, _ in harness.calls] == ["exact", "mmlu", "sums", "exact"]


def test_a_task_without_directions_is_to_be_maximized():
    task = HarnessTask("t", None, lambda **options: {"results": {"t": {"alias": "t", "acc,none": 0.5}}})
    assert task(None) == {"acc": 0.5}
    assert not task.lower_is_better


# --- the harness itself


@pytest.fixture
def real(ends, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    words = tokenizer()
    words.bos_token = "<e>"
    words.chat_template = "{% for m in messages %}w{{ 3 + loop.index }} {{ m['content'] }} {% endfor %}"
    words.save_pretrained(ends[1])
    return write_tasks(tmp_path / "tasks")


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 3, "limit": 0.5, "apply_chat_template": True}])
def test_the_harness_itself_gives_the_same_scores(options, ends, real, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = ["all", "words", "losses"]
    files = sweep_checkpoints(*ends, [0, 0.5, 1], tmp_path / "out", tasks=tasks, include_path=[real], **options)
    results = read_results(files[0])
    manager, expected = TaskManager(include_path=[str(real)]), {}
    model = HFLM(pretrained=str(ends[1]), device="cpu", dtype="float32", batch_size=1)
    asked = options | {"fewshot_as_multiturn": "apply_chat_template" in options}
    for task in ("all", "first", "second", "losses"):
        found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **asked)[
            "results"
        ]
        for name, metrics in found.items():
            prefix = f"{task}/" if name == task else f"{task}/{name}/"
            expected |= {prefix + k[:-5]: v for k, v in metrics.items() if k.endswith(",none") and "_stderr" not in k}
    assert results.finished[2].scores == pytest.approx(expected)
    assert results.scores == ["all/acc", "first/acc", "second/acc", "losses/word_perplexity"]
    assert results.maximize == [True, True, True, False]


def test_the_harness_itself_knows_what_there_is(ends, real, tmp_path, monkeypatch):
    monkeypatch.setattr("fused_merge.sweep.evaluate.ModelLoader.load", pytest.fail)
    with pytest.raises(ValueError, match="has no task 'word_los', nor is it a file; did you mean 'word_loss'"):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["word_los"], include_path=[real])
    (real / "questions.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"cannot build task '/.*/first.yaml' \(FileNotFoundError: .*; correct it, or give"
    ):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=[str(real / "first.yaml")])
