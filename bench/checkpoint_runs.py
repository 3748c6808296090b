"""Who writes in `bench/bench_checkpoints.py`, and how one turn of it is measured: times, bytes and memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from checkpoint_pair import Failure, Pair
from safetensors.torch import load_file, save_file

# What a child runs. It imports its neighbors, so without -P.
SCRIPT = Path(__file__).with_name("bench_checkpoints.py")
DD, NAIVE, YAML, MULTI = "dd", "naive torch", "mergekit-yaml", "mergekit-multi"
CALL, COMMAND, PER_RATIO = OURS = ("fused_merge call", "fused_merge command", "fused_merge per ratio")

# Of prctl(2).
PR_SET_THP_DISABLE = 41

# Where the kernel's counters of a disk have the sectors that it was told are free.
DISCARDED = 13


# ---------------------------------------------------------------- providers


class Provider(NamedTuple):
    """Who writes, and how."""

    name: str
    # What to run to write to a folder.
    commands: Callable[[Path], Sequence[Sequence[str | Path]]]
    ratios: int
    # Whether its one command times itself.
    timed_inside: bool = False
    # The interpreter whose idle memory is taken off; none takes none off.
    python: str | None = sys.executable


def ratios_of(count: int) -> list[float]:
    """Return so many ratios from 0 to 1."""
    return [k / (count - 1) for k in range(count)]


def child(name: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, SCRIPT, "--child", name, *arguments]


def interpolate_command(pair: Pair, ratios: Sequence[float], out: Path) -> list[str | Path]:
    main = "from fused_merge.cli import main; main()"
    options = ["--ratios", ",".join(map(str, ratios)), "--out", out]
    return [sys.executable, "-P", "-c", main, "interpolate", pair.base, pair.tuned, *options]


def linear(pair: Pair, ratio: float, **more: str) -> str:
    """Return a configuration of mergekit: YAML, of which JSON is a part."""
    weights = {pair.base: 1 - ratio, pair.tuned: ratio}
    models = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in weights.items()]
    return json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16", **more})


def providers(pair: Pair, ratios: Sequence[float], work: Path, mergekit: Path | None) -> list[Provider]:
    """Return who takes part, in the order of the turns."""
    text = ",".join(map(str, ratios))

    def dd(out: Path) -> list[list[str | Path]]:
        out.mkdir()
        sizes = [file.stat().st_size for file in sorted(pair.base.glob("*.safetensors"))] * len(ratios)
        options = ["bs=1M", "iflag=count_bytes", "oflag=direct"]
        return [
            ["dd", "if=/dev/zero", f"of={out / f'{i}.safetensors'}", f"count={size}", *options]
            for i, size in enumerate(sizes)
        ]

    found = [
        Provider(DD, dd, len(ratios), python=None),
        Provider(CALL, lambda out: [child("call", pair.base, pair.tuned, out, text)], len(ratios), timed_inside=True),
        Provider(COMMAND, lambda out: [interpolate_command(pair, ratios, out)], len(ratios)),
        Provider(PER_RATIO, lambda out: [interpolate_command(pair, [r], out) for r in ratios], len(ratios)),
        Provider(NAIVE, lambda out: [child("naive", pair.base, pair.tuned, out, text)], len(ratios)),
    ]
    if mergekit is None:
        return found
    python = str(mergekit / "python")
    one, many = work / "mergekit-yaml.yaml", work / "mergekit-multi.yaml"
    one.write_text(linear(pair, ratios[len(ratios) // 2]))
    many.write_text("\n---\n".join(linear(pair, ratio, name=f"r{ratio}") for ratio in ratios))
    found.append(Provider(YAML, lambda out: [[mergekit / YAML, one, out]], 1, python=python))
    if (mergekit / MULTI).is_file():
        found.append(Provider(MULTI, lambda out: [[mergekit / MULTI, many, "-I", out]], len(ratios), python=python))
    return found


def settings(pair: Pair, ratios: Sequence[float]) -> list[Provider]:
    """Return the call under other settings than its own: what these were chosen by."""
    text = ",".join(map(str, ratios))

    def other(name: str, run: str, *more: str) -> Provider:
        def commands(out: Path) -> list[list[str | Path]]:
            return [child(run, pair.base, pair.tuned, out, text, *more)]

        return Provider(f"{CALL} with {name}", commands, len(ratios), timed_inside=True)

    return [*(other(f"{n} threads", "call", str(n)) for n in (3, 4, 6)), other("4 KiB pages", "call in small pages")]


def call(base: str, tuned: str, out: str, ratios: str, threads: str = "") -> None:
    """What a user's program does: in a process of its own, timed after the imports."""
    from fused_merge import interpolate_checkpoints

    points = [float(ratio) for ratio in ratios.split(",")]
    began = time.perf_counter()
    interpolate_checkpoints(base, tuned, points, out, threads=int(threads) if threads else None, progress=False)
    print(time.perf_counter() - began)


