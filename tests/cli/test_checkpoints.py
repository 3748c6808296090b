"""`interpolate`, `merge` and `verify`: what they pass on, write and print."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from folders import everything_in
from safetensors.torch import load_file, save_file

from fused_merge.checkpoints.options import InterpolatePlanOptions, RunOptions, StreamOptions
from fused_merge.merge.mergekit import plan_mergekit
from fused_merge.merge.options import MergekitOptions, MergePlanOptions
from fused_merge.options import options_of

INTERPOLATE = ["interpolate", "a", "b", "--ratios", "0.1,0.5", "--out", "line"]
MERGE = ["merge", "--base", "a", "--model", "b=0.5", "--model", "dir=1/c=-2", "--method", "ties", "--out", "line"]
PLAN = ["--dtype", "float32", "--unmatched", "copy", "--align-vocabulary", "--config-from", "base", "--overwrite"]
PLAN += ["--tokenizer-from", "base", "--any-architecture", "--max-shard-size", "5GB"]
PLAN += ["--strip-prefix", "net.", "--strip-prefix", "model.", "--rename", "a=b"]
RUN = ["--threads", "4", "--max-memory", "1000000", "--device", "cuda:1", "--verify", "--quiet"]
PLAN_ASKED = {"dtype": "float32", "unmatched": "copy", "align_vocabulary": True, "config_from": "base"}
PLAN_ASKED |= {"tokenizer_from": "base", "max_shard_size": "5GB", "overwrite": True, "any_architecture": True}
PLAN_ASKED |= {"strip_prefix": ["net.", "model."], "rename": ["a=b"]}
RUN_ASKED = {"threads": 4, "max_memory": "1000000", "device": "cuda:1", "verify": True, "progress": False}


def defaults(*definitions):
    """What the command line passes on where nothing is given: of an option that may be repeated an empty list."""
    found = {name: option.default for name, option in options_of(*definitions).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def check_wrong_usage(arguments, message, run, job):
    code, printed, errors = run(*arguments, "--json")
    assert (code, printed, job.planned) == (2, "", None)
    assert message in errors


def test_interpolate(run, files, tmp_path):
    out = tmp_path / "out"
    common = ["interpolate", *files, "--out", out]
    assert run(*common, "--ratios", "0.25,0.5") == (0, f"{out}/r0.25\n{out}/r0.50\n", "")
    assert load_file(out / "r0.25" / "model.safetensors")["w"].tolist() == [0.25] * 3

    # What the library calls overwrite=True is an option here.
    sentence = f"error: {out / 'r0.50'} exists; pass --overwrite to replace a folder, or choose another\n"
    assert run(*common, "--ratios", "0.5") == (1, "", sentence)

    code, printed, _ = run(*common, "--ratios=-0.5,0.5", "--overwrite", "--json")
    written = [{"ratio": ratio, "path": f"{out}/r{ratio:.2f}"} for ratio in (-0.5, 0.5)]
    assert (code, json.loads(printed)) == (0, written)


def test_a_dry_run_says_what_the_run_does(run, files, tmp_path):
    out = tmp_path / "out"
    arguments = ["interpolate", *files, "--ratios", "0.25,0.5", "--out", out]
    code, printed, errors = run(*arguments, "--dry-run", "--json")
    assert (code, errors) == (0, "")
    plan = json.loads(printed)
    assert plan["outputs"] == [str(out / "r0.25"), str(out / "r0.50")]
    assert {Path(file["path"]).name for file in plan["files"]} >= {"model.safetensors"}
    assert not list(tmp_path.rglob("r0.25"))
    assert str(out / "r0.25") in run(*arguments, "--dry-run")[1]
    assert run(*arguments)[0] == 0
    weights = [file for file in plan["files"] if file["path"].endswith(".safetensors")]
    assert [file["bytes"] for file in weights] == [Path(file["path"]).stat().st_size for file in weights]


def test_interpolate_passes_everything_on(run, job):
    arguments = Path("a"), Path("b"), [0.1, 0.5], Path("line")
    assert run(*INTERPOLATE) == (0, "line/r0.10\nline/half\n", "")
    assert job.planned == ("plan_interpolation", arguments, defaults(InterpolatePlanOptions))
    assert job.ran == defaults(RunOptions)

    assert run(*INTERPOLATE, *PLAN, *RUN, "--impl", "eager") == (0, "", "")
    assert job.planned == ("plan_interpolation", arguments, PLAN_ASKED)
    assert job.ran == RUN_ASKED | {"impl": "eager"}


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


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_ratios_from_a_file(suffix, run, job, tmp_path):
    ratios = {"r0.10": 0.1, "half": {r"model\.layers\..*": 0.5, ".*norm.*": 1}}
    file, yaml = tmp_path / f"ratios{suffix}", "r0.10: 0.1\nhalf:\n  model\\.layers\\..*: 0.5\n  .*norm.*: 1\n"
    file.write_text(json.dumps(ratios) if suffix == ".json" else yaml)
    code, printed, _ = run("interpolate", "a", "b", "--ratios-file", file, "--out", "line", "--json")
    assert (code, job.planned[1][2]) == (0, ratios)
    assert json.loads(printed) == [{"ratio": 0.1, "path": "line/r0.10"}, {"ratio": ratios["half"], "path": "line/half"}]


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
    sentence = f"error: {tmp_path}/r.yaml needs PyYAML: pip install 'fused_merge[cli]', or take a .json file\n"
    assert run("interpolate", "a", "b", "--ratios-file", tmp_path / "r.yaml", "--out", "x") == (1, "", sentence)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratios a,b --out x", "could not convert string to float: 'a'; write numbers with commas"),
        ("--ratios 0:1 --out x", "'0:1' is no range start:end:step; write numbers with commas"),
        ("--ratios 0:x:1 --out x", "'0:x:1' is no range start:end:step"),
        ("--ratios 0:nan:1 --out x", "'0:nan:1' does not go from its start to its end"),
        ("--ratios 0:1:0 --out x", "'0:1:0' is no range start:end:step"),
        ("--ratios 0:1:-0.1 --out x", "'0:1:-0.1' does not go from its start to its end in at most 1000"),
        ("--ratios 0:1:1e-9 --out x", "'0:1:1e-9' does not go from its start to its end in at most 1000"),
        ("--ratios 0.1", "Missing option '--out'"),
        ("--out x", "Missing option '--ratios' or '--ratios-file'"),
        ("--ratios 1 --ratios-file f --out x", "--ratios and --ratios-file exclude each other"),
        ("--ratios 0.1 --out x --fast", "No such option"),
        ("--ratios 0.1 --out x --threads 0", "'--threads'"),
    ],
)
def test_wrong_usage_of_interpolate(arguments, message, run, job):
    check_wrong_usage(["interpolate", "a", "b", *arguments.split()], message, run, job)


def test_merge_passes_everything_on(run, job):
    job.outputs = [Path("line")]
    arguments = "a", {"b": 0.5, "dir=1/c": -2.0}, "ties", Path("line")
    assert run(*MERGE) == (0, "line\n", "")
    assert job.planned == ("plan_merge", arguments, defaults(MergePlanOptions))
    assert job.ran == defaults(StreamOptions)

    recipe = ["--density", "0.2", "--no-normalize", "--lambda", "0.7", "--rescale", "--trim", "model", "--seed", "3"]
    recipe += ["--gamma", "0.1", "--epsilon", "0.25"]
    assert run(*MERGE, *recipe, *PLAN, *RUN, "--json") == (0, '{"path": "line"}\n', "")
    asked = {"density": 0.2, "normalize": False, "scale": 0.7, "rescale": True, "trim": "model", "seed": 3}
    asked |= {"gamma": 0.1, "epsilon": 0.25}
    assert job.planned == ("plan_merge", arguments, asked | PLAN_ASKED)
    assert job.ran == RUN_ASKED


@pytest.mark.parametrize("where", [["line"], ["--out", "line"]])
def test_merge_by_a_configuration_of_mergekit(where, run, job):
    job.outputs = [Path("line")]
    assert run("merge", "config.yaml", *where) == (0, "line\n", "")
    assert job.planned == ("plan_mergekit", (Path("config.yaml"), Path("line")), defaults(MergekitOptions))
    assert job.ran == defaults(StreamOptions)
    assert run("merge", "config.yaml", *where, "--overwrite", "--max-shard-size", "2000", *RUN) == (0, "", "")
    assert job.planned[2] == defaults(MergekitOptions) | {"max_shard_size": "2000", "overwrite": True}
    assert job.ran == RUN_ASKED


def test_merge_of_two_files(run, files, tmp_path):
    save_file({"w": torch.full((3,), 3.0)}, tmp_path / "third.safetensors")
    out = tmp_path / "merged"
    models = ["--model", f"{files[1]}=1", "--model", f"{tmp_path / 'third.safetensors'}=0.5"]
    arguments = ["merge", "--base", files[0], *models, "--method", "task_arithmetic", "--out", out]
    assert run(*arguments) == (0, f"{out}\n", "")
    assert load_file(out / "model.safetensors")["w"].tolist() == [2.5] * 3
    assert run("verify", out)[0] == 0


def test_merge_of_a_file_of_mergekit(run, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1] / "merge" / "mergekit")
    (out,) = plan_mergekit("ties.yaml", tmp_path / "library" / "out").run(progress=False)
    assert run("merge", "ties.yaml", tmp_path / "command" / "out") == (0, f"{tmp_path}/command/out\n", "")
    assert everything_in(tmp_path / "command" / "out") == everything_in(out)


MODEL_IS_MISSING = "--model is missing; give --base, --model and --method, or CONFIG.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", MODEL_IS_MISSING),
        ("--base a --method ties --out x", MODEL_IS_MISSING),
        ("--base a --model b=1 --out x", "--method is missing; give --base, --model and --method"),
        ("--base a --model b=1 --method ties", "--out is missing; give the folder to write"),
        ("c.yaml", "--out is missing; give the folder to write"),
        ("c.yaml x --out x", "OUT and --out exclude each other; give one"),
        ("c.yaml x --density 0.2", "--density is for c.yaml to say; leave one of them out"),
        # What is given counts, not whether it is the default.
        ("c.yaml x --seed 0", "--seed is for c.yaml to say"),
        ("c.yaml x --trim model", "--trim is for c.yaml to say"),
        ("c.yaml x --model a=1", "--model is for c.yaml to say"),
        ("--model b", "'b' is not a model and its weight; write PATH=WEIGHT, such as sft/=0.5"),
        ("--model b=c", "'b=c' is not a model and its weight"),
        ("--model =1", "'=1' is not a model and its weight"),
        ("--base a --model b=1 --model b=2 --method ties --out x", "a --model is given twice; give each one weight"),
    ],
)
def test_wrong_usage_of_merge(arguments, message, run, job):
    check_wrong_usage(["merge", *arguments.split()], message, run, job)


def test_verify_reads_every_folder(run, monkeypatch):
    monkeypatch.setattr("fused_merge.checkpoints.folders.verify_checkpoint", lambda folder: len(str(folder)) * 1000)
    document = '[{"path": "a", "bytes": 1000}, {"path": "bb", "bytes": 2000}]\n'
    assert run("verify", "a", "bb", "--json") == (0, document, "")
    lines = "a: 1.0 kB, every tensor as it was written\nbb: 2.0 kB, every tensor as it was written\n"
    assert run("verify", "a", "bb") == (0, lines, "")
    assert run("verify", "a", "--quiet") == (0, "", "")


def test_verify_names_what_has_changed(run, files, tmp_path):
    out = tmp_path / "out"
    assert run("interpolate", *files, "--ratios", "0.25,0.5", "--out", out)[0] == 0
    assert run("verify", out / "r0.25", out / "r0.50")[0] == 0
    weights = out / "r0.50" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    code, printed, errors = run("verify", out / "r0.25", out / "r0.50")
    assert (code, printed.count("\n")) == (1, 1)
    assert re.fullmatch(r"error: .*'w'.*\n", errors)


def test_the_table_of_a_plan(run, job):
    code, printed, errors = run(*INTERPOLATE, "--dry-run")
    assert (code, errors, job.ran) == (0, "", None)
    assert [line.split() for line in printed.splitlines()] == [
        ["folder", "files", "size"],
        ["line/r0.10", "2", "1.5", "GB"],
        ["line/half", "1", "2.0", "kB"],
        ["reads", "3.0", "GB,", "writes", "1.5", "GB"],
    ]
    assert run(*INTERPOLATE, "--dry-run", "--quiet") == (0, "", "")


@pytest.mark.parametrize("arguments", [INTERPOLATE, MERGE, ["merge", "c.yaml", "line"]], ids=lambda x: " ".join(x[:2]))
def test_a_plan_as_json(arguments, run, job):
    code, printed, errors = run(*arguments, "--dry-run", "--json")
    assert (code, json.loads(printed), errors, job.ran) == (0, job.plan, "", None)


def test_long_names_are_whole_where_there_is_no_terminal(run, job, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = "line/" + "x" * 90
    job.plan["files"] = [{"path": f"{folder}/a.safetensors", "bytes": 1}]
    assert folder in run(*INTERPOLATE, "--dry-run")[1]
