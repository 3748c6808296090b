"""`sweep` and `delta`: what they pass on, write and print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import llama, save

from fused_merge.delta.reference_delta import ReferenceDelta

SWEEP = ["sweep", "a", "b", "--out", "out", "--ratios", "0:1:0.5"]
SWEEP_DEFAULTS = {"scorers": [], "tasks": [], "minimize": [], "compare": [], "device": "cpu", "dtype": None}
SWEEP_DEFAULTS |= {"batch_size": 1, "progress": True, "trust_remote_code": False, "loader": None, "include_path": []}
SWEEP_DEFAULTS |= {"num_fewshot": None, "limit": None, "apply_chat_template": False, "confirm_run_unsafe_code": False}
SWEEP_DEFAULTS |= {"align_vocabulary": False, "unmatched": "error", "strip_prefix": [], "rename": []}
SWEEP_DEFAULTS |= {"any_architecture": False}


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """What `sweep_checkpoints` was asked for; it prints, and has written what a sweep of two ratios writes."""
    files = [tmp_path / name for name in ("results.json", "results.md", "pareto.png")]
    asked = SimpleNamespace(arguments=None, options=None, fails=None, files=list(map(str, files)))
    files[0].write_text('{"rows": [], "front": ["0.5"]}')

    def stand_in(*arguments, **options):
        asked.arguments, asked.options = arguments, options
        print("a scorer at work")
        if asked.fails:
            raise asked.fails
        return files

    monkeypatch.setattr("fused_merge.sweep.evaluate.sweep_checkpoints", stand_in)
    return asked


def test_sweep_passes_everything_on(run, swept):
    code, printed, errors = run(*SWEEP, "--scorer", "m:f")
    # What scorers print does not get between the results.
    assert (code, printed.split(), errors) == (0, swept.files, "a scorer at work\n")
    assert swept.arguments == (Path("a"), Path("b"), [0.0, 0.5, 1.0], Path("out"))
    assert swept.options == SWEEP_DEFAULTS | {"scorers": ["m:f"]}

    asked = "--scorer m:f --scorer n:g --task x --task y --minimize g --minimize x/loss --compare o/results.json "
    asked += "--compare p/results.json --device cuda --dtype bfloat16 --batch-size 8 --quiet --include-path t "
    asked += "--include-path u --num-fewshot 5 --limit 0.1 --apply-chat-template --trust-remote-code --loader l:h "
    asked += "--confirm-run-unsafe-code --align-vocabulary --unmatched copy --strip-prefix net. --rename a=b "
    asked += "--any-architecture"
    assert run(*SWEEP, *asked.split())[:2] == (0, "")
    wanted = {"scorers": ["m:f", "n:g"], "tasks": ["x", "y"], "minimize": ["g", "x/loss"], "device": "cuda"}
    wanted |= {"compare": ["o/results.json", "p/results.json"], "dtype": "bfloat16", "batch_size": 8}
    wanted |= {"include_path": ["t", "u"], "num_fewshot": 5, "limit": 0.1, "apply_chat_template": True}
    wanted |= {"trust_remote_code": True, "loader": "l:h", "confirm_run_unsafe_code": True}
    wanted |= {"align_vocabulary": True, "unmatched": "copy", "strip_prefix": ["net."], "rename": ["a=b"]}
    wanted |= {"any_architecture": True}
    assert swept.options == wanted | {"progress": False}


def test_sweep_as_json_and_with_ratios_from_a_file(run, swept, tmp_path):
    code, printed, errors = run(*SWEEP, "--task", "x", "--json")
    document = {"rows": [], "front": ["0.5"], "files": swept.files}
    assert (code, json.loads(printed), errors) == (0, document, "a scorer at work\n")
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
    errors = "a scorer at work\nerror: interrupted; run the same command again to go on from there\n"
    assert run(*SWEEP, "--scorer", "m:f") == (130, "", errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratios 0.1", "Missing option '--scorer' or '--task'"),
        ("--scorer m:f", "Missing option '--ratios' or '--ratios-file'"),
        ("--scorer m:f --ratios 1 --ratios-file f", "--ratios and --ratios-file exclude each other"),
        ("--task x --ratios 1 --batch-size 0", "'--batch-size'"),
    ],
)
def test_wrong_usage_of_sweep(arguments, message, run, swept):
    code, printed, errors = run("sweep", "a", "b", "--out", "out", *arguments.split(), "--json")
    assert (code, printed, swept.arguments) == (2, "", None)
    assert message in errors


def test_sweep_of_two_models(run, tmp_path, monkeypatch):
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
    norms = [llama(seed).lm_head.weight.detach().norm().item() for seed in range(2)]
    assert [entry["scores"]["norm"] for entry in json.loads(printed)["rows"]] == norms
    code, printed, errors = run(*common, "--scorer", "cli_scores:nothing")
    assert (code, printed) == (1, "")
    assert errors.startswith(f"error: {tmp_path}/out/results.json holds the results of a sweep with other scorers")
    code, printed, errors = run(*common[:-1], tmp_path / "other", "--scorer", "cli_scores:nothing")
    assert (code, printed) == (1, "")
    assert errors.startswith("error: scorer 'nothing' at ratio 0 returned nan, which is no finite number; correct it")


def test_errors_name_options_as_the_command_line_has_them(run, swept):
    for said, shown in (("trust_remote_code=True", "--trust-remote-code"), ("loader='m:f'", "--loader m:f")):
        swept.fails = ValueError(f"pass {said}")
        assert run(*SWEEP, "--scorer", "m:f")[2] == f"a scorer at work\nerror: pass {shown}\n"


def test_delta_is_written_and_replaces_no_checkpoint(run, files, tmp_path):
    out = tmp_path / "new" / "tau.safetensors"
    assert run("delta", *files, "--out", out) == (0, f"{out}\n", "")
    assert ReferenceDelta.load(out).tensor("w").tolist() == [1.0] * 3
    sentence = f"error: {out} exists; pass --overwrite to replace it, or choose another\n"
    assert run("delta", *files, "--out", out) == (1, "", sentence)

    sparse = ["--reserve-rate", "0.5", "--method", "random", "--seed", "3", "--dtype", "bfloat16"]
    code, printed, errors = run("delta", *files, "--out", out, "--overwrite", "--json", *sparse)
    assert (code, errors) == (0, "")
    loaded = ReferenceDelta.load(out)
    assert (loaded.sparsity, loaded.dtype("w")) == (("random", 0.5, 3), torch.bfloat16)
    document = {"path": str(out), "identity": loaded.identity, "tensors": 1, "ordered": False}
    document["bytes"] = out.stat().st_size
    assert json.loads(printed) == document
    code, _, errors = run("delta", *files, "--out", tmp_path / "other", "--reserve-rate", "0.5")
    assert (code, errors.startswith("error: method must be 'random' or 'magnitude'")) == (1, True)
    assert not (tmp_path / "other").exists()
    before = files[1].read_bytes()
    code, _, errors = run("delta", *files, "--out", files[1], "--overwrite")
    assert (code, errors.startswith(f"error: {files[1]} is a file that the delta is made of")) == (1, True)
    assert files[1].read_bytes() == before


def test_delta_is_told_the_order_of_the_model(run, tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save(llama(seed), tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    files = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"]
    out = tmp_path / "tau.safetensors"
    code, printed, _ = run("delta", *files, "--out", out, "--config", tmp_path / "tuned", "--json")
    assert (code, json.loads(printed)["ordered"]) == (0, True)
    assert ReferenceDelta.load(out).names == tuple(name for name, _ in llama(0).named_parameters())
    gone = run("delta", *files, "--out", out, "--overwrite", "--config", tmp_path / "gone")
    assert gone[0] == 1
    assert gone[2].startswith(f"error: {tmp_path / 'gone' / 'config.json'} does not exist; give the folder with the")
    code, printed, _ = run("inspect", *files, "--config", tmp_path / "tuned", "--json")
    assert (code, len(json.loads(printed)) > 21) == (0, True)
