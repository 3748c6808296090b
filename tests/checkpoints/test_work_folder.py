"""One process writes at a time; leftovers that lie are not believed; folders keep what another job left in them."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import FILES, NAMES, RATIOS, WORK, contents, flip, leave_unfinished, patched, refuse, stop_before_the_name_of

from fused_merge.checkpoints import job, work_folder
from fused_merge.checkpoints.interpolate import interpolate_checkpoints

BUSY = r"another process is writing to .*\.fused_merge\.part; wait for it, or choose another folder"


# --- one process at a time


def test_a_second_process_is_refused_at_once_and_leaves_the_first_alone(models, expected, tmp_path):
    """The first runs in a thread, whose lock is as that of another process, and stands still at its first file."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(original, *arguments):
        reached.set()
        assert go_on.wait(60)
        return original(*arguments)

    with patched(job, "write_file", wait), ThreadPoolExecutor(1) as pool:
        first = pool.submit(interpolate_checkpoints, *models, RATIOS, tmp_path)
        try:
            assert reached.wait(60)
            for ratios, overwrite in ((RATIOS, False), (RATIOS, True), ([0.5], False), ([0.5], True)):
                with pytest.raises(RuntimeError, match=BUSY):
                    interpolate_checkpoints(*models, ratios, tmp_path, overwrite=overwrite)
            assert sorted(os.listdir(tmp_path / WORK)) == ["journal", "lock", "outputs", "plan.json"]
        finally:
            go_on.set()
        assert first.result() == [tmp_path / name for name in NAMES]
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("at", ["open", "flock"])
def test_a_lock_whose_folder_another_process_has_just_removed(at, finish, tmp_path):
    """The one that finishes removes lock and folder while this one is about to take them."""
    removed = []

    def remove(original, *arguments, **options):
        if not removed and (at == "flock" or str(arguments[0]).endswith("lock")):
            removed.append(at)
            shutil.rmtree(tmp_path / WORK)
        return original(*arguments, **options)

    with patched(os if at == "open" else fcntl, at, remove):
        finish()
    assert removed == [at]


def test_a_lock_that_a_third_process_has_made_anew(finish, tmp_path):
    """This one then holds the lock of a file without a name, which excludes nobody."""
    lock, other = tmp_path / WORK / "lock", []

    def replace(flock, handle, how):
        if not other:
            lock.unlink()
            other.append(os.open(lock, os.O_RDWR | os.O_CREAT))
            flock(other[0], fcntl.LOCK_EX)
        return flock(handle, how)

    with patched(fcntl, "flock", replace), pytest.raises(RuntimeError, match=BUSY):
        finish()
    assert os.listdir(tmp_path / WORK) == ["lock"]
    os.close(other[0])
    finish()


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(reason, finish, caplog):
    with patched(fcntl, "flock", refuse(reason)):
        finish()
    (record,) = caplog.records
    warning = rf".*\.part cannot be locked \({os.strerror(reason)}\): let no second process write to it"
    assert re.fullmatch(warning, record.getMessage())


def test_a_file_system_that_does_not_answer_is_named(finish, monkeypatch):
    """As one on a network that is down: nothing else waits for a lock."""
    said, sentences = threading.Event(), []

    def warn(text, *arguments):
        sentences.append(text % arguments)
        said.set()

    def wait(flock, handle, how):
        assert said.wait(60)
        return flock(handle, how)

    monkeypatch.setattr(work_folder, "_PATIENCE", 0)
    monkeypatch.setattr(work_folder.logger, "warning", warn)
    with patched(fcntl, "flock", wait):
        finish()
    (sentence,) = sentences
    assert re.match(r"the file system of .*\.part/lock does not answer whether it can be locked; wait, or", sentence)


def test_what_finished_while_this_one_took_the_lock_is_not_done_again(finish, tmp_path):
    done, out = tmp_path / "done", tmp_path / "out"
    finish(done)

    def finish_first(flock, handle, how):
        shutil.copytree(done, out, dirs_exist_ok=True)
        return flock(handle, how)

    with patched(fcntl, "flock", finish_first), patched(job, "write_file", lambda *_: 1 / 0):
        finish(out)


# --- leftovers that lie


