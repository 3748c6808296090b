"""Jobs that are killed, fail, meet other processes or find leftovers: in the end the same bytes, or a sentence."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_merge.checkpoints import disk, interpolate_checkpoints, job, plan_interpolation, verify_checkpoint
from fused_merge.io.headers import read_header

RATIOS = [0.0, 0.3]
NAMES = ["r0.00", "r0.30"]
WORK = ".fused_merge.part"
SMALL = ["a.safetensors", "b.safetensors"]
BIG = [*SMALL, "c.safetensors"]

# Children are forked from a process that has imported everything and started no thread.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["pytest", "rich.console", "rich.progress", "rich.table", "safetensors.torch", "fused_merge.checkpoints"]
)


def write_model(folder: Path, seed: int, rows: int, files: list[str]) -> Path:
    """Files of weights, norms, integers and tensors without elements, an index and a configuration."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    places = {}
    for i, file in enumerate(files):
        tensors = {
            f"{i}.weight": torch.randn((1 + i % 2) * rows, 257, generator=generator).bfloat16(),
            f"{i}.norm": torch.randn(7, generator=generator),
            f"{i}.steps": torch.tensor([seed, i]),
            f"{i}.empty": torch.zeros(0, 4),
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def not_whole(out: Path, expected: dict[str, bytes], old: dict[str, bytes]) -> list[str]:
    """The names of folders that are neither the new one nor the old one."""
    found = {path.name: contents(path) for path in out.iterdir() if path.name != WORK} if out.exists() else {}
    wanted = {
        name: [
            {path.partition("/")[2]: held for path, held in whole.items() if path.startswith(f"{name}/")}
            for whole in (expected, old)
        ]
        for name in NAMES
    }
    return [name for name, held in found.items() if held not in wanted.get(name, []) or not held]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return write_model(folder / "base", 0, 40, SMALL), write_model(folder / "tuned", 1, 40, SMALL)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    return write_model(folder / "base", 0, 5000, BIG), write_model(folder / "tuned", 1, 5000, BIG)


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """What a job leaves that nothing happens to."""
    out = tmp_path_factory.mktemp("expected")
    interpolate_checkpoints(*models, RATIOS, out, threads=1)
    return contents(out)


@pytest.fixture
def own(models, tmp_path):
    """Copies of the models, to be changed."""
    return tuple(shutil.copytree(model, tmp_path / model.name) for model in models)


@contextmanager
def patched(owner: object, name: str, replacement: Callable) -> Iterator[None]:
    """Replace a function; the replacement is called with the original first."""
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **options: replacement(original, *args, **options))
        yield


# --- processes


def report(connection, function, arguments) -> None:
    """Run a function in a child, and say what came of it."""
    try:
        connection.send("started")
        answer = ("done", function(*arguments))
    except BaseException as error:
        answer = (type(error).__name__, str(error))
    # Until it is let go, so that nothing else can have its number.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection.send(answer)
    connection.recv()


