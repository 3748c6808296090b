"""The benchmark of whole checkpoints runs at a tiny size, and what it measures with, by hand."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import fused_merge as fm

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import bench_checkpoints as bench
import checkpoint_runs as runs
from checkpoint_pair import DELTA, MOST_OFF, SIGMA, Failure, compare, make_pair, ordered, pair_at, rounded_once
from checkpoint_rows import filesystem, machine
from checkpoint_runs import CALL, COMMAND, DD, NAIVE, OURS, PER_RATIO, Provider, interpolate_command, measure, memory_of

# There is a `kernels` in that folder, and one that others look for.
sys.path.pop(0)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="measures memory as Linux tells it"
)

SIZE = 0.0003
RATIOS = [0.0, 0.3, 1.0]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Of tensors as small as these, more would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a pair in it."""
    folder = tmp_path_factory.mktemp("work")
    if filesystem(folder) == "tmpfs":
        pytest.skip("temporary files are in memory here")
    pair, config, there = pair_at(folder, SIZE)
    assert not there
    make_pair(pair, config)
    return folder


@pytest.fixture
def pair(work):
    made, _, there = pair_at(work, SIZE)
    assert there
    return made


@pytest.fixture
def run(work, monkeypatch, capsys):
    """Run the benchmark in this process, which does not wait for the disk; its children are as ever."""
    monkeypatch.setattr(runs, "settle", lambda folder: None)

    def run(*options):
        """Return the exit code, what was printed, and what was said on standard error."""
        arguments = ["--size", SIZE, "--ratios", 3, "--rounds", 1, "--work", work, *options]
        monkeypatch.setattr(sys, "argv", [bench.__file__, *map(str, arguments)])
        try:
            code, said = bench.main(), ""
        except SystemExit as error:
            code, said = error.code, str(error.code)
        printed = capsys.readouterr()
        return code, printed.out, said + printed.err

    return run


@pytest.fixture
def measured_once(monkeypatch):
    """Measure each provider once, for memory, and have that again in the turns that are timed."""
    found = {}

    def once(provider, pair, out, watch):
        if provider.name not in found:
            assert watch
            found[provider.name] = measure(provider, pair, out, watch)
        return found[provider.name]._replace(memory=found[provider.name].memory if watch else None)

    monkeypatch.setattr(bench, "measure", once)


@pytest.fixture
def measured_by_nobody(monkeypatch):
    """Have numbers without a process; returns the list of those who would have written."""
    asked = []

    def nothing(provider, pair, out, watch):
        asked.append(provider)
        return runs.Measurement(0.5, 0.6, provider.ratios * pair.bytes, runs.Memory(1, 2))

    monkeypatch.setattr(bench, "measure", nothing)
    return asked


@pytest.mark.usefixtures("measured_once")
def test_a_tiny_run_gives_rows_a_plot_and_a_table(run, work, pair, tmp_path):
    code, printed, _ = run("--only", "dd,fused_merge call", "--write", tmp_path)
    assert code == 0, printed
    (file,) = tmp_path.glob("*-0.0003B-3-*.json")
    rows = {row["provider"]: row for row in json.loads(file.read_text())}
    assert list(rows) == [DD, CALL]
    where = machine(work, None)
    for name, row in rows.items():
        assert where.items() <= row.items()
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"] <= row["on_disk"]
        assert row["bytes"] >= 3 * pair.bytes
        assert row["against_dd"] == pytest.approx(row["all_ratios"] / rows[DD]["seconds"])
        assert (row["bits"] is not None) == (name in OURS)
        assert name in printed
    assert rows[CALL]["resident"] > 50e6 > rows[DD]["resident"]
    assert rows[CALL]["bits"]["compared"] == pair.parameters
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not (work / bench.OUT).exists()


