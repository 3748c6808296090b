"""Jobs that die or fail at every single step, in processes of their own."""

from __future__ import annotations

import errno
import fcntl
import io
import multiprocessing
import os
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import NAMES, RATIOS, contents, open_handles, patched, unhurried

from fused_merge.checkpoints.interpolate import interpolate_checkpoints

# Children are forked from a process that has imported everything and started no thread.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["pytest", "rich.progress", "safetensors.torch", "fused_merge.checkpoints", "every_step"]
)


def in_children(function: Callable, calls: list[tuple]) -> list:
    """Call a function with each of several tuples of arguments, each in a process of its own, at once."""
    with CHILDREN.Pool(len(calls)) as pool:
        return pool.starmap(function, calls, chunksize=1)


def forked(function: Callable[[], object]) -> int:
    """Run a function in a fork of this process; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with unhurried():
            function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def write_half(original, target, data, *place):
    original(target, data[: len(data) // 2], *place)


def copy_half(original, source, target):
    original(source, target)
    os.truncate(target, os.path.getsize(target) // 2)


# What changes something on the disk, and how it is done by half.
CHANGES = [
    *((os, name, None) for name in ("mkdir", "rmdir", "unlink", "replace", "rename", "ftruncate", "open")),
    (os, "pwrite", write_half),
    (Path, "write_bytes", write_half),
    (shutil, "copyfile", copy_half),
    (io, "open", None),
]


@contextmanager
def steps(changes, happens: Callable[[int, str], None]) -> Iterator[None]:
    """Call something before each step that a job takes, with its number and name; if it raises, half is done."""
    numbers = iter(range(10**9))
    lock = threading.Lock()

    def stepping(original, name, half):
        def step(*args, **options):
            how = args[1] if name == "open" else ""
            if name == "open" and not (set(how) & set("wax+") if isinstance(how, str) else how & os.O_CREAT):
                return original(*args, **options)
            with lock:
                number = next(numbers)
            try:
                happens(number, name)
            except BaseException:
                if half is not None:
                    half(original, *args, **options)
                raise
            return original(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, half in changes:
            patch.setattr(owner, name, stepping(getattr(owner, name), name, half))
        yield


# What can fail, beside that.
FAILURES = [*CHANGES, (os, "fsync", None), (os, "preadv", None), (fcntl, "flock", None)]
REASONS = {"preadv": errno.EIO, "flock": errno.EIO}


# --- what happens at a step


def not_whole(out: Path, expected: dict[str, bytes], old: dict[str, bytes]) -> list[str]:
    """The names of folders that are neither the new one nor the old one."""
    wrong = []
    for folder in out.glob("[!.]*"):
        held = {f"{folder.name}/{name}": held for name, held in contents(folder).items()}
        wholes = [
            {name: whole[name] for name in whole if name.startswith(f"{folder.name}/")} for whole in (expected, old)
        ]
        wrong += [folder.name] * (not held or held not in wholes)
    return wrong


def write(models, out, *, over: bool = True) -> None:
    interpolate_checkpoints(*models, RATIOS, out, threads=1 if over else 2, overwrite=over, verify=over)


def die_at_every_step(first, expected, old, models, over, before, out) -> tuple[int, list[str]]:
    """Kill runs before every second step; returns the number of runs that died, and what was wrong after which."""
    wrong = []
    for died, at in enumerate(range(first, 10**6, 2)):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)

        def run_until(at=at):
            with steps(CHANGES, lambda number, _: os._exit(9) if number == at else None):
                write(models, out, over=over)

        code = forked(run_until)
        wrong += [f"step {at}: {name} is not whole" for name in not_whole(out, expected, old)]
        if code == 9 and forked(lambda: write(models, out, over=over)):
            wrong.append(f"step {at}: cannot be resumed")
        elif contents(out) != expected:
            wrong.append(f"step {at}: other bytes")
        if code != 9:
            return died, wrong if code == 0 else [*wrong, f"step {at}: failed"]
    raise AssertionError


def fail_at_every_step(first, expected, old, models, before, out) -> tuple[list[str], list[str]]:
    """Let every second step fail in its turn; returns the names of those steps, and what was wrong after which."""
    failed, wrong = [], []
    for at in range(first, 10**6, 2):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        tried = None

        def happens(number, name, at=at):
            nonlocal tried
            if number == at:
                tried = name
                raise OSError(reason := REASONS.get(name, errno.ENOSPC), os.strerror(reason))

        held, sentence = (open_handles(), threading.active_count()), None
        with unhurried():
            try:
                with steps(FAILURES, happens):
                    write(models, out)
            except OSError as error:
                failed.append(tried)
                sentence = str(error)
            if (open_handles(), threading.active_count()) != held:
                wrong.append(f"step {at}: files or threads are left")
            wrong += [f"step {at}: {name} is not whole" for name in not_whole(out, expected, old)]
            wrong += [f"step {at}: {name} is gone" for name in NAMES if not (out / name).exists()]
            write(models, out)
        if contents(out) != expected:
            wrong.append(f"step {at}: other bytes")
        if sentence is not None:
            reason = os.strerror(REASONS.get(tried, errno.ENOSPC))
            one = re.fullmatch(rf"cannot (write|read|remove|lock) [^\n;]+: {reason}; [^\n]+", sentence)
            if not one or sentence.count("cannot ") > 1:
                wrong.append(f"step {at}: {sentence}")
        elif tried not in (None, "mkdir", "rmdir", "unlink"):
            # A folder that is there already need not be made, and neither it nor its lock need go at the end.
            wrong.append(f"step {at}: nobody noticed that {tried} failed")
        if tried is None:
            return failed, wrong
    raise AssertionError


def die_before_its_name(models, out) -> int:
    def die_between(replace, source, target):
        if Path(target) == out / NAMES[1]:
            os._exit(9)
        replace(source, target)

    def run():
        with patched(os, "replace", die_between):
            interpolate_checkpoints(*models, {NAMES[1]: 0.4}, out, overwrite=True)

    return forked(run)


def peak_memory(models, ratios, out, options) -> int:
    """The bytes by which a run made this process grow."""
    status = Path("/proc/self/status")
    # The first run loads what it needs.
    interpolate_checkpoints(*models, ratios, out / "first", threads=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    interpolate_checkpoints(*models, ratios, out / "second", **options)
    return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before)