@pytest.fixture
def unfinished(models, tmp_path):
    """The work folder of a job that died after its first file."""
    leave_unfinished(models, RATIOS, tmp_path)
    return tmp_path / WORK


@pytest.fixture
def entry(unfinished):
    return unfinished / "journal" / f"{FILES[0]}.json"


@pytest.mark.parametrize(
    "lie",
    [
        lambda text: text[:-1],
        *(lambda _, odd=odd: odd for odd in (b"null", b"[]", b"3", b"[" * 100_000)),
        lambda text: re.sub(rb'"(\w+)"', rb'"\1", "\1"', text),
        lambda text: re.sub(rb'"\w+"', b"null", text),
        lambda text: re.sub(rb'\["\w+"\]', b"7", text),
        lambda text: re.sub(rb'^\[\[\["\w+"\], ', b"[[", text),
        *(lambda text, odd=odd: text.replace(b"{}", odd) for odd in (b"[]", b"null", b'{"w": 1}', b'{"w": [[0, 1]]}')),
    ],
)
def test_an_entry_of_the_journal_that_is_torn_or_odd_is_not_believed(lie, entry, finish):
    changed = lie(entry.read_bytes())
    assert changed != entry.read_bytes()
    entry.write_bytes(changed)
    finish()


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / NAMES[1] / FILES[0]).unlink(),
        lambda out: os.truncate(out / NAMES[0] / FILES[0], 5000),
        lambda out: (out / NAMES[0] / FILES[0]).open("ab").write(b"x"),
        lambda out: shutil.rmtree(out / NAMES[0]),
        lambda out: shutil.rmtree(out),
        lambda out: shutil.rmtree(out.parent / "journal"),
        lambda out: (out.parent / "plan.json").unlink(),
        lambda out: (out / "stranger").write_bytes(b"x"),
        lambda out: (out.parent / "lock").write_bytes(b"x"),
    ],
)
def test_a_work_folder_that_lost_something(damage, unfinished, finish):
    damage(unfinished / "outputs")
    finish()


@pytest.mark.parametrize("plan", [b"", b"{", b'"another"', b"\xff"])
def test_a_work_folder_of_something_else(plan, unfinished, finish, tmp_path):
    (unfinished / "plan.json").write_bytes(plan)
    kept = contents(tmp_path)
    with pytest.raises(ValueError, match="left unfinished; run that one again, pass overwrite=True to drop it, or"):
        finish()
    assert contents(tmp_path) == kept
    finish(overwrite=True)


@pytest.fixture
def half_named(models, tmp_path):
    """A job that was killed when the first of its folders had its name."""
    stop_before_the_name_of(tmp_path / NAMES[1], lambda: interpolate_checkpoints(*models, RATIOS, tmp_path))
    assert sorted(os.listdir(tmp_path)) == [WORK, NAMES[0]]


@pytest.mark.usefixtures("half_named")
@pytest.mark.parametrize("verify", [False, True])
def test_files_that_are_damaged_when_some_folders_have_their_names(verify, finish, tmp_path):
    damaged = tmp_path / WORK / "outputs" / NAMES[1] / FILES[1]
    if verify:
        flip(damaged, 5000)
        with pytest.raises(ValueError, match=r"r0\.30/b\.safetensors is not what was written"):
            finish(verify=True)
    else:
        os.truncate(damaged, 100)
    finish()


@pytest.mark.usefixtures("half_named")
def test_folders_that_a_killed_run_has_named_are_read_again_too(finish, tmp_path):
    named = tmp_path / NAMES[0] / FILES[0]
    flip(named, named.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"r0\.00/a\.safetensors is not what was written, .*; write the folder again"):
        finish(verify=True)
    shutil.rmtree(tmp_path / NAMES[0])
    finish(verify=True)


def test_digests_that_lie_are_found_by_reading_again(entry, finish, tmp_path):
    entry.write_bytes(re.sub(rb'^\[\[\["\w', b'[[["?', entry.read_bytes()))
    with pytest.raises(ValueError, match=r"r0\.00/a\.safetensors is not what was written"):
        finish(verify=True)
    assert os.listdir(tmp_path) == [WORK]
    finish(verify=True)