def test_every_ratio_alone_is_the_command_for_each(pair, work):
    by_name = {provider.name: provider for provider in runs.providers(pair, RATIOS, work, None)}
    out = work / "out"
    commands = by_name[PER_RATIO].commands(out)
    assert commands == [interpolate_command(pair, [ratio], out) for ratio in RATIOS]
    assert by_name[COMMAND].commands(out) == [interpolate_command(pair, RATIOS, out)]


def test_the_command_interpolates(pair, tmp_path, monkeypatch):
    _, _, _, main, *arguments = map(str, interpolate_command(pair, RATIOS, tmp_path))
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    with pytest.raises(SystemExit) as ended:
        exec(main, {})
    assert not ended.value.code
    assert compare(pair, RATIOS, tmp_path).compared == pair.parameters


def test_what_one_writes_without_a_library(pair, work, tmp_path):
    (provider,) = [provider for provider in runs.providers(pair, RATIOS, work, None) if provider.name == NAIVE]
    ((_, script, _, name, *arguments),) = provider.commands(tmp_path)
    assert script == Path(bench.__file__)
    bench.CHILDREN[name](*map(str, arguments))
    assert compare(pair, RATIOS, tmp_path).compared == pair.parameters


def test_the_call_under_other_settings_is_timed_beside_itself(run, pair, measured_by_nobody, tmp_path):
    others = runs.settings(pair, RATIOS)
    name = f"{CALL} with 4 KiB pages"
    assert [each.name for each in others] == [*(f"{CALL} with {n} threads" for n in (3, 4, 6)), name]
    assert measure(others[-1], pair, tmp_path / "out", watch=False).bytes >= 3 * pair.bytes
    code, printed, _ = run("--settings", "--only", name, "--write", tmp_path)
    assert code == 0, printed
    assert [provider.name for provider in measured_by_nobody] == [name, name]
    (file,) = tmp_path.glob("*-0.0003B-3-settings-*")
    (row,) = json.loads(file.read_text())
    assert (row["provider"], row["bytes"]) == (name, 3 * pair.bytes)


def test_memory_is_watched_for_more_ratios_and_a_larger_pair(run, work, pair, measured_by_nobody, tmp_path):
    code, printed, _ = run("--memory", "--write", tmp_path)
    assert code == 0, printed
    (file,) = tmp_path.glob("*-memory-0.0003B-*.json")
    large = pair_at(work, 4 * SIZE)
    assert large[2]
    cases = [(pair.parameters, 3), (pair.parameters, 9), (large[0].parameters, 3)]
    rows = json.loads(file.read_text())
    assert [(row["parameters"], row["ratios"]) for row in rows] == cases
    assert [(provider.name, provider.ratios) for provider in measured_by_nobody] == [
        (CALL, count) for _, count in cases
    ]
    assert {(row["anonymous"], row["resident"], row["seconds"]) for row in rows} == {(1, 2, 0.5)}


def test_one_that_fails_stops_no_other(run, tmp_path):
    for name, text in {"mergekit-yaml": "echo a tensor is missing >&2; exit 3", "python": "echo 9.9"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    code, printed, _ = run("--only", "mergekit,dd", "--mergekit", tmp_path)
    assert code == 1
    assert "FAILED: mergekit-yaml ended with exit code 3: a tensor is missing" in printed
    assert "mergekit 9.9" in printed
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["provider", "dd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--disk-limit", "0.001"], r"would hold 0.0\d+ GB: raise --disk-limit above 0.001 GB, or choose a smaller"),
        (["--only", "rsync"], "there is no rsync; choose from dd, fused_merge call, fused_merge command"),
        (["--mergekit", "nowhere"], "no mergekit-yaml in .*/nowhere; leave out --mergekit, or install mergekit there"),
        (["--work", "/dev/shm/x"], "/dev/shm/x is in memory, which tells nothing about a disk; choose a --work on one"),
        (["--ratios", "1"], "--ratios at least 2"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(run, options, message):
    code, _, said = run(*options)
    assert code
    assert re.search(message, said), said


def test_a_disk_that_is_too_small_is_refused(pair, tmp_path, monkeypatch):
    needed = 2 * pair.bytes + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed))
    with pytest.raises(SystemExit, match=r"needs 0.00\d+ GB more of 0.00\d+ GB free: make room, or choose a smaller"):
        bench.require_room(tmp_path, [pair], 100, 40)
    bench.require_room(tmp_path, [], 100, 40)