class Child:
    """A process that runs a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self._connection, connection = CHILDREN.Pipe()
        self._process = CHILDREN.Process(target=report, args=(connection, function, arguments))
        self._process.start()
        connection.close()
        assert self._connection.recv() == "started"

    def send(self, signal_number: int) -> None:
        os.kill(self._process.pid, signal_number)

    def answer(self):
        """What came of it; None if it was killed."""
        try:
            answer = self._connection.recv()
            self._connection.send("go")
        except (EOFError, ConnectionError):
            answer = None
        self._process.join()
        self._connection.close()
        return answer


def go(models, out, options):
    return [folder.name for folder in interpolate_checkpoints(*models, RATIOS, out, **options)]


def phase(out: Path) -> str:
    """How far a killed run had come."""
    journal = len(list(out.glob(f"{WORK}/journal/*.json")))
    if journal:
        return "finishing" if journal == len(BIG) else "some files finished"
    return "first file" if list(out.glob(f"{WORK}/outputs/*/*.part")) else "nothing written"


def test_killed_at_random_moments_and_resumed_to_the_same_bytes(big, tmp_path):
    options = {"threads": 1, "max_memory": "4MB"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    child, begun = Child(go, big, whole, options), time.perf_counter()
    assert child.answer() == ("done", NAMES)
    taken = time.perf_counter() - begun
    uninterrupted = contents(whole)

    rng, kills, finished = random.Random(0), Counter(), 0
    while kills.total() < 24 or finished < 3 or len(kills.keys() - {"nothing written"}) < 3:
        assert kills.total() + finished < 200, kills
        child = Child(go, big, out, options)
        time.sleep(taken * rng.random() ** 2)
        child.send(signal.SIGKILL)
        if child.answer() is None:
            kills[phase(out)] += 1
        else:
            assert contents(out) == uninterrupted
            shutil.rmtree(out)
            finished += 1
    assert Child(go, big, out, options).answer() == ("done", NAMES)
    assert contents(out) == uninterrupted


def test_interrupted_from_the_keyboard_at_random_moments(big, tmp_path):
    options = {"threads": 2, "max_memory": "6MB"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    child, begun = Child(go, big, whole, options), time.perf_counter()
    assert child.answer() == ("done", NAMES)
    taken = time.perf_counter() - begun
    rng, interrupted = random.Random(1), 0
    for _ in range(12):
        child = Child(go, big, out, options)
        time.sleep(rng.uniform(0, taken / 2))
        child.send(signal.SIGINT)
        answer = child.answer()
        if answer[0] == "KeyboardInterrupt":
            interrupted += 1
            # What was not finished is gone, and with nothing finished everything.
            assert not list(out.rglob("*.part/outputs/*/*.part"))
            assert (out / WORK).exists() == bool(list(out.glob(f"{WORK}/journal/*.json")))
        else:
            assert answer == ("done", NAMES)
            shutil.rmtree(out)
    assert interrupted >= 3
    assert Child(go, big, out, options).answer() == ("done", NAMES)
    assert contents(out) == contents(whole)


# --- every single step


def torn_pwrite(original, handle, data, at):
    original(handle, data[: len(data) // 2], at)


def torn_write_bytes(original, path, data):
    original(path, data[: len(data) // 2])


def torn_copyfile(original, source, target):
    original(source, target)
    os.truncate(target, os.path.getsize(target) // 2)


# What changes something on the disk, and how it is done by half.
CHANGES = [
    (os, "mkdir", None),
    (os, "rmdir", None),
    (os, "unlink", None),
    (os, "replace", None),
    (os, "rename", None),
    (os, "ftruncate", None),
    (os, "pwrite", torn_pwrite),
    (Path, "write_bytes", torn_write_bytes),
    (shutil, "copyfile", torn_copyfile),
    (os, "open", None),
    (io, "open", None),
]
CREATES = os.O_CREAT | os.O_TRUNC


@contextmanager
def steps(changes, happens: Callable[[int, str], None]) -> Iterator[None]:
    """Call something before each step that a job takes, with its number and name; if it raises, half is done."""
    numbers = iter(range(10**9))
    lock = threading.Lock()

    def stepping(name, torn):
        def step(original, *args, **options):
            reads = (name == "open" and isinstance(args[1], int) and not args[1] & CREATES) or (
                name == "open" and isinstance(args[1], str) and not set(args[1]) & set("wax+")
            )
            if not reads:
                with lock:
                    number = next(numbers)
                try:
                    happens(number, name)
                except BaseException:
                    if torn is not None:
                        torn(original, *args, **options)
                    raise
            return original(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, torn in changes:
            original, step = getattr(owner, name), stepping(name, torn)
            patch.setattr(
                owner,
                name,
                lambda *args, original=original, step=step, **options: step(original, *args, **options),
            )
        yield


@contextmanager
def unhurried() -> Iterator[None]:
    """Wait for no disk: a process that ends loses nothing that it has written to the page cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(disk, "_DIRECT", 0)
        yield


class DeadError(BaseException):
    pass


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


def die(number: int, name: str) -> None:
    os._exit(9)


def at_step(at: int, happens: Callable[[int, str], None], run: Callable[[], object]) -> None:
    with steps(CHANGES, lambda number, name: happens(number, name) if number == at else None):
        run()


def overwriting(models, out):
    go(models, out, {"threads": 1, "overwrite": True, "verify": True})


def by_two_workers(models, out):
    for worker in ((2, 2), (1, 2), (2, 2)):
        made = go(models, out, {"threads": 1, "worker": worker})
    assert made == NAMES


def die_at_every_step(first, expected, old, models, run, before, out) -> tuple[int, list[str]]:
    """Kill runs before every second step; returns the number of runs that died, and what was wrong after which."""
    wrong = []
    for died, at in enumerate(range(first, 10**6, 2)):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        code = forked(lambda at=at: at_step(at, die, lambda: run(models, out)))
        wrong += [f"step {at}: {name} is not whole" for name in not_whole(out, expected, old)]
        if code == 9 and forked(lambda: run(models, out)):
            wrong.append(f"step {at}: cannot be resumed")
        elif contents(out) != expected:
            wrong.append(f"step {at}: other bytes")
        if code != 9:
            return died, wrong if code == 0 else [*wrong, f"step {at}: failed"]
    raise AssertionError


def every_step(function, tmp_path, *arguments) -> list:
    """Let two processes take every second step each."""
    children = [Child(function, first, *arguments, tmp_path / f"out{first}") for first in (0, 1)]
    answers = [child.answer() for child in children]
    assert [how for how, _ in answers] == ["done", "done"], answers
    return [answer for _, answer in answers]


def leave_unfinished(models, ratios, out) -> None:
    """Fail after the first file."""

    def fail(original, file, *args):
        if file.name != SMALL[0]:
            raise DeadError
        return original(file, *args)

    with patched(job, "write_file", fail), pytest.raises(DeadError):
        interpolate_checkpoints(*models, ratios, out, threads=1, overwrite=True)


def stop_before_the_name_of(folder, run: Callable[[], object]) -> None:
    """Fail when everything is written, and the folders before this one have their names."""

    def stop(replace, source, target):
        if Path(target) == folder:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with patched(os, "replace", stop), pytest.raises(OSError, match=rf"cannot write {folder}: Input/output error"):
        run()


