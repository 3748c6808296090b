"""The command line: what it writes, prints and exits with."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_merge.cli import environment, main


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


def test_interpolate(run, files, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("interpolate", *files, "--ratios", "0.25,0.5", "--out", out)
    assert (code, printed.split(), errors) == (0, [str(out / "r0.25"), str(out / "r0.50")], "")
    assert load_file(out / "r0.25" / "model.safetensors")["w"].tolist() == [0.25] * 3

    code, printed, errors = run("interpolate", *files, "--ratios", "0.5", "--out", out)
    assert (code, printed) == (1, "")
    assert errors == f"error: {out / 'r0.50'} exists; pass overwrite=True to replace a folder, or choose another\n"

    code, printed, _ = run("interpolate", *files, "--ratios=-0.5,0.5", "--out", out, "--overwrite", "--json")
    assert code == 0
    assert json.loads(printed) == [
        {"ratio": -0.5, "path": str(out / "r-0.50")},
        {"ratio": 0.5, "path": str(out / "r0.50")},
    ]


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
    ("arguments", "message"),
    [
        (["--ratios", "a,b", "--out", "x"], "could not convert string to float: 'a'; write numbers with commas"),
        (["--ratios", "0.1"], "Missing option '--out'"),
        (["--out", "x"], "Missing option '--ratios'"),
        (["--ratios", "0.1", "--out", "x", "--fast"], "No such option"),
    ],
)
def test_wrong_usage(arguments, message, run):
    code, _, errors = run("interpolate", "a", "b", *arguments)
    assert code == 2
    assert message in errors


def test_an_impl_that_there_is_not(run, files, tmp_path):
    code, _, errors = run("interpolate", *files, "--ratios", "0.5", "--out", tmp_path / "out", "--impl", "fast")
    assert code == 1
    assert errors.startswith("error: impl must be one of")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra(missing, run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code, printed, errors = run("env")
    assert (code, printed) == (2, "")
    assert errors.endswith("pip install 'fused_merge[cli]'\n")
    assert errors.count("\n") == 1


def test_the_library_needs_no_extra_and_imports_no_triton():
    script = (
        "import sys\n"
        "for name in ('typer', 'rich'): sys.modules[name] = None\n"
        "import fused_merge.cli, fused_merge.checkpoints, fused_merge.interpolation, fused_merge.reference_delta\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