# --- inputs


def test_the_pair_is_a_llama_that_transformers_loads(pair):
    for folder in (pair.base, pair.tuned):
        model, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert model.num_parameters() == pair.parameters
        assert model.dtype == torch.bfloat16
        assert len(list(folder.glob("*.safetensors"))) == 2


def test_the_pair_has_the_moments_that_are_written_of_it_and_is_the_same_again(work, pair, tmp_path):
    base, tuned = (
        torch.cat([x.flatten().double() for f in sorted(p.glob("*.safetensors")) for x in load_file(f).values()])
        for p in (pair.base, pair.tuned)
    )
    assert base.std().item() == pytest.approx(SIGMA, rel=0.02)
    assert (tuned - base).std().item() == pytest.approx(DELTA, rel=0.02)
    again, config, _ = pair_at(tmp_path, SIZE)
    make_pair(again, config)
    assert [file.read_bytes() for file in again.files()] == [file.read_bytes() for file in pair.files()]


def test_a_pair_that_was_left_half_made_is_made_again(pair, work, tmp_path):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    half = pair_at(tmp_path, SIZE)[0]
    assert pair_at(tmp_path, SIZE)[2]
    (half.tuned / "config.json").unlink()
    assert not pair_at(tmp_path, SIZE)[2]


@pytest.mark.parametrize("size", [0.0003, 0.01, 0.1, 0.5, 2, 8])
def test_a_pair_has_about_the_size_that_was_asked_for(size, tmp_path):
    assert pair_at(tmp_path, size)[0].parameters == pytest.approx(size * 1e9, rel=0.15)


# --- measuring


def provider(command, **fields):
    return Provider("someone", lambda out: [["sh", "-c", command.format(out=out)]], 1, **fields)


def test_a_provider_may_time_itself_and_has_to_write_everything(pair, tmp_path):
    copy = f"cp -r {pair.base} {{out}}; echo 0.5"
    inside = measure(provider(copy, timed_inside=True), pair, tmp_path / "inside", watch=False)
    assert inside.seconds == 0.5 < inside.on_disk
    assert inside.bytes == sum(file.stat().st_size for file in pair.files()[:2])
    assert inside.memory is None
    slow = measure(provider(copy + "; sleep 0.1"), pair, tmp_path / "outside", watch=False)
    assert slow.seconds > 0.1
    with pytest.raises(Failure, match=rf"someone wrote 0 bytes, fewer than 1 x {pair.bytes}"):
        measure(provider("mkdir {out}"), pair, tmp_path / "nothing", watch=False)


def test_memory_is_what_no_file_holds_in_a_process_and_its_children():
    size = 40 * 2**20
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    before = memory_of(os.getpid())
    private, shared = torch.ones(size, dtype=torch.uint8), mmap.mmap(-1, size)
    shared.write(bytes(size))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        assert any(mapped[:: mmap.PAGESIZE])
        own = memory_of(os.getpid())
        held = f"import sys; held = bytearray(b'x') * {size}; print(flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            both = memory_of(os.getpid())
            process.communicate()
    assert private.all()
    assert 2 * size <= own.anonymous - before.anonymous < 2.5 * size
    # The mapped pages count as resident.
    assert 3 * size <= own.resident - before.resident
    # An interpreter is a few megabytes itself.
    assert size <= both.anonymous - own.anonymous < 1.5 * size


# --- bits