@pytest.fixture
def leftovers(models, tmp_path):
    """Older folders, and another job for the same names that was left when it had written some."""
    before = tmp_path / "before"
    interpolate_checkpoints(*models, dict(zip(NAMES, [0.1, 0.2], strict=True)), before)
    (before / NAMES[1] / "notes.txt").write_text("mine")
    old = contents(before)
    leave_unfinished(models, dict(zip(NAMES, [0.8, 0.9], strict=True)), before)
    return before, old


def test_workers_killed_before_each_step(models, expected, tmp_path):
    (tmp_path / "before").mkdir()
    answers = every_step(die_at_every_step, tmp_path, expected, {}, models, by_two_workers, tmp_path / "before")
    assert [wrong for _, wrong in answers] == [[], []]
    assert sum(died for died, _ in answers) > 60


def test_killed_before_each_step_over_older_folders_and_the_leftovers_of_another_job(
    models, leftovers, expected, tmp_path
):
    before, old = leftovers
    answers = every_step(die_at_every_step, tmp_path, expected, old, models, overwriting, before)
    assert [wrong for _, wrong in answers] == [[], []]
    assert sum(died for died, _ in answers) > 60


# What can fail, beside that.
FAILURES = [*CHANGES, (os, "fsync", None), (os, "preadv", None), (fcntl, "flock", None)]
REASONS = {"preadv": errno.EIO, "flock": errno.ENOLCK}


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


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

        held, sentence = (open_files(), threading.active_count()), None
        with unhurried():
            try:
                with steps(FAILURES, happens):
                    overwriting(models, out)
            except OSError as error:
                failed.append(tried)
                sentence = str(error)
            if (open_files(), threading.active_count()) != held:
                wrong.append(f"step {at}: files or threads are left")
            wrong += [f"step {at}: {name} is not whole" for name in not_whole(out, expected, old)]
            wrong += [f"step {at}: {name} is gone" for name in NAMES if not (out / name).exists()]
            overwriting(models, out)
        if contents(out) != expected:
            wrong.append(f"step {at}: other bytes")
        if sentence is not None:
            reason = os.strerror(REASONS.get(tried, errno.ENOSPC))
            one = re.fullmatch(rf"cannot (write|read|remove) [^\n;]+: {reason}; [^\n]+", sentence)
            if not one or sentence.count("cannot ") > 1:
                wrong.append(f"step {at}: {sentence}")
        elif tried not in (None, "mkdir", "rmdir"):
            # A folder that is there already need not be made, and one that holds something cannot go.
            wrong.append(f"step {at}: nobody noticed that {tried} failed")
        if tried is None:
            return failed, wrong
    raise AssertionError


def test_each_step_that_fails_ends_in_a_sentence_and_leaves_older_folders(models, leftovers, expected, tmp_path):
    before, old = leftovers
    answers = every_step(fail_at_every_step, tmp_path, expected, old, models, before)
    assert [wrong for _, wrong in answers] == [[], []]
    failed = [name for names, _ in answers for name in names]
    assert len(failed) > 100
    assert {name for _, name, _ in FAILURES} - set(failed) <= {"rename", "rmdir"}


def die_before_the_new_folder_has_its_name(models, out) -> int:
    def die_between(replace, source, target):
        if Path(target) == out / NAMES[1]:
            die(0, "replace")
        replace(source, target)

    def run():
        with patched(os, "replace", die_between):
            interpolate_checkpoints(*models, {NAMES[1]: 0.4}, out, overwrite=True)

    return forked(run)


def test_a_job_that_drops_another_puts_back_what_that_had_moved_away(models, tmp_path):
    interpolate_checkpoints(*models, [0.3], tmp_path)
    old = contents(tmp_path)
    assert Child(die_before_the_new_folder_has_its_name, models, tmp_path).answer() == ("done", 9)
    assert os.listdir(tmp_path) == [WORK]
    interpolate_checkpoints(*models, [0.5], tmp_path, overwrite=True)
    shutil.rmtree(tmp_path / "r0.50")
    assert contents(tmp_path) == old


# --- several processes


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_workers_one_after_the_other(order, models, expected, tmp_path):
    """More than there are files, too."""
    made = [interpolate_checkpoints(*models, RATIOS, tmp_path, worker=(i, 3)) for i in order]
    last = max(order.index(1), order.index(2))
    assert [bool(each) for each in made] == [i >= last for i in range(3)]
    assert contents(tmp_path) == expected
    assert interpolate_checkpoints(*models, RATIOS, tmp_path, worker=(1, 3)) == [tmp_path / name for name in NAMES]


BUSY = r"another process is writing [abc]\.safetensors in .*; wait for it, or give each process a share with worker="


