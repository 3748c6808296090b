"""The machine code for GPUs that are not here: no spills, and 128-bit accesses wherever whole chunks are moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_ahead.py"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict[str, int]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    # Triton compiles only where it was imported without its interpreter.
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_build_is_there(reports):
    targets = [name.rsplit("/", 1)[1] for name in reports]
    assert {target: targets.count(target) for target in targets} == {"sm_80": 25, "sm_90": 25, "gfx942": 25}


def test_nothing_spills(reports):
    assert {name: report["spills"] for name, report in reports.items() if report["spills"]} == {}


def test_the_step_moves_whole_chunks_128_bits_at_a_time(reports):
    for name, report in reports.items():
        kernel, build, target = name.split("/")
        if kernel != "merging_adamw":
            continue
        storage, tau = build.split("-")[0], build.split("tau:")[1].split("-")[0]
        dense = 0 if tau == "none" or "sparse" in build else BYTES[tau]
        read = report["elements"] * (2 * BYTES[storage] + 4 + 4 + dense)
        written = report["elements"] * (BYTES[storage] + 4 + 4)
        assert report["wide_written"] == written, name
        if target == "gfx942":
            # Rows of the scalar table are wide loads here too.
            assert report["wide_read"] >= read, name
        else:
            assert report["wide_read"] == read, name


def test_interpolation_moves_whole_chunks_128_bits_at_a_time(reports):
    for name, report in reports.items():
        kernel, dtype, target = name.split("/")
        if kernel != "interpolate":
            continue
        # The loop over ratios stands once in the code.
        assert report["wide_written"] == report["elements"] * BYTES[dtype], name
        if target == "gfx942":
            assert report["wide_read"] >= report["elements"] * 2 * BYTES[dtype], name
        else:
            assert report["wide_read"] == report["elements"] * 2 * BYTES[dtype], name
