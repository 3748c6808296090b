"""What holds for every command: sentences, exit codes, output that nobody reads, help without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_merge._version import __version__
from fused_merge.checkpoints import engine
from fused_merge.cli import main
from fused_merge.cli.commands import environment
from fused_merge.delta.reference_delta import ReferenceDelta

PROGRAM = "import sys; from fused_merge.cli import main; sys.argv[0] = 'fused-merge'; main()"
INTERPOLATE = ["interpolate", "a", "b", "--ratios", "0.1,0.5", "--out", "line"]
MERGE = ["merge", "--base", "a", "--model", "b=0.5", "--method", "ties", "--out", "line"]


def process(script, *arguments, **options):
    options = {"capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, "-c", script, *arguments], **options)


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
    for arguments in (INTERPOLATE, MERGE):
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
    assert run(*INTERPOLATE) == (130, "", f"error: {sentence}\n")
    assert run(*MERGE, "--json", "--quiet") == (130, json.dumps({"error": sentence}) + "\n", f"error: {sentence}\n")
    code, _, errors = run(*INTERPOLATE, "--debug")
    assert (code, errors[:9], errors.splitlines()[-1]) == (130, "Traceback", f"error: {sentence}")


def test_a_command_that_does_not_go_on_says_only_that_it_was_interrupted(run, files, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ReferenceDelta, "from_checkpoints", interrupted)
    assert run("delta", *files, "--out", tmp_path / "tau.safetensors") == (130, "", "error: interrupted\n")


def test_control_c_on_a_process():
    # In the place of the real module: importing torch would be most of this test.
    script = (
        "import os, signal, sys, types\n"
        "module = types.ModuleType('fused_merge.checkpoints.interpolate')\n"
        "module.plan_interpolation = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.modules[module.__name__] = module\n" + PROGRAM
    )
    done = process(script, *INTERPOLATE)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert done.stderr == "error: interrupted; run the same command again to go on from there\n"


def test_a_reader_that_goes_away_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    done = process(PROGRAM, "--version", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_standard_output_that_takes_nothing():
    with Path("/dev/full").open("w") as full:
        done = process(PROGRAM, "--version", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "error: cannot write to standard output: No space left on device\n")


def test_env(run, monkeypatch):
    code, printed, _ = run("env", "--json")
    report = json.loads(printed)
    assert (code, report) == (0, environment())
    assert report["torch"] == torch.__version__
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["impl"]["cpu"].startswith("eager")
    code, printed, _ = run("env")
    assert code == 0
    assert all(text in printed for text in (torch.__version__, "impl cpu"))
    monkeypatch.setenv("FUSED_MERGE_IMPL", "fast")
    report = environment()
    assert report["FUSED_MERGE_IMPL"] == "fast"
    assert report["impl"]["cpu"].startswith("none: FUSED_MERGE_IMPL must be one of")


def test_version_and_help_that_offers_completion(run):
    assert run("--version") == (0, f"fused-merge {__version__}\n", "")
    code, printed, _ = run("--help")
    assert code == 0
    assert "--install-completion" in printed
    for command in ("interpolate", "sweep", "adapt", "merge", "delta", "verify", "inspect", "env"):
        assert f"\n  {command} " in printed


def test_help_says_what_jobs_take_by_themselves(run, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    taken = engine.Resources.of(None, None, "cpu", "auto")
    code, printed, _ = run("interpolate", "--help")
    assert code == 0
    assert f"({taken.threads} for 2 cores)" in " ".join(printed.split())
    assert f"({taken.memory >> 20}MiB)" in printed


def test_help_usage_and_completion_do_not_wait_for_torch():
    script = (
        "import os, sys\n"
        "from contextlib import suppress\n"
        "from fused_merge.cli import main\n"
        "completion = {'_FUSED_MERGE_COMPLETE': 'complete_bash', 'COMP_WORDS': 'fused-merge in', 'COMP_CWORD': '1'}\n"
        "for arguments in (['--help'], ['interpolate', '--help'], ['merge', '--help'], ['--version'], ['merge'], []):\n"
        "    sys.argv = ['fused-merge', *arguments]\n"
        "    os.environ.update({} if arguments else completion)\n"
        "    with suppress(SystemExit):\n"
        "        main()\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    done = process(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["interpolate", "inspect"]
    assert "--model is missing" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_cli_extra(missing, run, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == missing or name.startswith("fused_merge.cli."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert run("env") == (2, "", f"fused-merge needs {missing}: pip install 'fused_merge[cli]'\n")


def test_the_library_needs_no_extra_and_imports_no_triton():
    script = (
        "import sys\n"
        "for name in ('typer', 'rich', 'yaml', 'matplotlib', 'transformers', 'lm_eval'): sys.modules[name] = None\n"
        "import fused_merge.cli, fused_merge.checkpoints.interpolate, fused_merge.merge.mergekit\n"
        "import fused_merge.interpolation.ratio_sweep, fused_merge.delta.reference_delta\n"
        "import fused_merge.sweep.pareto, fused_merge.sweep.evaluate\n"
        "print('triton' in sys.modules)"
    )
    done = process(script)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