def test_workers_and_whole_runs_at_once_some_of_them_killed(models, expected, tmp_path):
    rng = random.Random(2)
    said = Counter()
    for _ in range(8):
        children = [
            Child(go, models, tmp_path, {"threads": 1, "worker": worker})
            for worker in rng.sample([(1, 2), (2, 2), (1, 2), (2, 2), (1, 1)], k=5)
        ]
        for child in rng.sample(children, k=2):
            time.sleep(rng.uniform(0, 0.02))
            child.send(signal.SIGKILL)
        for answer in [child.answer() for child in children]:
            said[str(answer and answer[0])] += 1
            if answer and answer[0] != "done":
                assert answer[0] == "RuntimeError"
                assert re.match(BUSY, answer[1])
            elif answer and answer[1]:
                assert answer[1] == NAMES
        # Whoever comes last finishes it.
        for worker in ((1, 2), (2, 2)):
            made = go(models, tmp_path, {"threads": 1, "worker": worker})
        assert made == NAMES
        assert contents(tmp_path) == expected
        shutil.rmtree(tmp_path)
    assert said["done"] >= 8
    assert said["None"] >= 4


def test_two_of_the_same_at_once(models, expected, tmp_path):
    for _ in range(6):
        answers = [child.answer() for child in [Child(go, models, tmp_path / "out", {}) for _ in range(2)]]
        assert ("done", NAMES) in answers
        for how, what in answers:
            assert how == "done" or (how == "RuntimeError" and re.match(BUSY, what))
        assert contents(tmp_path / "out") == expected
        shutil.rmtree(tmp_path / "out")


@contextmanager
def stopped_while_writing(models, out, file=SMALL[0], **options) -> Iterator[SimpleNamespace]:
    """A run in a thread, whose locks are as those of another process, that stands still at a file."""
    reached, go_on = threading.Event(), threading.Event()
    found = SimpleNamespace(made=None)

    def wait(original, planned, *arguments):
        if planned.name == file and threading.current_thread() is thread:
            reached.set()
            assert go_on.wait(60)
        return original(planned, *arguments)

    def run():
        found.made = interpolate_checkpoints(*models, RATIOS, out, **options)

    thread = threading.Thread(target=run)
    with patched(job, "write_file", wait):
        thread.start()
        assert reached.wait(60)
        try:
            yield found
        finally:
            go_on.set()
            thread.join()


@pytest.mark.parametrize("file", SMALL)
def test_what_another_process_writes_is_left_alone(file, models, expected, tmp_path):
    with stopped_while_writing(models, tmp_path, file) as other:
        with pytest.raises(RuntimeError, match=BUSY):
            interpolate_checkpoints(*models, RATIOS, tmp_path)
        with pytest.raises(RuntimeError, match=BUSY):
            interpolate_checkpoints(*models, RATIOS, tmp_path, overwrite=True)
        with pytest.raises(RuntimeError, match=r"another process is writing to .*\.part; wait for it, or choose anoth"):
            interpolate_checkpoints(*models, [0.5], tmp_path, overwrite=True)
        with pytest.raises(ValueError, match=r"\.part is what another job, or this one with other inputs, left unf"):
            interpolate_checkpoints(*models, [0.5], tmp_path)
    assert other.made == [tmp_path / name for name in NAMES]
    assert contents(tmp_path) == expected


def test_a_worker_that_fails_leaves_the_work_of_others(models, expected, tmp_path):
    def vanish(original, planned, *arguments):
        if planned.name == SMALL[1]:
            raise OSError("cannot read it")
        return original(planned, *arguments)

    with stopped_while_writing(models, tmp_path, worker=(1, 2)) as other:
        with patched(job, "write_file", vanish), pytest.raises(OSError, match=r"^cannot read it$"):
            interpolate_checkpoints(*models, RATIOS, tmp_path, worker=(2, 2))
        assert (tmp_path / WORK / "plan.json").exists()
    assert other.made == []
    interpolate_checkpoints(*models, RATIOS, tmp_path, worker=(2, 2))
    assert contents(tmp_path) == expected


