"""The machine code for GPUs that are not here: few builds, no spills, and 128-bit accesses of all that is dense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "kernels.py"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    # Triton compiles only where it was imported without its interpreter.
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, SCRIPT, "--json"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_build_compiles_for_every_target_and_there_are_few(reports):
    built = {
        target: {row["build"] for row in reports if row["target"] == target} for target in ("sm_80", "sm_90", "gfx942")
    }
    assert len(reports) == sum(map(len, built.values()))
    assert built["sm_80"] == built["sm_90"] == built["gfx942"]
    assert 20 <= len(built["sm_90"]) <= 24


def test_nothing_spills_to_memory(reports):
    assert [(row["build"], row["target"]) for row in reports if row["spills"]] == []


def test_whole_chunks_move_128_bits_at_a_time_and_each_tensor_once(reports):
    for row in reports:
        where = (row["build"], row["target"])
        if row["writes"] or row["reads"]:
            assert row["written"] == row["writes"], where
            if row["target"] == "gfx942":
                # Rows of the scalar table are wide loads there too.
                assert row["read"] >= row["reads"], where
            else:
                assert row["read"] == row["reads"], where
