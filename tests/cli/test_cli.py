"""The command line: what it passes on, writes, prints and exits with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_merge import checkpoints, merge
from fused_merge._version import __version__
from fused_merge.checkpoints import engine
from fused_merge.cli import environment, main
from fused_merge.delta.reference_delta import ReferenceDelta

PROGRAM = "import sys; from fused_merge.cli import main; sys.argv[0] = 'fused-merge'; main()"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fused-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


class StandIn:
    """A job that writes nothing and remembers what it was asked for."""

    outputs = (Path("line/r0.10"), Path("line/half"))
    plan = {  # noqa: RUF012, nobody writes to it
        "outputs": ["line/r0.10", "line/half"],
        "files": [
            {"path": "line/r0.10/a.safetensors", "bytes": 1_500_000_000},
            {"path": "line/r0.10/config.json", "bytes": 700},
            {"path": "line/half/a.safetensors", "bytes": 2_000},
        ],
        "bytes_read": 3_000_000_000,
        "bytes_written": 1_500_002_700,
        "seconds": 130.4,
    }
    fails: BaseException | None = None

    def __init__(self):
        self.planned = self.ran = None

    def plan_by(self, name):
        def plan(*arguments, **options):
            self.planned = name, arguments, options
            return self

        return plan

    def describe(self):
        return self.plan

    def run(self, **options):
        self.ran = options
        if self.fails:
            raise self.fails
        return list(self.outputs)


@pytest.fixture
def job(monkeypatch):
    job = StandIn()
    for name in ("plan_interpolation", "plan_merge", "plan_mergekit"):
        for home in (checkpoints, merge):
            monkeypatch.setattr(home, name, job.plan_by(name), raising=False)
    return job


PLAN_DEFAULTS = {
    "dtype": None,
    "unmatched": "refuse",
    "align_vocabulary": False,
    "files_from": "tuned",
    "max_shard_size": None,
    "overwrite": False,
}
RUN_DEFAULTS = {
    "worker": (1, 1),
    "threads": None,
    "max_memory": None,
    "device": "cpu",
    "verify": False,
    "progress": True,
}
PLAN = ["--dtype", "float32", "--unmatched", "copy", "--align-vocabulary", "--files-from", "base", "--overwrite"]
PLAN += ["--max-shard-size", "5GB"]
RUN = ["--worker", "2/3", "--threads", "4", "--max-memory", "1000000", "--device", "cuda:1"]
RUN += ["--verify", "--quiet"]
PLAN_ASKED = {
    "dtype": "float32",
    "unmatched": "copy",
    "align_vocabulary": True,
    "files_from": "base",
    "max_shard_size": "5GB",
    "overwrite": True,
}
RUN_ASKED = {
    "worker": (2, 3),
    "threads": 4,
    "max_memory": "1000000",
    "device": "cuda:1",
    "verify": True,
    "progress": False,
}
LINE = ["interpolate", "a", "b", "--ratios", "0.1,0.5", "--out", "line"]
MERGE = ["merge", "--base", "a", "--model", "b=0.5", "--model", "dir=1/c=-2", "--method", "ties", "--out", "line"]


# --- interpolate


def test_interpolate(run, files, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("interpolate", *files, "--ratios", "0.25,0.5", "--out", out)
    assert (code, printed.split(), errors) == (0, [str(out / "r0.25"), str(out / "r0.50")], "")
    assert load_file(out / "r0.25" / "model.safetensors")["w"].tolist() == [0.25] * 3

    code, printed, errors = run("interpolate", *files, "--ratios", "0.5", "--out", out)
    assert (code, printed) == (1, "")
    # What the library calls overwrite=True is an option here.
    assert errors == f"error: {out / 'r0.50'} exists; pass --overwrite to replace a folder, or choose another\n"

    code, printed, _ = run("interpolate", *files, "--ratios=-0.5,0.5", "--out", out, "--overwrite", "--json")
    assert code == 0
    assert json.loads(printed) == [
        {"ratio": -0.5, "path": str(out / "r-0.50")},
        {"ratio": 0.5, "path": str(out / "r0.50")},
    ]


def test_interpolate_with_every_option_of_a_plan(run, files, tmp_path):
    save_file({"w": torch.ones(3), "x": torch.ones(2)}, files[1])
    out = tmp_path / "out"
    arguments = ["interpolate", *files, "--ratios", "0.5", "--out", out]
    code, printed, errors = run(*arguments)
    assert (code, printed) == (1, "")
    assert "'x'" in errors
    code, printed, errors = run(*arguments, "--unmatched", "copy", "--dtype", "bfloat16", "--files-from", "base")
    assert (code, printed, errors) == (0, f"{out / 'r0.50'}\n", "")
    made = load_file(out / "r0.50" / "model.safetensors")
    assert made["w"].dtype == torch.bfloat16
    assert {name: tensor.tolist() for name, tensor in made.items()} == {"w": [0.5] * 3, "x": [1.0] * 2}


def test_two_workers_write_what_one_does(run, tmp_path):
    from tiny import llama, save

    ends = [save(llama(seed), tmp_path / str(seed), shard="3KB") for seed in range(2)]
    common = ["interpolate", *ends, "--ratios", "0.5"]
    assert run(*common, "--out", tmp_path / "one")[0] == 0
    for worker in ("1/2", "2/2"):
        assert run(*common, "--out", tmp_path / "two", "--worker", worker, "--verify", "--threads", "1")[0] == 0
    one, two = (sorted((tmp_path / name / "r0.50").glob("*.safetensors")) for name in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_a_dry_run_says_what_the_run_does(run, files, tmp_path):
    out = tmp_path / "out"
    arguments = ["interpolate", *files, "--ratios", "0.25,0.5", "--out", out]
    code, printed, errors = run(*arguments, "--dry-run", "--json")
    assert (code, errors) == (0, "")
    plan = json.loads(printed)
    assert plan["outputs"] == [str(out / "r0.25"), str(out / "r0.50")]
    assert {Path(file["path"]).name for file in plan["files"]} >= {"model.safetensors"}
    assert not list(tmp_path.rglob("r0.25"))
    code, printed, errors = run(*arguments, "--dry-run")
    assert (code, errors) == (0, "")
    assert str(out / "r0.25") in printed
    assert run(*arguments)[0] == 0
    weights = [file for file in plan["files"] if file["path"].endswith(".safetensors")]
    assert [file["bytes"] for file in weights] == [Path(file["path"]).stat().st_size for file in weights]


def test_interpolate_passes_everything_on(run, job):
    code, printed, errors = run(*LINE)
    assert (code, printed, errors) == (0, "line/r0.10\nline/half\n", "")
    assert job.planned == ("plan_interpolation", (Path("a"), Path("b"), [0.1, 0.5], Path("line")), PLAN_DEFAULTS)
    assert job.ran == RUN_DEFAULTS | {"impl": "auto"}

    assert run(*LINE, *PLAN, *RUN, "--impl", "eager") == (0, "", "")
    assert job.planned == ("plan_interpolation", (Path("a"), Path("b"), [0.1, 0.5], Path("line")), PLAN_ASKED)
    assert job.ran == RUN_ASKED | {"impl": "eager"}
    run(*LINE, "--workers", "3/3", "--max-memory", "256MB")
    assert (job.ran["worker"], job.ran["max_memory"]) == ((3, 3), "256MB")


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0.5", [0.5]),
        ("0:1:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("1:-0.5:-0.5", [1.0, 0.5, 0.0, -0.5]),
        ("0,0.9:1.1:0.1,2", [0.0, 0.9, 1.0, 1.1, 2.0]),
        ("1e-3:3e-3:1e-3", [0.001, 0.002, 0.003]),
        ("0.5:0.5:1", [0.5]),
    ],
)
def test_ratios_and_ranges(text, ratios, run, job):
    assert run("interpolate", "a", "b", "--ratios", text, "--out", "x", "--dry-run")[0] == 0
    assert job.planned[1][2] == ratios
    # No sums of binary fractions: what is printed is what was typed.
    assert str(job.planned[1][2]) == str(ratios)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_ratios_from_a_file(suffix, run, job, tmp_path):
    ratios = {"r0.10": 0.1, "half": {r"model\.layers\..*": 0.5, ".*norm.*": 1}}
    file = tmp_path / f"ratios{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(ratios))
    else:
        file.write_text("r0.10: 0.1\nhalf:\n  model\\.layers\\..*: 0.5\n  .*norm.*: 1\n")
    arguments = ["interpolate", "a", "b", "--ratios-file", file, "--out", "line"]
    code, printed, _ = run(*arguments, "--json")
    assert code == 0
    assert job.planned[1][2] == ratios
    assert json.loads(printed) == [
        {"ratio": 0.1, "path": "line/r0.10"},
        {"ratio": ratios["half"], "path": "line/half"},
    ]


def test_folders_of_a_ratios_file(run, files, tmp_path):
    (tmp_path / "ratios.yaml").write_text("quarter: 0.25\nmixed: {'w': 0.75}\n")
    out = tmp_path / "out"
    code, printed, errors = run("interpolate", *files, "--ratios-file", tmp_path / "ratios.yaml", "--out", out)
    assert (code, printed.split(), errors) == (0, [str(out / "quarter"), str(out / "mixed")], "")
    values = [load_file(out / name / "model.safetensors")["w"].tolist() for name in ("quarter", "mixed")]
    assert values == [[0.25] * 3, [0.75] * 3]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("r.yaml", "- 0.1", r"must map folder names to ratios, such as 'half: 0\.5'; correct it"),
        ("r.yaml", "", "must map folder names to ratios"),
        ("r.yaml", "0.1: 0.1", r"has the folder name 0\.1, which is not text; put it in quotes"),
        ("r.yaml", "a: yes", "gives 'a' the ratio True; write a number such as 0.5, or a mapping from regular"),
        ("r.yaml", "a: 1e-1", "gives 'a' the ratio '1e-1'; write a number"),
        ("r.yaml", "a: {}", "gives 'a' the ratio {}; write"),
        ("r.yaml", "a: {w: x}", "gives 'a' the ratio {'w': 'x'}; write"),
        ("r.yaml", "a: [\n  b", r"r\.yaml is not YAML \(while parsing .*; correct it"),
        ("r.json", "{", r"r\.json is not JSON \(.*; correct it"),
        ("r.txt", None, r"cannot use .*r\.txt: No such file or directory"),
    ],
)
def test_ratio_files_that_say_something_else(name, text, sentence, run, job, tmp_path):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    code, printed, errors = run("interpolate", "a", "b", "--ratios-file", file, "--out", "x")
    assert (code, printed) == (1, "")
    assert re.fullmatch(f"error: .*{sentence}.*\n", errors)
    assert job.planned is None


def test_a_yaml_file_without_pyyaml(run, job, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text("a: 0.5")
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, errors = run("interpolate", "a", "b", "--ratios-file", tmp_path / "r.yaml", "--out", "x")
    assert code == 1
    assert errors.endswith("r.yaml needs PyYAML: pip install 'fused_merge[cli]', or write a .json file\n")


# --- sweep

SWEEP = ["sweep", "a", "b", "--out", "out", "--ratios", "0:1:0.5"]
SWEEP_DEFAULTS = {
    "scorers": [],
    "tasks": [],
    "minimize": [],
    "compare": [],
    "device": "cpu",
    "dtype": None,
    "batch_size": 1,
    "progress": True,
}


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """What `sweep_checkpoints` was asked for; it prints, and has written what a sweep of two ratios writes."""
    asked = SimpleNamespace(arguments=None, options=None, fails=None)
    files = [tmp_path / name for name in ("results.json", "results.md", "pareto.png")]
    files[0].write_text('{"rows": [], "front": ["0.5"]}')

    def stand_in(*arguments, **options):
        asked.arguments, asked.options = arguments, options
        print("a scorer at work")
        if asked.fails:
            raise asked.fails
        return files

    monkeypatch.setattr("fused_merge.sweep.evaluate.sweep_checkpoints", stand_in)
    asked.files = [str(file) for file in files]
    return asked


def test_sweep_passes_everything_on(run, swept):
    code, printed, errors = run(*SWEEP, "--scorer", "m:f")
    # What scorers print does not get between the results.
    assert (code, printed.split(), errors) == (0, swept.files, "a scorer at work\n")
    assert swept.arguments == (Path("a"), Path("b"), [0.0, 0.5, 1.0], Path("out"))
    assert swept.options == SWEEP_DEFAULTS | {"scorers": ["m:f"]}

    asked = [
        "--scorer",
        "m:f",
        "--scorer",
        "n:g",
        "--task",
        "x",
        "--task",
        "y",
        "--minimize",
        "g",
        "--minimize",
        "x/loss",
    ]
    asked += ["--compare", "o/results.json", "--compare", "p/results.json", "--device", "cuda", "--dtype", "bfloat16"]
    code, printed, _ = run(*SWEEP, *asked, "--batch-size", "8", "--quiet")
    assert (code, printed) == (0, "")
    assert swept.options == {
        "scorers": ["m:f", "n:g"],
        "tasks": ["x", "y"],
        "minimize": ["g", "x/loss"],
        "compare": [Path("o/results.json"), Path("p/results.json")],
        "device": "cuda",
        "dtype": "bfloat16",
        "batch_size": 8,
        "progress": False,
    }


def test_sweep_as_json(run, swept):
    code, printed, errors = run(*SWEEP, "--task", "x", "--json")
    assert (code, errors) == (0, "a scorer at work\n")
    assert json.loads(printed) == {"rows": [], "front": ["0.5"], "files": swept.files}


def test_sweep_with_ratios_from_a_file(run, swept, tmp_path):
    (tmp_path / "r.yaml").write_text("half: 0.5\nmixed: {'w': 0.75}\n")
    arguments = ["sweep", "a", "b", "--out", "out", "--scorer", "m:f", "--ratios-file", tmp_path / "r.yaml"]
    assert run(*arguments)[0] == 0
    assert swept.arguments[2] == {"half": 0.5, "mixed": {"w": 0.75}}


def test_a_sweep_that_fails(run, swept):
    swept.fails = RuntimeError("scorer 'f' at ratio 0.5 raised ValueError: no\ngood; correct it")
    code, printed, errors = run(*SWEEP, "--scorer", "m:f", "--json")
    sentence = "scorer 'f' at ratio 0.5 raised ValueError: no; good; correct it"
    assert (code, json.loads(printed)) == (1, {"error": sentence})
    assert errors == f"a scorer at work\nerror: {sentence}\n"
    swept.fails = KeyboardInterrupt()
    code, _, errors = run(*SWEEP, "--scorer", "m:f")
    assert code == 130
    assert errors.endswith("error: interrupted; run the same command again to go on from there\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "0.1"], "Missing option '--scorer' or '--task'"),
        (["--scorer", "m:f"], "Missing option '--ratios' or '--ratios-file'"),
        (["--scorer", "m:f", "--ratios", "1", "--ratios-file", "f"], "--ratios and --ratios-file exclude each other"),
        (["--task", "x", "--ratios", "1", "--batch-size", "0"], "'--batch-size'"),
    ],
)
def test_wrong_usage_of_sweep(arguments, message, run, swept):
    code, printed, errors = run("sweep", "a", "b", "--out", "out", *arguments, "--json")
    assert (code, printed) == (2, "")
    assert message in errors
    assert swept.arguments is None


def test_sweep_of_two_models(run, tmp_path, monkeypatch):
    from tiny import llama, save

    ends = [save(llama(seed), tmp_path / str(seed)) for seed in range(2)]
    (tmp_path / "cli_scores.py").write_text(
        "def norm(model):\n    print('norm')\n    return model.lm_head.weight.norm()\n"
        "def nothing(model):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    common = ["sweep", *ends, "--ratios", "0,1", "--out", tmp_path / "out"]
    code, printed, errors = run(*common, "--scorer", "cli_scores:norm", "--json")
    assert code == 0
    # Transformers may have a bar of its own before.
    assert errors.endswith("norm\nnorm\n")
    assert [row["scores"]["norm"] for row in json.loads(printed)["rows"]] == [
        llama(seed).lm_head.weight.detach().norm().item() for seed in range(2)
    ]
    code, printed, errors = run(*common, "--scorer", "cli_scores:nothing")
    assert (code, printed) == (1, "")
    assert errors.startswith(
        f"error: {tmp_path / 'out' / 'results.json'} holds the results of a sweep with other scorers"
    )
    code, printed, errors = run(*common[:-1], tmp_path / "other", "--scorer", "cli_scores:nothing")
    assert (code, printed) == (1, "")
    assert errors.startswith("error: scorer 'nothing' at ratio 0 returned nan, which is no finite number; correct it")


# --- merge


def test_merge_passes_everything_on(run, job):
    job.outputs = (Path("line"),)
    models = {"b": 0.5, "dir=1/c": -2.0}
    assert run(*MERGE) == (0, "line\n", "")
    # What was not asked for is for the library to decide.
    shared = {"max_shard_size": None, "overwrite": False}
    assert job.planned == ("plan_merge", ("a", models, "ties", Path("line")), shared)
    assert job.ran == RUN_DEFAULTS

    recipe = ["--density", "0.2", "--no-normalize", "--scale", "0.7", "--rescale", "--trim", "tensor", "--seed", "3"]
    assert run(*MERGE, *recipe, *PLAN, *RUN, "--json") == (0, '{"path": "line"}\n', "")
    asked = {"density": 0.2, "normalize": False, "scale": 0.7, "rescale": True, "trim": "tensor", "seed": 3}
    assert job.planned == ("plan_merge", ("a", models, "ties", Path("line")), asked | PLAN_ASKED)
    assert job.ran == RUN_ASKED


@pytest.mark.parametrize("where", [["line"], ["--out", "line"]])
def test_merge_by_a_configuration_of_mergekit(where, run, job):
    job.outputs = (Path("line"),)
    assert run("merge", "config.yaml", *where) == (0, "line\n", "")
    shared = {"max_shard_size": None, "overwrite": False}
    assert job.planned == ("plan_mergekit", (Path("config.yaml"), Path("line")), shared)
    assert job.ran == RUN_DEFAULTS
    assert run("merge", "config.yaml", *where, "--overwrite", "--max-shard-size", "2000", *RUN) == (0, "", "")
    assert job.planned[2] == {"max_shard_size": "2000", "overwrite": True}
    assert job.ran == RUN_ASKED


def test_merge_of_two_files(run, files, tmp_path):
    save_file({"w": torch.full((3,), 3.0)}, tmp_path / "third.safetensors")
    out = tmp_path / "merged"
    models = ["--model", f"{files[1]}=1", "--model", f"{tmp_path / 'third.safetensors'}=0.5"]
    common = ["merge", "--base", files[0], *models, "--method", "task_arithmetic", "--out", out]
    code, printed, errors = run(*common)
    assert (code, printed, errors) == (0, f"{out}\n", "")
    assert load_file(out / "model.safetensors")["w"].tolist() == [2.5] * 3
    code, printed, errors = run("verify", out)
    assert (code, errors) == (0, "")
    assert printed.startswith(f"{out}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing; give --base, --model and --method, or CONFIG.yaml"),
        (["--base", "a", "--method", "ties", "--out", "x"], "--model is missing; give --base, --model and --method"),
        (["--base", "a", "--model", "b=1", "--method", "ties"], "--out is missing; give the folder to write"),
        (["c.yaml"], "--out is missing; give the folder to write"),
        (["c.yaml", "x", "--out", "x"], "OUT and --out exclude each other; give one"),
        (["c.yaml", "x", "--density", "0.2"], "--density is for c.yaml to say; leave one of them out"),
        (["c.yaml", "x", "--align-vocabulary"], "--align-vocabulary is for c.yaml to say"),
        (["c.yaml", "x", "--model", "a=1"], "--model is for c.yaml to say"),
        (["--model", "b"], "'b' is not a model and its weight; write PATH=WEIGHT, such as sft/=0.5"),
        (["--model", "b=c"], "'b=c' is not a model and its weight"),
        (["--model", "=1"], "'=1' is not a model and its weight"),
        (
            ["--base", "a", "--model", "b=1", "--model", "b=2", "--method", "ties", "--out", "x"],
            "a --model is given twice; give each one weight",
        ),
    ],
)
def test_wrong_usage_of_merge(arguments, message, run, job):
    code, printed, errors = run("merge", *arguments, "--json")
    assert (code, printed) == (2, "")
    assert message in errors
    assert job.planned is None


# --- delta


def test_delta(run, files, tmp_path):
    out = tmp_path / "new" / "tau.safetensors"
    code, printed, errors = run("delta", *files, "--out", out)
    assert (code, printed, errors) == (0, f"{out}\n", "")
    dense = ReferenceDelta.load(out)
    assert dense.tensor("w").tolist() == [1.0] * 3

    code, printed, errors = run("delta", *files, "--out", out)
    assert (code, printed) == (1, "")
    assert errors == f"error: {out} exists; pass --overwrite to replace it, or choose another\n"

    sparse = ["--reserve-rate", "0.5", "--method", "random", "--seed", "3", "--dtype", "bfloat16"]
    code, printed, errors = run("delta", *files, "--out", out, "--overwrite", "--json", *sparse)
    assert (code, errors) == (0, "")
    loaded = ReferenceDelta.load(out)
    assert loaded.sparsity == ("random", 0.5, 3)
    assert loaded.dtype("w") == torch.bfloat16
    assert json.loads(printed) == {
        "path": str(out),
        "identity": loaded.identity,
        "tensors": 1,
        "bytes": out.stat().st_size,
    }
    code, _, errors = run("delta", *files, "--out", tmp_path / "other", "--reserve-rate", "0.5")
    assert (code, errors.startswith("error: method must be 'random' or 'magnitude'")) == (1, True)
    assert not (tmp_path / "other").exists()


def test_delta_replaces_no_checkpoint(run, files):
    before = files[1].read_bytes()
    code, _, errors = run("delta", *files, "--out", files[1], "--overwrite")
    assert code == 1
    assert errors.startswith(f"error: {files[1]} is a file that the delta is made of")
    assert files[1].read_bytes() == before


# --- verify


def test_verify_reads_every_folder(run, monkeypatch):
    monkeypatch.setattr(checkpoints, "verify_checkpoint", lambda folder: len(str(folder)) * 1000, raising=False)
    assert run("verify", "a", "bb", "--json") == (
        0,
        '[{"path": "a", "bytes": 1000}, {"path": "bb", "bytes": 2000}]\n',
        "",
    )
    code, printed, _ = run("verify", "a", "bb")
    assert code == 0
    assert printed == "a: 1.0 kB, every tensor as it was written\nbb: 2.0 kB, every tensor as it was written\n"
    assert run("verify", "a", "--quiet") == (0, "", "")


def test_verify_names_what_has_changed(run, files, tmp_path):
    out = tmp_path / "out"
    assert run("interpolate", *files, "--ratios", "0.25,0.5", "--out", out)[0] == 0
    code, printed, errors = run("verify", out / "r0.25", out / "r0.50")
    assert (code, printed.count("\n"), errors) == (0, 2, "")
    weights = out / "r0.50" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    code, printed, errors = run("verify", out / "r0.25", out / "r0.50")
    assert (code, printed.count("\n")) == (1, 1)
    assert re.fullmatch(r"error: .*'w'.*\n", errors)


# --- plans


def test_the_table_of_a_plan(run, job):
    code, printed, errors = run(*LINE, "--dry-run")
    assert (code, errors) == (0, "")
    assert job.ran is None
    lines = [line.split() for line in printed.splitlines()]
    assert lines == [
        ["folder", "files", "size"],
        ["line/r0.10", "2", "1.5", "GB"],
        ["line/half", "1", "2.0", "kB"],
        ["reads", "3.0", "GB,", "writes", "1.5", "GB,", "takes", "about", "0:02:10"],
    ]
    job.plan = StandIn.plan | {"seconds": None}
    assert run(*MERGE, "--dry-run")[1].endswith("takes an unknown time\n")
    assert run(*LINE, "--dry-run", "--quiet") == (0, "", "")


@pytest.mark.parametrize("arguments", [LINE, MERGE, ["merge", "c.yaml", "line"]], ids=["line", "merge", "mergekit"])
def test_a_plan_as_json(arguments, run, job):
    code, printed, errors = run(*arguments, "--dry-run", "--json")
    assert (code, json.loads(printed), errors) == (0, StandIn.plan, "")
    assert job.ran is None


def test_long_names_are_whole_where_there_is_no_terminal(run, job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = "line/" + "x" * 90
    job.plan = StandIn.plan | {"files": [{"path": f"{folder}/a.safetensors", "bytes": 1}]}
    assert folder in run(*LINE, "--dry-run")[1]


# --- failures


def test_one_sentence_or_with_debug_the_traceback(run, files, tmp_path, monkeypatch):
    arguments = ["interpolate", files[0], "nowhere", "--ratios", "0.5", "--out", tmp_path / "out"]
    code, _, errors = run(*arguments)
    assert code == 1
    assert errors.startswith("error: nowhere does not exist; give a local .safetensors file")
    assert errors.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["fused-merge", *map(str, arguments), "--debug"])
    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("no\n  good"), "no; good"),
        (FileNotFoundError(2, "No such file or directory", "gone"), "cannot use gone: No such file or directory"),
        (MemoryError(), "MemoryError"),
        (
            RuntimeError("impl='triton' cannot run; use unmatched='copy', max_memory=5GB or align_vocabulary=True"),
            "--impl triton cannot run; use --unmatched copy, --max-memory 5GB or --align-vocabulary",
        ),
        (ValueError("runs/dtype=x/verify=True is no folder"), "runs/dtype=x/verify=True is no folder"),
        (
            KeyError("weight"),
            "unexpected KeyError ('weight'), a bug: report what the same command prints with --debug, and the output "
            "of `fused-merge env`",
        ),
        (TypeError("x"), "unexpected TypeError (x), a bug: report what the same command prints with --debug"),
    ],
)
def test_every_failure_is_a_sentence(error, sentence, run, job, monkeypatch, capsys):
    job.fails = error
    for arguments in (LINE, MERGE):
        code, printed, errors = run(*arguments)
        assert (code, printed) == (1, "")
        assert errors.startswith(f"error: {sentence}")
        assert errors.count("\n") == 1
        code, printed, errors_too = run(*arguments, "--json")
        assert (code, errors_too) == (1, errors)
        assert json.loads(printed) == {"error": errors.removeprefix("error: ").removesuffix("\n")}
        monkeypatch.setattr(sys, "argv", ["fused-merge", *arguments, "--debug", "--json"])
        with pytest.raises(type(error)):
            main()
        assert json.loads(capsys.readouterr().out) == json.loads(printed)


def test_an_interrupted_run_says_how_to_go_on(run, job):
    job.fails = KeyboardInterrupt()
    sentence = "interrupted; run the same command again to go on from there"
    assert run(*LINE) == (130, "", f"error: {sentence}\n")
    assert run(*MERGE, "--json", "--quiet") == (130, json.dumps({"error": sentence}) + "\n", f"error: {sentence}\n")
    code, _, errors = run(*LINE, "--debug")
    assert (code, errors.startswith("Traceback")) == (130, True)
    assert errors.endswith(f"error: {sentence}\n")


def test_what_does_not_go_on_says_only_that_it_was_interrupted(run, files, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceDelta, "from_checkpoints", interrupted)
    assert run("delta", *files, "--out", tmp_path / "tau.safetensors") == (130, "", "error: interrupted\n")


def test_control_c_on_a_process(files, tmp_path):
    script = (
        "import os, signal, sys, fused_merge.checkpoints as c\n"
        "c.plan_interpolation = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n" + PROGRAM
    )
    arguments = ["interpolate", *map(str, files), "--ratios", "0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "error: interrupted; run the same command again to go on from there\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "a,b", "--out", "x"], "could not convert string to float: 'a'; write numbers with commas"),
        (["--ratios", "0:1", "--out", "x"], "'0:1' is no range start:end:step; write numbers with commas"),
        (["--ratios", "0:x:1", "--out", "x"], "'0:x:1' is no range start:end:step"),
        (["--ratios", "0:inf:1", "--out", "x"], "'0:inf:1' does not go from its start to its end"),
        (["--ratios", "0:nan:1", "--out", "x"], "'0:nan:1' does not go from its start to its end"),
        (["--ratios", "0:1:0", "--out", "x"], "'0:1:0' is no range start:end:step"),
        (["--ratios", "0:1:-0.1", "--out", "x"], "'0:1:-0.1' does not go from its start to its end in at most 1000"),
        (["--ratios", "0:1:1e-9", "--out", "x"], "'0:1:1e-9' does not go from its start to its end in at most 1000"),
        (["--ratios", "0.1"], "Missing option '--out'"),
        (["--out", "x"], "Missing option '--ratios' or '--ratios-file'"),
        (["--ratios", "1", "--ratios-file", "f", "--out", "x"], "--ratios and --ratios-file exclude each other"),
        (["--ratios", "0.1", "--out", "x", "--fast"], "No such option"),
        (["--ratios", "0.1", "--out", "x", "--worker", "0/2"], "'0/2' is not one of n workers; write i/n with i from"),
        (["--ratios", "0.1", "--out", "x", "--worker", "3/2"], "'3/2' is not one of n workers"),
        (["--ratios", "0.1", "--out", "x", "--workers", "2"], "'2' is not one of n workers"),
        (["--ratios", "0.1", "--out", "x", "--threads", "0"], "'--threads'"),
    ],
)
def test_wrong_usage(arguments, message, run):
    code, printed, errors = run("interpolate", "a", "b", *arguments)
    assert (code, printed) == (2, "")
    assert message in errors


def test_an_impl_that_there_is_not(run, files, tmp_path):
    code, _, errors = run("interpolate", *files, "--ratios", "0.5", "--out", tmp_path / "out", "--impl", "fast")
    assert code == 1
    assert errors.startswith("error: impl must be one of")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"], ["--version"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_failure(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_standard_output_that_takes_nothing():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM, "env"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write to standard output: No space left on device\n"


# --- the program


def test_env(run):
    code, printed, _ = run("env", "--json")
    assert code == 0
    report = json.loads(printed)
    assert report == environment()
    assert report["torch"] == torch.__version__
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["impl"]["cpu"].startswith("eager")
    code, printed, _ = run("env")
    assert code == 0
    assert torch.__version__ in printed
    assert "impl cpu" in printed


def test_env_tells_what_an_override_does(monkeypatch):
    monkeypatch.setenv("FUSED_MERGE_IMPL", "fast")
    report = environment()
    assert report["FUSED_MERGE_IMPL"] == "fast"
    assert report["impl"]["cpu"].startswith("none: FUSED_MERGE_IMPL must be one of")


def test_version(run):
    assert run("--version") == (0, f"fused-merge {__version__}\n", "")


def test_completion_is_offered(run):
    code, printed, _ = run("--help")
    assert code == 0
    assert "--install-completion" in printed
    for command in ("interpolate", "sweep", "merge", "delta", "verify", "inspect", "env"):
        assert f"\n  {command} " in printed


def test_help_says_what_jobs_take_by_themselves(run, monkeypatch):
    monkeypatch.setattr(engine, "_cores", lambda: 2)
    taken = engine.Resources.of(None, None, "cpu", "auto")
    code, printed, _ = run("interpolate", "--help")
    assert code == 0
    assert f"({taken.threads} for 2 cores)" in " ".join(printed.split())
    assert f"({taken.memory >> 20}MiB)" in printed


def answers(arguments, **environment):
    """What a fresh process prints, and whether it imported torch."""
    script = f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n{PROGRAM}"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arguments", [["--help"], ["interpolate", "--help"], ["--version"], ["merge"]], ids=" ".join)
def test_help_and_usage_do_not_wait_for_torch(arguments):
    done = answers(arguments)
    assert done.returncode == (2 if arguments == ["merge"] else 0)
    assert done.stderr.splitlines()[-1] == "False"


def test_completion_does_not_wait_for_torch():
    done = answers([], _FUSED_MERGE_COMPLETE="complete_bash", COMP_WORDS="fused-merge in", COMP_CWORD="1")
    assert done.stdout.split() == ["interpolate", "inspect"]
    assert done.stderr == "False\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra(missing, run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("fused_merge.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code, printed, errors = run("env")
    assert (code, printed) == (2, "")
    assert errors.endswith("pip install 'fused_merge[cli]'\n")
    assert errors.count("\n") == 1


def test_the_library_needs_no_extra_and_imports_no_triton():
    script = (
        "import sys\n"
        "for name in ('typer', 'rich', 'yaml', 'matplotlib', 'transformers', 'lm_eval'): sys.modules[name] = None\n"
        "import fused_merge.cli, fused_merge.checkpoints, fused_merge.interpolation.ratio_sweep\n"
        "import fused_merge.delta.reference_delta\n"
        "import fused_merge.sweep.pareto, fused_merge.sweep.evaluate\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