def test_a_worker_that_fails_alone_leaves_nothing(models, tmp_path):
    with patched(job, "write_file", lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        interpolate_checkpoints(*models, RATIOS, tmp_path, worker=(2, 2))
    assert os.listdir(tmp_path) == []


# --- inputs that change


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("name", ["base/a.safetensors", "tuned/b.safetensors", "tuned/config.json"])
def test_what_changed_before_a_job_goes_on_is_never_mixed(name, own, tmp_path):
    out, changed = tmp_path / "out", tmp_path / name
    leave_unfinished(own, RATIOS, out)
    if name.endswith("json"):
        changed.write_text('{"other": 1}')
    else:
        save_file({n: tensor + 1 for n, tensor in load_file(changed).items()}, changed, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"or this one with other inputs, left unfinished; run that one again, pass"):
        interpolate_checkpoints(*own, RATIOS, out)
    interpolate_checkpoints(*own, RATIOS, out, overwrite=True)
    interpolate_checkpoints(*own, RATIOS, tmp_path / "anew")
    assert contents(out) == contents(tmp_path / "anew")
    assert sorted(os.listdir(out)) == NAMES


@pytest.mark.parametrize("name", ["base/b.safetensors", "tuned/config.json"])
@pytest.mark.parametrize("vanishes", [False, True])
@pytest.mark.parametrize(("at", "finished"), [(SMALL[0], 0), (SMALL[1], 1)])
def test_inputs_that_change_while_they_are_read(at, finished, vanishes, name, own, tmp_path):
    out = tmp_path / "out"

    def change(original, planned, *arguments):
        if planned.name == at:
            (tmp_path / name).unlink() if vanishes else touch(tmp_path / name)
        return original(planned, *arguments)

    with patched(job, "write_file", change), pytest.raises(OSError, match=name) as caught:
        interpolate_checkpoints(*own, RATIOS, out)
    assert re.search("vanished or changed after it was looked at; put it back|No such file", str(caught.value))
    if finished:
        assert f"; 1 of 2 files are finished and kept in {out / WORK}: once that is mended" in str(caught.value)
        assert os.listdir(out) == [WORK]
        assert [path.name for path in (out / WORK / "journal").glob("*.json")] == [f"{SMALL[0]}.json"]
    else:
        assert os.listdir(out) == []


def test_a_configuration_that_vanishes_before_it_is_copied(own, expected, tmp_path):
    out, config = tmp_path / "out", own[1] / "config.json"
    stamp, text = config.stat(), config.read_text()
    plan = plan_interpolation(*own, RATIOS, out)
    stop_before_the_name_of(out / NAMES[0], plan.run)
    config.unlink()
    with pytest.raises(OSError, match=r"tuned/config\.json vanished or changed .*; 2 of 2 files are finished"):
        plan.run()
    config.write_text(text)
    os.utime(config, ns=(0, stamp.st_mtime_ns))
    plan.run()
    assert contents(out).keys() == expected.keys()


# --- leftovers that lie


def journal_of(out, name=SMALL[0]) -> Path:
    return out / WORK / "journal" / f"{name}.json"


@pytest.mark.parametrize(
    "lie",
    [
        lambda text: b"",
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: text + b"}",
        lambda text: b"null",
        lambda text: b"[]",
        lambda text: b"3",
        lambda text: b"{}",
        lambda text: b"\xff",
        lambda text: b"[" * 100_000,
        lambda text: text.replace(b'"0.norm"', b'"0.name"'),
        lambda text: re.sub(rb'\["\w+", ', b"[", text),
        lambda text: re.sub(rb'\["\w+"', b"[null", text),
        lambda text: re.sub(rb'\["\w+", "\w+"\]', b"7", text),
    ],
)
def test_an_entry_of_the_journal_that_is_torn_or_odd_is_not_believed(lie, models, expected, tmp_path):
    leave_unfinished(models, RATIOS, tmp_path)
    entry = journal_of(tmp_path)
    changed = lie(entry.read_bytes())
    assert changed != entry.read_bytes()
    entry.write_bytes(changed)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / NAMES[1] / SMALL[0]).unlink(),
        lambda out: os.truncate(out / NAMES[0] / SMALL[0], 5000),
        lambda out: (out / NAMES[0] / SMALL[0]).open("ab").write(b"x"),
        lambda out: shutil.rmtree(out / NAMES[0]),
        lambda out: shutil.rmtree(out),
        lambda out: shutil.rmtree(out.parent / "journal"),
        lambda out: (out.parent / "plan.json").unlink(),
        lambda out: (out / "stranger").write_bytes(b"x"),
    ],
)
def test_a_work_folder_that_lost_something(damage, models, expected, tmp_path):
    leave_unfinished(models, RATIOS, tmp_path)
    damage(tmp_path / WORK / "outputs")
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("plan", [b"", b"{", b'"another"', b"\xff"])
def test_a_work_folder_of_something_else(plan, models, expected, tmp_path):
    leave_unfinished(models, RATIOS, tmp_path)
    (tmp_path / WORK / "plan.json").write_bytes(plan)
    kept = contents(tmp_path)
    with pytest.raises(ValueError, match="left unfinished; run that one again, pass overwrite=True to drop it, or"):
        interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path).keys() - {f"{WORK}/gate.lock"} == kept.keys() - {f"{WORK}/gate.lock"}
    interpolate_checkpoints(*models, RATIOS, tmp_path, overwrite=True)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("verify", [False, True])
def test_files_that_are_damaged_when_some_folders_have_their_names(verify, models, expected, tmp_path):
    stop_before_the_name_of(tmp_path / NAMES[1], lambda: interpolate_checkpoints(*models, RATIOS, tmp_path))
    assert sorted(os.listdir(tmp_path)) == [WORK, NAMES[0]]
    damaged = tmp_path / WORK / "outputs" / NAMES[1] / SMALL[1]
    if verify:
        flip(damaged, read_header(damaged).data)
        with pytest.raises(ValueError, match=r"'1.steps' in .*r0\.30/b\.safetensors is not what was written"):
            interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    else:
        os.truncate(damaged, 100)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


