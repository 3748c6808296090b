"""The machine code for GPUs that are not here: few builds, no spills, and 128-bit accesses of all that is dense.

What the record says counts where it was compiled from the very code that is here; the rest is compiled, and a sample.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def by_key(rows):
    return {(row["build"], row["target"], row["form"]): row for row in rows}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    # Triton compiles only where it was imported without its interpreter.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, BENCH / "kernels.py", "--json", "--changed"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_build_compiles_for_every_target_and_there_are_few(found):
    rows = by_key(found["rows"])
    builds = {build for build, _, form in rows if form == "whole"}
    ends = {build for build, _, form in rows if form == "ends"}
    assert 20 <= len(builds) <= 26
    assert {build for build in builds if build.startswith("step: ")} < ends < builds
    assert {target for _, target, _ in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(rows) == 4 * (len(builds) + len(ends))


def test_nothing_spills_and_whole_blocks_and_rows_move_128_bits_at_a_time_and_each_tensor_once(found):
    for key, row in by_key(found["rows"]).items():
        build, target, form = key
        assert row["spills"] == 0, key
        if (row["writes"] or row["reads"]) and (form == "whole" or "rows" in build):
            # Entries of tables are wide accesses on AMD too, and so are the 256 counts that a round begins with.
            beside = target == "gfx942" or build == "count: onties"
            assert row["written"] == row["writes"] or (beside and row["written"] > row["writes"]), key
            assert row["read"] == row["reads"] or (beside and row["read"] > row["reads"]), key


def test_the_code_does_not_grow_unseen(found):
    record = json.loads((BENCH / "results" / "kernels.json").read_text())
    if record["triton"] != found["triton"]:
        pytest.skip(f"the record is of Triton {record['triton']}, here is {found['triton']}")
    recorded, rows = by_key(record["rows"]), by_key(found["rows"])
    assert recorded.keys() == rows.keys(), "record the builds: python bench/kernels.py --write"
    for key, row in rows.items():
        assert row["instructions"] <= 1.1 * recorded[key]["instructions"], key
        assert row["narrow"] <= recorded[key]["narrow"], key
        assert row == recorded[key] or row["source"] != recorded[key]["source"], key