def call_in_small_pages(base: str, tuned: str, out: str, ratios: str) -> None:
    """Do the same in a process that the kernel gives no huge pages."""
    if ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        sys.exit("this kernel does not let a process do without huge pages")
    call(base, tuned, out, ratios)


def naive(base: str, tuned: str, out: str, ratios: str) -> None:
    """What one writes without a library: everything in memory, all of it saved for each ratio."""
    start, end = (
        {name: x for file in Path(folder).glob("*.safetensors") for name, x in load_file(file).items()}
        for folder in (base, tuned)
    )
    for ratio in ratios.split(","):
        folder = Path(out) / f"r{ratio}"
        folder.mkdir(parents=True)
        between = {name: start[name].float().lerp(end[name].float(), float(ratio)).bfloat16() for name in start}
        save_file(between, folder / "model.safetensors", metadata={"format": "pt"})


CHILDREN: dict[str, Callable[..., None]] = {"call": call, "call in small pages": call_in_small_pages, "naive": naive}


# ---------------------------------------------------------------- measuring


class Memory(NamedTuple):
    """Bytes of a process and its children."""

    anonymous: int
    resident: int


class Measurement(NamedTuple):
    """One turn of one provider."""

    seconds: float
    on_disk: float  # until its files are on the disk
    bytes: int
    memory: Memory | None


def memory_of(pid: int) -> Memory:
    """Return the memory of a process and its children now; what has ended has none."""
    fields: dict[str, int] = {}
    total = Memory(0, 0)
    # They end when they like, between any two of these lines.
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, value, _ = line.split()
            fields[key] = 1024 * int(value)
        # Of what several processes share, the part of each. Buffers of mmap(-1) count as shared.
        total = Memory(fields.get("Pss_Anon:", 0) + fields.get("Pss_Shmem:", 0), fields.get("Rss:", 0))
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for other in (thread / "children").read_text().split():
                more = memory_of(int(other))
                total = Memory(total.anonymous + more.anonymous, total.resident + more.resident)
    return total


@contextlib.contextmanager
def watching(pid: int, seen: list[Memory]) -> Iterator[None]:
    """Note the memory of a process and its children every 20 ms."""
    ended = threading.Event()

    def watch() -> None:
        seen.append(memory_of(pid))
        while not ended.wait(0.02):
            seen.append(memory_of(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@functools.cache
def idle_memory(python: str) -> int:
    """Return the anonymous memory of a process that has imported torch and does nothing."""
    wait = [python, "-c", "import sys, torch; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as process:
        process.stdout.readline()
        return memory_of(process.pid).anonymous


def settle(folder: Path) -> None:
    """Wait until nothing is left to be written, and what was deleted is free.

    Some file systems tell the disk afterwards which blocks are free, and it is busy with that for seconds.
    """
    os.sync()
    device = folder.stat().st_dev
    counters = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    deadline = time.monotonic() + 60
    while counters.is_file() and time.monotonic() < deadline:
        before = int(counters.read_text().split()[DISCARDED])
        time.sleep(1)
        # In sectors of 512 bytes. Others on the machine delete small things all the time.
        if (int(counters.read_text().split()[DISCARDED]) - before) * 512 < 2**26:
            return


def warm(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(2**24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(provider: Provider, pair: Pair, out: Path, watch: bool) -> Measurement:
    """Let a provider write to `out`, which must not exist, and leave it there."""
    commands = provider.commands(out)
    settle(out.parent)
    warm(pair.files())
    seen: list[Memory] = []
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    for command in commands:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with ExitStack() as stack:
            process = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
            if watch:
                stack.enter_context(watching(process.pid, seen))
            printed, errors = process.communicate()
        if process.returncode != 0:
            last = (errors.strip().splitlines() or ["it said nothing"])[-1]
            raise Failure(f"{provider.name} ended with exit code {process.returncode}: {last}")
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    written = sorted(out.rglob("*.safetensors"))
    for path in written:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    after = time.perf_counter() - began
    if provider.timed_inside:
        seconds = float(printed)
    size = sum(path.stat().st_size for path in written)
    if size < provider.ratios * pair.bytes:
        raise Failure(f"{provider.name} wrote {size} bytes, fewer than {provider.ratios} x {pair.bytes}")
    memory = None
    if seen:
        memory = Memory(max(x.anonymous for x in seen), max(x.resident for x in seen))
        if provider.python:
            memory = memory._replace(anonymous=max(0, memory.anonymous - idle_memory(provider.python)))
    return Measurement(seconds, seconds + after, size, memory)