def test_folders_that_a_killed_run_has_named_are_read_again_too(models, expected, tmp_path):
    stop_before_the_name_of(tmp_path / NAMES[1], lambda: interpolate_checkpoints(*models, RATIOS, tmp_path))
    named = tmp_path / NAMES[0] / SMALL[0]
    flip(named, named.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"in .*r0\.00/a\.safetensors is not what was written; write the folder again"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    shutil.rmtree(tmp_path / NAMES[0])
    interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    assert contents(tmp_path) == expected


def test_checksums_that_lie_are_found_by_reading_again(models, expected, tmp_path):
    leave_unfinished(models, RATIOS, tmp_path)
    entry = journal_of(tmp_path)
    entry.write_bytes(entry.read_bytes().replace(b'"0.norm": ["', b'"0.norm": ["1'))
    with pytest.raises(ValueError, match=r"'0.norm' in .*r0\.00/a\.safetensors is not what was written"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    assert os.listdir(tmp_path) == [WORK]
    interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    assert contents(tmp_path) == expected


def test_names_that_the_work_folder_uses_itself(models, tmp_path):
    names = ["journal", "outputs", "replaced", "plan.json", "gate.lock", "present.lock"]
    for _ in range(2):
        points = {name: i / 8 for i, name in enumerate(names)}
        interpolate_checkpoints(*models, points, tmp_path, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == sorted(names)
        for name in names:
            assert verify_checkpoint(tmp_path / name) > 0


def test_a_folder_that_came_to_be_in_the_meantime(models, expected, tmp_path):
    own = tmp_path / NAMES[1] / "own"

    def make(original, *arguments):
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        return original(*arguments)

    with patched(job, "write_file", make), pytest.raises(OSError, match=r"r0\.30 exists; pass overwrite=True .*2 of 2"):
        interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert own.read_text() == "mine"
    shutil.rmtree(own.parent)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


# --- finished jobs, and reading them again


def flip(path: Path, at: int) -> None:
    """Change one bit, and neither size nor time."""
    stamp = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_a_finished_job_is_done_again_at_once(models, tmp_path):
    made = interpolate_checkpoints(*models, RATIOS, tmp_path)
    stamps = {path: path.stat() for path in tmp_path.rglob("*")}
    with patched(job, "write_file", lambda *_: 1 / 0):
        for options in ({}, {"worker": (2, 2)}, {"overwrite": True, "worker": (1, 2)}, {"verify": True}):
            assert interpolate_checkpoints(*models, RATIOS, tmp_path, **options) == made
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {path: (each.st_ino, each.st_mtime_ns) for path, each in after.items() if path.is_file()} == {
        path: (each.st_ino, each.st_mtime_ns) for path, each in stamps.items() if path.is_file()
    }
    flip(made[1] / SMALL[1], 5000)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    with pytest.raises(ValueError, match=r"in .*r0\.30/b\.safetensors is not what was written; write the folder again"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True, overwrite=True)


def test_a_finished_job_does_not_mind_what_another_left(models, tmp_path):
    made = interpolate_checkpoints(*models, RATIOS, tmp_path)
    leave_unfinished(models, [0.7], tmp_path)
    kept = contents(tmp_path / WORK)
    assert interpolate_checkpoints(*models, RATIOS, tmp_path) == made
    assert contents(tmp_path / WORK) == kept


def test_every_bit_of_every_tensor_is_in_the_checksums(models, tmp_path):
    (folder,) = interpolate_checkpoints(*models, [0.3], tmp_path)
    total = 0
    for name in SMALL:
        header = read_header(folder / name)
        for tensor, entry in header.entries.items():
            total += entry.end - entry.start
            for at in {entry.start, (entry.start + entry.end) // 2, entry.end - 1} if entry.end > entry.start else ():
                flip(folder / name, header.data + at)
                with pytest.raises(
                    ValueError, match=rf"'{tensor}' in .*{name} is not what was written; write the fold"
                ):
                    verify_checkpoint(folder)
                flip(folder / name, header.data + at)
    assert verify_checkpoint(folder) == total


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), ValueError, r"r0\.30/b\.safetensors is missing; write the folder again"),
        (lambda path: os.truncate(path, 9000), ValueError, r"b\.safetensors cannot be read as a safetensors file"),
        (lambda path: os.truncate(path, 3), ValueError, r"b\.safetensors cannot be read as a safetensors file"),
        (lambda path: os.truncate(path, 0), ValueError, r"b\.safetensors cannot be read as a safetensors file"),
        (
            lambda path: shutil.copy(path.with_name("a.safetensors"), path),
            ValueError,
            r"b\.safetensors and its manifest differ in '0.empty', '0.norm'",
        ),
        (
            lambda path: path.with_name("fused_merge.json").unlink(),
            FileNotFoundError,
            r"r0\.30 has no fused_merge\.json",
        ),
        (
            lambda path: os.truncate(path.with_name("fused_merge.json"), 900),
            ValueError,
            r"fused_merge\.json is not a manifest of this library",
        ),
    ],
)
def test_damage_is_found_by_name(damage, error, message, models, tmp_path):
    (folder,) = interpolate_checkpoints(*models, [0.3], tmp_path)
    damage(folder / SMALL[1])
    with pytest.raises(error, match=message):
        verify_checkpoint(folder)


