"""Every script of `examples/` is short and runs, in processes of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
# What a script prints when it has done what it is about.
PRINTED = {"deepspeed_zero.py": "step 9", "peft_dpo.py": "an adapter of rank 8"}
every_example = pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)


def imported(tree):
    """The packages that a script imports."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@every_example
def test_an_example_is_no_longer_than_a_page(script):
    assert len(script.read_text().splitlines()) <= 60


@every_example
def test_an_example_runs_as_it_says(script, tmp_path):
    tree = ast.parse(script.read_text())
    if missing := [name for name in sorted(imported(tree)) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{script.name} needs {missing}")
    told = ast.get_docstring(tree) or ""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "torchrun" in told else []
    # What scripts write to temporary folders goes with this test's.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    if not torch.cuda.is_available():
        environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    elif launcher and torch.cuda.device_count() < 2:
        pytest.skip(f"{script.name} needs 2 GPUs or none")
    command = [sys.executable, *launcher, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-5000:]
    assert PRINTED.get(script.name, "\n") in ended.stdout
