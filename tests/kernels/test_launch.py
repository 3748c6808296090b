"""Triton's own launch path, which the interpreter leaves out: specialization, compilation, the call of the driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from device import DEVICE

STUB = Path(__file__).parent / "no_gpu"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for a driver, where there is none")
@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform != "linux", reason="builds a stub driver with gcc")
def test_steps_are_launched_and_nothing_is_compiled_twice(tmp_path):
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, STUB / "libcuda.c"], check=True
    )
    own = {"TRITON_CACHE_DIR": tmp_path / "triton", "TRITON_LIBCUDA_PATH": tmp_path, "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {key: str(value) for key, value in own.items()}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, STUB / "launch.py", library], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout)
    assert len(results) == 9
    # Neither a learning rate of 1 nor new gradients make another kernel of it.
    assert all(result["launched"] > 0 and result["first"] > 0 and result["later"] == 0 for result in results)