# --- disks that do only a part, or refuse


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no way past the page cache")
@pytest.mark.parametrize(("at", "threads"), [("open", 1), ("pwrite", 1), ("pwrite", 2)])
def test_a_file_system_that_goes_through_the_page_cache(at, threads, models, expected, tmp_path):
    refused = 0
    # So that two threads are refused at once.
    together = threading.Barrier(threads)

    def refuse_open(original, path, flags, *mode, **options):
        nonlocal refused
        if flags & os.O_DIRECT:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, *mode, **options)

    def refuse_pwrite(original, handle, data, offset):
        nonlocal refused
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused += 1
            together.wait(20)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(handle, data, offset)

    with patched(os, at, refuse_open if at == "open" else refuse_pwrite):
        interpolate_checkpoints(*models, RATIOS, tmp_path, threads=threads, max_memory=200_000)
    assert refused == len(RATIOS) * len(SMALL) * threads
    assert contents(tmp_path) == expected


def test_a_write_that_is_refused_in_any_way(models, tmp_path):
    def refuse(original, handle, data, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    with (
        patched(os, "pwrite", refuse),
        pytest.raises(OSError, match=r"cannot write .*a\.safetensors: Invalid argument"),
    ):
        interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert os.listdir(tmp_path) == []


def test_reads_and_writes_of_only_a_part(models, expected, tmp_path):
    rng, lock = random.Random(3), threading.Lock()

    def some(data) -> int:
        with lock:
            return rng.randint(1, len(data))

    with (
        patched(os, "pwrite", lambda pwrite, handle, data, at: pwrite(handle, data[: some(data)], at)),
        patched(os, "preadv", lambda preadv, handle, views, at: preadv(handle, [views[0][: some(views[0])]], at)),
    ):
        interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True)
    assert contents(tmp_path) == expected


def test_an_input_that_ends_while_it_is_read(models, tmp_path):
    with (
        patched(os, "preadv", lambda preadv, handle, views, at: 0),
        pytest.raises(
            OSError, match=r"base/a\.safetensors ends before byte \d+: it changed while it was read; run the s"
        ),
    ):
        interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interruption_while_threads_write(threads, models, expected, tmp_path):
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

    held = open_files(), threading.active_count(), torch.get_num_threads()
    before = signal.signal(signal.SIGINT, handler)
    try:
        with patched(os, "pwrite", interrupt), pytest.raises(KeyboardInterrupt):
            interpolate_checkpoints(*models, RATIOS, tmp_path, threads=threads)
    finally:
        signal.signal(signal.SIGINT, before)
    # A thread that the signal met while it was started is joined by nobody; it finds nothing to do and ends.
    patience = time.monotonic() + 60
    while threading.active_count() > held[1] and time.monotonic() < patience:
        time.sleep(0.01)
    assert (open_files(), threading.active_count(), torch.get_num_threads()) == held
    assert [path.name for path in tmp_path.rglob("*.safetensors.part")] == []
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


