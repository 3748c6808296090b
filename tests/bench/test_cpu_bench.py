"""What `make bench` measures, how it comes to a ratio, and the tables it writes; nothing here depends on a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_merge as fm

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import paired
import published
import readme
import roofline
import step_cases
import tables

# There is a `kernels` in that folder, and one that others look for.
sys.path.pop(0)

ROOT = tables.ROOT
MACHINE = {"device": "toy, 2 threads", "python": "3", "torch": "2", "numba": None, "numpy": "1", "commit": "abc"}


def a_row(**values):
    zeros = dict.fromkeys(paired.Row._fields, 0)
    row = paired.Row(**zeros)._replace(provider="ours", case="list", dtype="float32", baseline="theirs")
    row = row._replace(ms=2.0, parameters=10**6, target=None, memory=None, ratio=1.0)
    return row._replace(**values)._asdict()


def run_of(number, **values):
    return MACHINE | {"run": number} | a_row(**values)


# --- pairing


def test_candidate_and_baseline_take_turns_in_alternating_order():
    log = []
    turns = paired.Turns(lambda: log.append("own"), lambda: log.append("other"), lambda: log.append("prepare"))
    assert log == 2 * ["prepare", "own", "other"]
    log.clear()
    for _ in range(4):
        turns.before()
        turns.run()
        turns.after()
    assert log == 2 * ["prepare", "other", "own", "prepare", "own", "other"]
    assert len(turns.own) == len(turns.others) == 4


def test_slow_pairs_get_few_rounds_and_fast_ones_many():
    turns = paired.Turns(paired.nothing, paired.nothing, paired.nothing)
    for seconds, rounds in {10.0: paired.FEWEST, 0.05: 15, 1e-6: paired.MOST}.items():
        turns._warm = paired.Time(seconds, 0.0), paired.Time(seconds, 0.0)
        assert turns.that_fit(1.5) == rounds


def test_ratios_are_taken_within_a_round():
    turns = paired.Turns(paired.nothing, paired.nothing, paired.nothing)
    # The machine slows down fourfold in between; of the medians the ratio would be 0.04 / 0.02.
    turns.own = [paired.Time(wall, 2 * wall) for wall in (0.01, 0.02, 0.04, 0.08, 0.16)]
    turns.others = [paired.Time(wall, wall) for wall in (0.01, 0.01, 0.01, 0.08, 0.08)]
    row = paired.row_of(
        turns,
        provider="a",
        case="b",
        dtype="float32",
        parameters=10**6,
        bytes_per_parameter=28,
        baseline="c",
        repeats=4,
    )
    assert (row.rounds, row.ms, row.baseline_ms) == (5, 10.0, 2.5)
    assert (row.ratio_low, row.ratio, row.ratio_high, row.processor_ratio) == (1.0, 2.0, 2.0, 4.0)
    assert row.gigabytes_per_second == pytest.approx(2.8)


# --- what is measured


def test_the_published_operations_by_hand():
    x = torch.tensor([0.1, -0.4, 0.2, 0.3])
    assert published.top_magnitudes(x, 0.5).tolist() == pytest.approx([0.0, -0.4, 0.0, 0.3])
    assert published.top_magnitudes(x, 0.01).tolist() == pytest.approx([0.0, -0.4, 0.0, 0.0])
    assert torch.equal(published.random_drop(x, 1.0), x)
    dropped = published.random_drop(torch.ones(10_000), 0.25)
    assert set(dropped.tolist()) == {0.0, 4.0}
    assert dropped.mean() == pytest.approx(1.0, abs=0.1)
    a, b = torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([2.0, -2.0, -2.0, 3.0])
    assert published.sign_consensus(a, b).tolist() == [3.0, -2.0, -3.0, 3.0]


@pytest.mark.parametrize(("method", "rate", "options"), [("ondare", 1.0, {}), ("onties", 0.3, {"vote": "paper"})])
def test_the_published_algorithm_is_the_one_that_is_compared(method, rate, options):
    torch.manual_seed(0)
    base, start = torch.randn(40, 25), torch.randn(40, 25)
    delta = fm.ReferenceDelta.from_models({"w": base}, {"w": start})
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"alpha": 0.1, "lr": 1e-2}
    optimizers = [
        fm.MergingAdamW([("w", ours)], reference_delta=delta, method=method, reserve_rate=rate, **settings, **options),
        published.PublishedOnlineMerging([theirs], [delta.tensor("w")], method, rate, **settings),
    ]
    # At the very first step every update has the magnitude lr, and rounding chooses among them.
    first, second = 0.3 * torch.randn(40, 25), torch.rand(40, 25) + 0.5
    for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
        optimizer.state[param].update(step=torch.tensor(9.0), exp_avg=first.clone(), exp_avg_sq=second.clone())
    for _ in range(3):
        ours.grad = torch.randn(40, 25)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert (ours - start).abs().max() > 0.1


@pytest.fixture(scope="module")
def few():
    return step_cases.Tensors([(40, 8), (333,)])


@pytest.mark.parametrize("provider", step_cases.CONTENDERS)
@pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated")
def test_everyone_steps(provider, few):
    if provider.startswith("torch-optimi"):
        pytest.importorskip("optimi", reason="the extra `bench` brings it")
    contender = step_cases.CONTENDERS[provider]
    step, params = contender.make(few), few.params(contender.dtype)
    # The usual one moves no weight of bf16.
    for group in step.__self__.param_groups:
        group["lr"] = 0.1
    before = [param.detach().clone() for param in params]
    few.refresh()
    step()
    assert any(not torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_gradients_differ_from_round_to_round(few):
    (param, _) = few.params()
    first = param.grad.clone()
    assert param.grad.shape == param.shape
    few.refresh()
    assert not torch.equal(param.grad, first)


def test_what_has_a_target_has_it_on_every_list():
    targets = {name: contender for name, contender in step_cases.CONTENDERS.items() if contender.target}
    assert {name.removesuffix(", bf16") for name in targets} == step_cases.TARGETS.keys()
    assert targets["ondare, p = 0.01"].target_of(step_cases.REAL) == 1.5
    assert targets["onties, p = 0.01"].target_of(step_cases.TINY) == step_cases.TINY_TARGET
    assert step_cases.CONTENDERS[step_cases.FUSED].target_of(step_cases.TINY) is None


def test_bytes_by_hand():
    assert step_cases.step_bytes() == 28
    assert step_cases.CONTENDERS["onproj, tensor"].bytes == 28 + 2 + 4 + 2
    assert step_cases.CONTENDERS["ondare, p = 1, bf16"].bytes == 22 + 2
    # A line of 64 bytes holds 16 weights, each kept of u or of tau.
    line = 1 - 0.99**32
    assert step_cases.sparse_bytes() == pytest.approx(20 + 8 * line + 0.125 + 4 / 1024 + 0.02)


# --- rows and tables


def test_the_last_three_runs_of_one_commit_are_kept():
    rows = []
    for ratio in (1.0, 2.0, 3.0, 4.0):
        rows = tables.add_run(rows, [a_row(ratio=ratio), a_row(case="other", ratio=ratio)], MACHINE)
    assert [(row["run"], row["ratio"]) for row in rows if row["case"] == "list"] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert len(rows) == 6
    (row,) = tables.add_run(rows, [a_row(ratio=9.0)], MACHINE | {"commit": "later"})
    assert (row["run"], row["ratio"], row["commit"]) == (1, 9.0, "later")


def test_a_table_has_the_median_over_runs_their_range_and_whether_a_target_is_met():
    rows = [run_of(i, ratio=ratio, ms=ratio, target=1.5) for i, ratio in enumerate((1.4, 1.6, 1.2), 1)]
    rows += [run_of(i, provider="slow", ratio=2.0, target=1.5) for i in (1, 2, 3)]
    text = tables.report(rows)
    assert "### toy, 2 threads\n\npython 3, torch 2, numpy 1; commit abc; runs: 3.\n" in text
    header, _, ours, slow = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(header, ours, strict=True))
    assert (cells["ratio"], cells["over runs"], cells["target"], cells["met |"]) == (
        "1.40", "1.20 to 1.60", "1.50", "yes |"
    )  # fmt: skip
    assert cells["ns per parameter"] == "1.40"
    assert slow[-1] == "no |"


def test_time_per_parameter_and_memory_are_judged_over_all_sizes():
    sizes = {10**6: (1.0, 5.0), 10**7: (11.0, 63.0), 10**8: (114.0, 20.0)}
    rows = [run_of(1, case=tables.SCALING, parameters=n, ms=ms, memory=mb) for n, (ms, mb) in sizes.items()]
    text = tables.report(rows)
    assert "| ours, ns per parameter | 1.00 | 1.10 | 1.14 |" in text
    assert "| ours | 1.14 | 1.15 | yes | 63 | 64 | yes |" in text
    rows += [run_of(1, case=tables.SCALING, parameters=10**9, ms=1200.0, memory=65.0)]
    assert "| ours | 1.20 | 1.15 | no | 65 | 64 | no |" in tables.report(rows)


def test_a_page_keeps_what_is_around_its_tables(tmp_path, monkeypatch):
    page, begin, end = tmp_path / "page.md", *tables.MARKERS
    page.write_text(f"above\n{begin}\nold\n{end}\n{roofline.MARKERS[0]}\nother\n{roofline.MARKERS[1]}\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "toy.json").write_text(json.dumps([run_of(1), run_of(1, case=tables.SCALING, memory=3.0)]))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--write", str(page), "--plot", str(tmp_path / "plot.png")])
    tables.main()
    text = page.read_text()
    assert text.startswith(f"above\n{begin}\n### toy, 2 threads\n")
    assert text.endswith(f"{end}\n{roofline.MARKERS[0]}\nother\n{roofline.MARKERS[1]}\n")
    assert "old" not in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_what_is_recorded():
    rows = [row for file in sorted(tables.RESULTS.glob("*.json")) for row in json.loads(file.read_text())]
    page = (ROOT / "docs/explanation/speed.md").read_text()
    assert page == roofline.replace_between_markers(page, tables.report(rows), tables.MARKERS)


def test_the_readme_shows_what_is_recorded():
    page = readme.README.read_text()
    assert readme.filled(page) == page


def test_a_run_is_recorded_from_what_pytest_benchmark_writes(tmp_path):
    out = tmp_path / "bench.json"
    case = f"bench_step[{step_cases.TINY}-{step_cases.FUSED}]".replace(" ", "_")
    command = [sys.executable, "-m", "pytest", "-q", f"bench/bench_merging_adamw.py::{case}", "-p", "no:cacheprovider"]
    # Where tests are distributed, pytest-benchmark would not measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run([*command, "--benchmark-json", out], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    for count in (1, 2):
        path = tables.record([out], tmp_path / "rows")
        rows = json.loads(path.read_text())
        assert [row["run"] for row in rows] == list(range(1, count + 1))
    assert rows[0].keys() == {*tables.machine(), "run", *paired.Row._fields}
    assert (rows[0]["case"], rows[0]["parameters"]) == (step_cases.TINY, 9600)
    assert rows[0]["ratio_low"] <= rows[0]["ratio"] <= rows[0]["ratio_high"]


def test_memory_above_the_tensors_is_next_to_nothing_for_torch():
    command = [sys.executable, "bench/bench_scaling.py", "--child", step_cases.FUSED, str(2**22)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    row = paired.Row(**json.loads(run.stdout))
    assert row.parameters == 2**22
    # A tensor of that size is 16.8 MB.
    assert abs(row.memory) < 8