def test_rounding_once_by_hand():
    tie, up = 1 + 2.0**-8, 1 + 2.0**-7
    # Beside a tie lies what a stop at float32 would make one of.
    cases = {1.0: 1.0, tie: 1.0, tie + 2.0**-40: up, tie - 2.0**-40: 1.0, -tie - 2.0**-40: -up}
    cases |= {1 + 3 * 2.0**-8: 1 + 2.0**-6, 2 - 2.0**-20: 2.0, 0.0: 0.0}
    made = rounded_once(torch.tensor(list(cases), dtype=torch.float64))
    assert made.dtype == torch.bfloat16
    assert made.tolist() == list(cases.values())


def test_distances_by_hand():
    values = torch.tensor([-1.0, -(1 - 2.0**-8), -0.0, 0.0, 1 - 2.0**-8, 1.0], dtype=torch.bfloat16)
    steps = ordered(values).diff().tolist()
    assert steps == [1, 0x3F7F, 0, 0x3F7F, 1]


@pytest.fixture(scope="module")
def made(work, tmp_path_factory):
    """A folder of ratios."""
    pair, out = pair_at(work, SIZE)[0], tmp_path_factory.mktemp("line")
    fm.interpolate_checkpoints(pair.base, pair.tuned, RATIOS, out, progress=False)
    return out


@pytest.fixture
def line(made, tmp_path):
    """A copy of that folder, and a way to change a tensor in one of its ratios."""
    shutil.copytree(made, tmp_path / "line")

    def change(ratio, function):
        file = min((tmp_path / "line" / f"r{ratio:.2f}").glob("*.safetensors"))
        save_file(function(load_file(file)), file)

    return tmp_path / "line", change


NAME = "model.embed_tokens.weight"


def last_bit(tensors, step):
    bits = tensors[NAME].view(torch.int16).flatten()
    bits[7] += step
    return tensors


def test_our_outputs_are_float64_rounded_once(pair, line):
    found = compare(pair, RATIOS, line[0])
    assert found.compared == pair.parameters
    assert found.off <= MOST_OFF * found.compared
    assert found.ulps <= 1


def test_one_wrong_bit_between_the_ends_is_counted(pair, line):
    before = compare(pair, RATIOS, line[0])
    line[1](0.3, lambda tensors: last_bit(tensors, 1))
    after = compare(pair, RATIOS, line[0])
    assert (after.off, after.ulps) == (before.off + 1, 1)


@pytest.mark.parametrize(
    ("ratio", "change", "message"),
    [
        (0.0, lambda tensors: last_bit(tensors, 1), rf"'{NAME}' of .*r0.00 is not a copy"),
        (1.0, lambda tensors: last_bit(tensors, 1), rf"'{NAME}' of .*r1.00 is not a copy"),
        (0.3, lambda tensors: last_bit(tensors, 2), r"once, by at most 2 ulp.*numerics contract allows"),
        (0.3, lambda tensors: {n: x * 1.01 for n, x in tensors.items()}, r"more than the numerics contract allows"),
        (0.3, lambda tensors: {n: x for n, x in tensors.items() if n != NAME}, r"r0.30 does not hold the tensors of"),
    ],
)
def test_outputs_that_are_wrong_fail(pair, line, ratio, change, message):
    line[1](ratio, change)
    with pytest.raises(Failure, match=message):
        compare(pair, RATIOS, line[0])


def test_an_output_that_is_missing_fails(pair, line):
    shutil.rmtree(line[0] / "r0.30")
    with pytest.raises(Failure, match=r"has folders for the ratios \[0.0, 1.0\] and not for \[0.0, 0.3, 1.0\]"):
        compare(pair, RATIOS, line[0])


# --- mergekit


def test_a_configuration_of_mergekit_weighs_both_ends(pair):
    config = json.loads(runs.linear(pair, 0.25, name="r0.25"))
    assert [model["model"] for model in config["models"]] == [str(pair.base), str(pair.tuned)]
    assert [model["parameters"]["weight"] for model in config["models"]] == [0.75, 0.25]
    assert (config["merge_method"], config["dtype"], config["name"]) == ("linear", "bfloat16", "r0.25")
