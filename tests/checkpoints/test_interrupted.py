"""Jobs that are killed, fail or are interrupted, at every step: in the end the same bytes, or a sentence."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from every_step import FAILURES, die_at_every_step, die_before_its_name, fail_at_every_step, in_children
from jobs import NAMES, RATIOS, WORK, contents, leave_unfinished, open_handles, patched, refuse

from fused_merge.checkpoints.engine import workers
from fused_merge.checkpoints.interpolate import interpolate_checkpoints


def every_step(function: Callable, tmp_path: Path, *arguments) -> list:
    """Let two processes take every second step each."""
    return in_children(function, [(first, *arguments, tmp_path / f"out{first}") for first in (0, 1)])


@pytest.fixture
def leftovers(models, tmp_path):
    """Older folders, and another job for the same names that was left when it had written some."""
    before = tmp_path / "before"
    interpolate_checkpoints(*models, dict(zip(NAMES, [0.1, 0.2], strict=True)), before)
    (before / NAMES[1] / "notes.txt").write_text("mine")
    old = contents(before)
    leave_unfinished(models, dict(zip(NAMES, [0.8, 0.9], strict=True)), before)
    return before, old


@pytest.mark.parametrize("over", [False, True], ids=["nothing", "older folders and the leftovers of another job"])
def test_killed_before_each_step(over, models, leftovers, expected, tmp_path):
    (tmp_path / "empty").mkdir()
    before, old = leftovers if over else (tmp_path / "empty", {})
    answers = every_step(die_at_every_step, tmp_path, expected, old, models, over, before)
    assert [wrong for _, wrong in answers] == [[], []]
    assert sum(died for died, _ in answers) > 60


def test_each_step_that_fails_ends_in_a_sentence_and_leaves_older_folders(models, leftovers, expected, tmp_path):
    before, old = leftovers
    answers = every_step(fail_at_every_step, tmp_path, expected, old, models, before)
    assert [wrong for _, wrong in answers] == [[], []]
    failed = [name for names, _ in answers for name in names]
    assert len(failed) > 90
    assert {name for _, name, _ in FAILURES} - set(failed) <= {"rename", "rmdir"}


def test_a_job_that_drops_another_puts_back_what_that_had_moved_away(models, tmp_path):
    interpolate_checkpoints(*models, [0.3], tmp_path)
    old = contents(tmp_path)
    assert in_children(die_before_its_name, [(models, tmp_path)]) == [9]
    assert os.listdir(tmp_path) == [WORK]
    interpolate_checkpoints(*models, [0.5], tmp_path, overwrite=True)
    shutil.rmtree(tmp_path / "r0.50")
    assert contents(tmp_path) == old


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interruption_while_threads_write(threads, finish, tmp_path):
    """The signal arrives when the last file is on its way."""
    written, seen = [], threading.Event()

    def handler(*_):
        seen.set()
        raise KeyboardInterrupt

    def interrupt(pwrite, handle, data, at):
        written.append(at)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert seen.wait(60)
        return pwrite(handle, data, at)

    before = signal.signal(signal.SIGINT, handler)
    held = open_handles(), torch.get_num_threads()
    # A thread that the signal met while it was started is joined by nobody; it finds nothing to do and ends.
    others = threading.enumerate()
    try:
        with patched(os, "pwrite", interrupt), pytest.raises(KeyboardInterrupt):
            finish(threads=threads)
    finally:
        signal.signal(signal.SIGINT, before)
    for thread in set(threading.enumerate()) - set(others):
        thread.join(60)
        assert not thread.is_alive()
    assert (open_handles(), torch.get_num_threads()) == held
    assert [path.name for path in tmp_path.rglob("*.safetensors.part")] == []
    finish()


def test_threads_on_their_way_end_when_the_rest_is_interrupted():
    """A whole tensor may take minutes to read."""
    reached = threading.Event()

    def read(blocks, advance):
        for _ in range(blocks):
            advance(1)
            reached.set()

    with workers(2, lambda nbytes: None) as (pool, advance):
        running = pool.submit(read, 10**8, advance)
        # As on the way out of an interrupted block.
        assert reached.wait(60)
    assert isinstance(running.exception(0), CancelledError)


def test_the_first_fault_of_any_thread_is_what_is_said(big, tmp_path):
    calls = iter(range(10**6))

    def fail(preadv, *arguments):
        return preadv(*arguments) if next(calls) <= 20 else refuse(errno.EIO)()

    message = r"cannot read .*a\.safetensors: Input/output error"
    with patched(os, "preadv", fail), pytest.raises(OSError, match=message):
        interpolate_checkpoints(*big, RATIOS, tmp_path, threads=4, max_memory="2MB")
    assert os.listdir(tmp_path) == []
