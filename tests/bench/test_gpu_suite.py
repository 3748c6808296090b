"""The suite for GPUs runs without one, in the interpreter; and what the roofline predicts, by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu_checks
import gpu_suite
import gpu_times
import roofline

# There is a `kernels` in that folder, and one that others look for.
sys.path.pop(0)

BENCH = Path(roofline.__file__).parent
PAGE = BENCH.parent / "docs" / "explanation" / "performance.md"
BUILDS = {launch.build for op in roofline.ops().values() for launch in op.launches if launch.build}
MACHINE = {"gpu", "driver", "torch", "triton", "python", "commit"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("rows")
    command = [sys.executable, BENCH / "gpu_suite.py", "--device", "cpu", "--out", out, "--commit", "abc"]
    return subprocess.run(command, capture_output=True, text=True), out / "cpu-abc.json"


def test_every_step_of_a_dry_run_succeeds(dry_run):
    run, file = dry_run
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert all(row.keys() == MACHINE | set(gpu_suite.Row._fields) for row in rows)
    assert [row["step"] for row in rows if row["name"] == "step" and row["ok"]] == list(gpu_suite.SHARES)
    assert all(row["ok"] for row in rows)


def test_a_dry_run_times_every_operation_of_the_roofline(dry_run):
    rows = [row for row in json.loads(dry_run[1].read_text()) if row["ms"] is not None]
    timed = {(row["name"], row["baseline"]) for row in rows if row["size"].startswith("large")}
    assert timed == {(name, baseline) for name, op in roofline.ops().items() for baseline in op.targets}
    assert {row["size"] for row in rows} == {"large, tiny", "small, tiny", "small, CUDA graph, tiny"}
    assert all(row["ratio"] > 0 and row["gigabytes_per_second"] > 0 for row in rows)
    # Nothing is judged by the times of an interpreter.
    assert {row["met"] for row in rows} == {None}


def test_a_dry_run_prints_a_table_that_says_what_it_is(dry_run):
    lines = dry_run[0].stdout.splitlines()
    assert "Triton's interpreter: the times below mean nothing." in lines
    header = next(line for line in lines if line.startswith("operation"))
    assert header.split() == "operation size ms spread host ms GB/s against ratio target met".split()  # noqa: SIM905
    assert len(lines) - lines.index(header) > len(roofline.ops())


def test_a_step_that_fails_or_hangs_is_told(tmp_path):
    command = [sys.executable, BENCH / "gpu_suite.py", "--device", "cpu", "--only", "lines", "--budget", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "lines    step: FAILED: stopped at its time limit after" in run.stdout


def test_the_report_of_the_tests_is_read(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
        '<testcase classname="tests.a" name="two"><failure message="m">assert 1 == 2</failure></testcase>'
        '<testcase classname="tests.a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    counts, failure = gpu_checks.read_report(report, "session-timeout: 6.0 sec exceeded")
    assert (counts.ok, counts.detail) == (False, "1 passed, 1 failed, 1 skipped, stopped by the time limit")
    assert (failure.ok, failure.name, failure.detail) == (False, "tests.a::two", "assert 1 == 2")
    (missing,) = gpu_checks.read_report(tmp_path / "none.xml", "usage: pytest")
    assert (missing.ok, missing.detail) == (False, "usage: pytest")


def test_ratios_are_taken_within_a_round():
    ops = roofline.ops()
    times = {
        name: [gpu_times.Time(ms, 0.1) for ms in series]
        for name, series in {roofline.FUSED: (1.0, 2.0, 4.0), "ondare, p = 0.01": (0.8, 1.6, 3.2)}.items()
    }
    baseline, row = gpu_times.time_rows("large", "large", 10**6, times, ops)
    assert (baseline.ms, baseline.ratio, baseline.gigabytes_per_second) == (2.0, 1.0, 14.0)
    assert (row.ms, row.target, row.met) == (1.6, 0.85, True)
    assert row.ratio == pytest.approx(0.8)


def test_bytes_by_hand():
    ops = roofline.ops(sector=32)
    assert ops["ondare, p = 1"].bytes == 30
    assert ops["onproj, tensor"].bytes == 36
    # g, m, v read and m, v written; one bit, 1/256 and 0.02 of tau; 8 bytes of the groups of eight with any of 16.
    assert ops["ondare, p = 0.01"].bytes == pytest.approx(20 + 0.125 + 4 / 1024 + 0.02 + 8 * (1 - 0.99**16))
    # A sector of 32 bytes holds 16 weights of bf16, and one of 128 bytes 32 of fp32.
    assert roofline.touched(0.01, 2, 32) == pytest.approx(1 - 0.99**16)
    assert roofline.touched(0.01, 4, 128) == pytest.approx(1 - 0.99**32)
    assert ops["interpolation, R = 8"].bytes / ops[roofline.LERPS].bytes == 20 / 48

    # No more than 32 of a word are marked, nor less than the mean of one word; of one draw it is the mean.
    assert roofline.largest_count(0.25, 32, 1) == pytest.approx(8)
    assert 8 < roofline.largest_count(0.25, 32, 128) < 32
    assert roofline.largest_count(1.0, 32, 128) == 32
    # Of two coins, the larger number of heads: 1 with probability 3/4.
    assert roofline.largest_count(0.5, 1, 2) == 0.75


def toy(**fields):
    # Two processors with room for four programs of 4 warps, a thread each.
    device = roofline.Device("toy", "toy", "sm_90", bandwidth=1e9, issue=1e9, sector=32, processors=2, warp=1, warps=16,
                             registers=10**6, shared=10**6, reserved=0, latency=0.0)  # fmt: skip
    return device._replace(**fields)


def test_a_launch_takes_the_longest_of_its_times():
    device = toy()
    light, heavy = roofline.Launch("step: a", 9.0), roofline.Launch("walk: b", 9.0)
    rows = {
        name: {"instructions": 8 * n, "registers": 8, "shared": 0} for name, n in (("step: a", 10), ("walk: b", 20))
    }
    assert roofline.predict(roofline.Op((light,), {}), device, rows) == (pytest.approx(10e-9), "memory")
    assert roofline.predict(roofline.Op((heavy,), {}), device, rows) == (pytest.approx(20e-9), "arithmetic")
    both = roofline.predict(roofline.Op((light, heavy), {}), device, rows)
    assert both == (pytest.approx(30e-9), "memory; arithmetic in walk")
    twice = roofline.predict(roofline.Op((light, light), {}), device, rows)
    assert twice == (pytest.approx(20e-9), "memory")
    # Half the code on two blocks a program.
    part = heavy._replace(runs=0.5, blocks=2.0)
    assert roofline.times(part, device, rows)["arithmetic"] == pytest.approx(5e-9)


def test_programs_in_flight_hide_latency_or_do_not():
    row = {"instructions": 0, "registers": 9, "shared": 100}
    assert roofline.programs(toy(), row) == 4
    # Sixteen registers for each of the four threads; 150 bytes.
    assert roofline.programs(toy(registers=3 * 16 * 4), row) == 3
    assert roofline.programs(toy(shared=300, reserved=50), row) == 2
    # Two trips of a microsecond; 2 processors * 4 programs * 32 elements meanwhile, and four times as many.
    device, launch = toy(latency=1e-6), roofline.Launch("step: a", 1.0, trips=2)
    assert roofline.times(launch, device, {"step: a": row})["latency"] == pytest.approx(2e-6 / 256)
    wide = launch._replace(blocks=4.0)
    found = roofline.predict(roofline.Op((wide,), {}), device, {"step: a": row})
    assert found == (pytest.approx(2e-6 / 1024), "latency")
    # A processor has 128 elements of 28 bytes in three trips, and needs 1e9 * 1e-6 / 2 bytes a trip.
    lines = roofline.latency_table(device, dict.fromkeys(BUILDS, row))
    assert [line for line in lines if line.startswith("| step: adamw |")] == [
        f"| step: adamw | 9 | 4 | {128 * 28 / 3 / 1024:.0f} | {128 * 28 / 3 / 500:.2f} | memory | 0.0 M | 3.0 |"
    ]


def test_the_roofline_knows_builds_that_exist_and_sets_measurements_beside_them():
    # By its file: elsewhere a module called `kernels` may be another one.
    spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    builds = [job._asdict() | {"instructions": 800, "registers": 40, "shared": 0} for job in kernels.jobs()]
    predicted = roofline.report(builds, [])
    assert predicted.count("### ") == predicted.count("| walk: onties | 40 |") == len(roofline.DEVICES)
    assert "measured" not in predicted
    row = {"gpu": "NVIDIA H200", "name": roofline.FUSED, "baseline": roofline.FUSED, "size": "large", "ms": 2.0,
           "parameters": 10**8, "ratio": 1.0}  # fmt: skip
    text = roofline.report(builds, [row, row | {"size": "small", "ms": 9.0}])
    assert text.count("measured / predicted") == 1
    share = 2e-3 / (28 * 1e8 / (4.8e12 * roofline.ACHIEVABLE))
    assert f"| 2.00 | 1.00 | {share:.2f} |" in text


def test_only_what_stands_between_the_markers_is_replaced():
    begin, end = roofline.MARKERS
    page = f"above\n{begin}\nold\n{end}\nbelow\n"
    assert roofline.replace_between_markers(page, "new") == f"above\n{begin}\nnew\n{end}\nbelow\n"
    assert "| met |" in PAGE.read_text().partition(begin)[2].partition(end)[0]
    with pytest.raises(ValueError, match="the page has no lines"):
        roofline.replace_between_markers("above\n", "new")
