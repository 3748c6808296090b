"""Compiled code is compiled once for a machine: not again for other options, nor by other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from numba.core import event
from tensors import Tensors

from fused_merge import functional
from fused_merge.compiled import jit
from fused_merge.eager.shard import ShardIndex

# Takes a few steps; prints how many functions were compiled, and how many with one that nobody has kept.
STEPS = """
import numba
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    from tensors import Tensors
    for method in ("ondare", "onties"):
        Tensors((5000,), (300,), sparse=True).step("compiled", method=method)
    print(len(recorder.buffer))
    numba.njit(lambda x: x + 1)(1)
    print(len(recorder.buffer))
"""


CHANGES = [
    {},
    {"lr": 1e-5},
    {"lr": torch.tensor(1e-3)},
    {"alpha": 0.5},
    {"betas": (0.8, 0.9)},
    {"eps": 0.0, "weight_decay": 0.0},
    {"reserve_rate": 0.5},
    {"method": "onties", "vote": "paper"},
    {"method": "onsoft"},
    {"method": "onproj", "project": "conflict"},
    {"method": "onproj", "project": "onto", "project_over": "rows", "project_on": "update"},
    {"rounding": "stochastic", "seed": -5},
    {"shards": [ShardIndex(8, 300, 300), ShardIndex(2**34, 5000, 5000)]},
    {"found_inf": torch.tensor(1.0)},
]


def test_no_option_and_no_size_is_compiled_for_itself():
    compiled = []

    class Listener(event.Listener):
        def on_start(self, event):
            compiled.append(event.data)

        def on_end(self, event):
            pass

    workspace = functional.Workspace()
    tensors = {dtype: Tensors((20, 15), (5000,), dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.half)}
    for method in ("ondare", "onties", "onproj"):
        tensors[torch.float32].step("compiled", workspace=workspace, method=method)
    with event.install_listener("numba:compile", Listener()):
        for own in tensors.values():
            for change in CHANGES:
                own.step("compiled", workspace=workspace, **change)
    assert compiled == []


def test_another_process_compiles_nothing():
    for method in ("ondare", "onties"):
        Tensors((5000,), (300,), sparse=True).step("compiled", method=method)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    run = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    of_steps, with_another = map(int, run.stdout.split())
    assert of_steps == 0
    assert with_another > 0


def test_code_is_kept_in_a_folder_of_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(jit._cache_directory.__wrapped__())
    assert folder.parent == tmp_path / "fused_merge"
    assert folder.name == Path(jit._cache_directory.__wrapped__()).name
    room = tmp_path / "room"
    room.mkdir()
    for file in Path(jit.__file__).parent.glob("*.py"):
        (room / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(jit, "__file__", str(room / "jit.py"))
    assert Path(jit._cache_directory.__wrapped__()).name == folder.name
    (room / "sums.py").write_text("other code")
    assert Path(jit._cache_directory.__wrapped__()).name != folder.name


def nothing(task: int) -> None:
    """A task that does nothing."""


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert jit._cache_directory.__wrapped__() == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert jit._cache_directory.__wrapped__() == ""
    monkeypatch.setattr(jit, "_cache_directory", lambda: "")
    assert jit.task(nothing)() != 0
