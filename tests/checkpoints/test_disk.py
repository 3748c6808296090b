"""Disks that do only a part or refuse, and what a job may use of memory, threads and open files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import re
import resource
import threading
from pathlib import Path

import pytest
from every_step import in_children, peak_memory
from folders import bound_by_permissions
from jobs import FILES, NAMES, RATIOS, WORK, contents, leave_unfinished, patched, refuse, unhurried

from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.checkpoints.interpolate import interpolate_checkpoints

# --- disks that do only a part, or refuse


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no way past the page cache")
@pytest.mark.parametrize(("at", "threads"), [("open", 1), ("pwrite", 1), ("pwrite", 2)])
def test_a_file_system_that_goes_through_the_page_cache(at, threads, big, expected_big, tmp_path):
    refused = 0
    # So that two threads are refused at once.
    together = threading.Barrier(threads)

    def refuse_direct(original, file, flags, *more, **options):
        nonlocal refused
        if (flags if at == "open" else fcntl.fcntl(file, fcntl.F_GETFL)) & os.O_DIRECT:
            refused += 1
            together.wait(20)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(file, flags, *more, **options)

    with patched(os, at, refuse_direct):
        interpolate_checkpoints(*big, RATIOS, tmp_path, threads=threads)
    assert refused == len(RATIOS) * len(FILES) * threads
    assert contents(tmp_path) == expected_big


@pytest.mark.parametrize(
    ("function", "replacement", "message"),
    [
        ("pwrite", refuse(errno.EINVAL), r"cannot write .*a\.safetensors: Invalid argument"),
        ("preadv", lambda *_: 0, r"base/a\.safetensors ends before byte \d+: it changed while it was read; run the s"),
    ],
)
def test_writes_that_are_refused_in_any_way_and_inputs_that_end(function, replacement, message, finish, tmp_path):
    with patched(os, function, replacement), pytest.raises(OSError, match=message):
        finish()
    assert os.listdir(tmp_path) == []


def test_reads_and_writes_of_only_a_part(finish):
    rng, lock = random.Random(3), threading.Lock()

    def some(data) -> int:
        with lock:
            return rng.randint(1, len(data))

    with (
        patched(os, "pwrite", lambda pwrite, handle, data, at: pwrite(handle, data[: some(data)], at)),
        patched(os, "preadv", lambda preadv, handle, views, at: preadv(handle, [views[0][: some(views[0])]], at)),
    ):
        finish(verify=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", r"cannot write to .*out: .*out is not a folder that you may write to; choose another"),
        (WORK, r"cannot write to .*out: .*\.part is not a folder that you may write to; choose another"),
        (f"{WORK}/outputs/{NAMES[1]}", r"cannot write .*r0\.30/b\.safetensors: Permission denied; .*; 1 of 2 files"),
        (f"{WORK}/journal", r"cannot write .*journal/b\.safetensors\.json: Permission denied; .*; 1 of 2 files are"),
    ],
)
def test_folders_that_may_only_be_read(place, message, models, finish, tmp_path):
    out = tmp_path / "out"
    leave_unfinished(models, RATIOS, out)
    (out / place).chmod(0o555)
    with pytest.raises(OSError, match=message):
        bound_by_permissions(lambda: finish(out))
    assert os.listdir(out) == [WORK]
    (out / place).chmod(0o755)
    finish(out)


# --- what a job may use


@pytest.mark.parametrize(("threads", "memory"), [(1, 1_363_000), (2, "2.76MB"), (3, None), (4, 5_816_000), (4, "1GB")])
def test_threads_and_memory_change_no_byte(threads, memory, big, expected_big, tmp_path):
    interpolate_checkpoints(*big, RATIOS, tmp_path, threads=threads, max_memory=memory, verify=True)
    assert contents(tmp_path) == expected_big


@pytest.mark.parametrize("lacking", ["the name", "the pages"])
def test_a_system_without_huge_pages_writes_the_same(lacking, finish, monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    if lacking == "the name":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    finish()


def test_too_little_memory_says_how_much_is_enough(models, tmp_path):
    with pytest.raises(ValueError, match=r"for 3 threads and 2 outputs; allow \d+ MB or take fewer threads") as caught:
        interpolate_checkpoints(*models, RATIOS, tmp_path, threads=3, max_memory="70KB")
    assert os.listdir(tmp_path) == []
    enough = re.search(r"allow (\d+ MB)", str(caught.value))[1]
    interpolate_checkpoints(*models, RATIOS, tmp_path, threads=3, max_memory=enough)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the largest size")
def test_memory_stays_below_what_is_allowed(big, tmp_path):
    options = {"threads": 2, "max_memory": "4MB", "verify": True}
    (grown,) = in_children(peak_memory, [(big, [0.1, 0.2, 0.3, 0.4], tmp_path, options)])
    # One file of one output is 5 MB, one of all outputs 20; interpreter and allocator take a little.
    assert grown < 9e6


def test_more_outputs_than_a_process_may_open(models, expected, tmp_path):
    ratios = [i / 50 for i in range(50)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^50 outputs at once need \d+ open files, of which this process") as caught:
            interpolate_checkpoints(*models, ratios, tmp_path / "out", threads=2)
        assert not (tmp_path / "out").exists()
        advice = r"may have \d+; allow more with `ulimit -n (\d+)`, or write fewer outputs at once$"
        found = re.search(advice, str(caught.value))
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(found[1]), limits[1]))
        with unhurried():
            made = interpolate_checkpoints(*models, ratios, tmp_path / "out", threads=2, max_memory="16MB")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir(tmp_path / "out")) == 50
    assert (made[15] / FILES[0]).read_bytes() == expected[f"{NAMES[1]}/{FILES[0]}"]
    assert verify_checkpoint(made[-1]) > 0