def test_the_first_fault_of_any_thread_is_what_is_said(big, tmp_path):
    calls = iter(range(10**6))

    def fail(preadv, handle, views, at):
        if next(calls) > 20:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(handle, views, at)

    with (
        patched(os, "preadv", fail),
        pytest.raises(OSError, match=r"cannot read .*a\.safetensors: Input/output error"),
    ):
        interpolate_checkpoints(*big, RATIOS, tmp_path, threads=4, max_memory="6MB")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", r"cannot write to .*out: .*out is not a folder that you may write to; choose another"),
        (WORK, r"cannot write to .*out: .*\.part is not a folder that you may write to; choose another"),
        (
            f"{WORK}/outputs/{NAMES[1]}",
            r"cannot write .*r0\.30/b\.safetensors: Permission denied; .*; 1 of 2 files are",
        ),
        (f"{WORK}/journal", r"cannot write .*journal/a\.safetensors\.lock: Permission denied; .*; 1 of 2 files are"),
    ],
)
def test_folders_that_may_only_be_read(place, message, models, expected, tmp_path):
    out = tmp_path / "out"
    leave_unfinished(models, RATIOS, out)
    for path in out.rglob("*.lock"):
        path.unlink()
    (out / place).chmod(0o555)
    if os.access(out / place, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(OSError, match=message):
        interpolate_checkpoints(*models, RATIOS, out)
    assert os.listdir(out) == [WORK]
    (out / place).chmod(0o755)
    interpolate_checkpoints(*models, RATIOS, out)
    assert contents(out) == expected


def test_a_finished_job_needs_neither_room_nor_leave_to_write(models, tmp_path, monkeypatch):
    made = interpolate_checkpoints(*models, RATIOS, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert interpolate_checkpoints(*models, RATIOS, tmp_path, verify=True) == made
    with pytest.raises(OSError, match=r"is not a folder that you may write to"):
        interpolate_checkpoints(*models, RATIOS, tmp_path, overwrite=True)


# --- what a job may use


@pytest.mark.parametrize(("threads", "memory"), [(1, 1_363_000), (2, "2.76MB"), (3, None), (4, 5_816_000), (4, "1GB")])
def test_threads_and_memory_change_no_byte(threads, memory, models, expected, tmp_path):
    interpolate_checkpoints(*models, RATIOS, tmp_path, threads=threads, max_memory=memory, verify=True)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("lacking", ["the name", "the pages"])
def test_a_system_without_huge_pages_writes_the_same(lacking, models, expected, tmp_path, monkeypatch):
    if lacking == "the name":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    interpolate_checkpoints(*models, RATIOS, tmp_path)
    assert contents(tmp_path) == expected


def test_too_little_memory_says_how_much_is_enough(models, tmp_path):
    with pytest.raises(ValueError, match=r"for 3 threads and 2 outputs; allow \d+ MB or take fewer threads") as caught:
        interpolate_checkpoints(*models, RATIOS, tmp_path, threads=3, max_memory="70KB")
    assert os.listdir(tmp_path) == []
    enough = re.search(r"allow (\d+ MB)", str(caught.value))[1]
    interpolate_checkpoints(*models, RATIOS, tmp_path, threads=3, max_memory=enough)


def peak_memory(models, ratios, out, options) -> int:
    """The bytes by which a run made this process grow."""
    status = Path("/proc/self/status")
    # The first run loads what it needs.
    interpolate_checkpoints(*models, ratios, out / "first", threads=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    interpolate_checkpoints(*models, ratios, out / "second", **options)
    return 1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the largest size")
def test_memory_stays_below_what_is_allowed(big, tmp_path):
    options = {"threads": 2, "max_memory": "6MB", "verify": True}
    how, grown = Child(peak_memory, big, [0.1, 0.2, 0.3, 0.4], tmp_path, options).answer()
    assert how == "done"
    # One file of one output is 5 MB, one of all outputs 20; interpreter and allocator take a little.
    assert grown < 12e6


def many_ratios(models, out) -> str:
    """Be refused, and then do what the sentence says."""
    ratios = [i / 200 for i in range(200)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        interpolate_checkpoints(*models, ratios, out, threads=2)
    except OSError as error:
        assert not out.exists()
        enough = int(re.search(r"`ulimit -n (\d+)`", str(error))[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with unhurried():
            interpolate_checkpoints(*models, ratios, out, threads=2, max_memory="16MB")
        return str(error)
    raise AssertionError


def test_more_outputs_than_a_process_may_open(models, expected, tmp_path):
    how, said = Child(many_ratios, models, tmp_path / "out").answer()
    assert how == "done", said
    assert re.fullmatch(
        r"200 outputs at once need \d+ open files, of which this process may have 150; allow more with "
        r"`ulimit -n \d+`, or write fewer outputs at once",
        said,
    )
    assert len(os.listdir(tmp_path / "out")) == 200
    assert contents(tmp_path / "out" / NAMES[1])["a.safetensors"] == expected[f"{NAMES[1]}/a.safetensors"]
    assert verify_checkpoint(tmp_path / "out" / "r0.995") > 0


def test_a_plan_writes_nothing_and_says_what_will_be_written(models, tmp_path):
    out = tmp_path / "new" / "out"
    plan = plan_interpolation(*models, RATIOS, out)
    described = plan.describe()
    assert os.listdir(tmp_path) == []
    assert plan.run() == [out / name for name in NAMES]
    assert described["outputs"] == [str(out / name) for name in NAMES]
    assert {each["path"]: each["bytes"] for each in described["files"]} == {
        str(path): path.stat().st_size for path in out.rglob("*.safetensors")
    }
    left = {"README.md", "fused_merge.json"}
    assert described["bytes_written"] == sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name not in left
    )
    assert described["tensors"] == 8


def test_what_a_killed_run_holds_counts_as_room(models, tmp_path, monkeypatch):
    leave_unfinished(models, RATIOS, tmp_path)
    needed = plan_interpolation(*models, RATIOS, tmp_path / "other").bytes_written
    part = tmp_path / WORK / "outputs" / NAMES[0] / f"{SMALL[1]}.part"
    part.write_bytes(bytes(10_000))
    held = sum(path.stat().st_size for path in (tmp_path / WORK).rglob("*") if path.is_file())
    free = SimpleNamespace(free=needed - held)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    plan_interpolation(*models, RATIOS, tmp_path)
    free.free -= 1
    with pytest.raises(OSError, match=r" GB of .* GB free; make room or write less at once"):
        plan_interpolation(*models, RATIOS, tmp_path)


def test_files_that_others_rename_while_the_room_is_measured(models, expected, tmp_path):
    leave_unfinished(models, RATIOS, tmp_path)

    def vanish(stat, path, *arguments, **options):
        if os.fspath(path).endswith("/a.safetensors") and WORK in os.fspath(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return stat(path, *arguments, **options)

    with patched(os, "stat", vanish):
        plan = plan_interpolation(*models, RATIOS, tmp_path)
    plan.run()
    assert contents(tmp_path) == expected


def test_models_without_a_tensor_in_common(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "b.safetensors")
    for size in (None, "1GB"):
        with pytest.raises(ValueError, match=r"no tensor is in all of .*a\.safetensors and .*b\.safetensors, so that"):
            plan_interpolation(
                tmp_path / "a.safetensors",
                tmp_path / "b.safetensors",
                [0.5],
                tmp_path / "out",
                unmatched="drop",
                max_shard_size=size,
            )
