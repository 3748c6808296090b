"""How long each operation should take on a GPU: by the bytes it moves, the instructions it issues, and latency.

`python bench/roofline.py` prints the tables, `--write docs/explanation/performance.md` puts them between the markers of
that page. These are predictions. Rows that `bench/gpu_suite.py` has measured, in `bench/results/gpu/`, are set beside
them.

A launch takes the longest of three times, and an operation the sum over its launches:

    bytes per element / (bandwidth of the data sheet * ACHIEVABLE)
    instructions per element / instructions that the device can issue
    trips to memory of a program * latency / (programs in flight * elements of a program)

The bytes are those of the kernels' docstrings. The instructions are counted in the machine code for whole blocks that
`bench/kernels.py` has compiled and recorded; of code that runs only at times, as at a merge of step-K, all counts. The
same record has the registers and the shared memory, which limit the programs in flight. The third time is Little's law:
with fewer bytes in flight than latency * bandwidth, memory waits for programs. Launch overheads and pipes that are
narrower than the issue rate are left out, so the times are lower bounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import comb
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results" / "gpu"
RECORD = BENCH / "results" / "kernels.json"
MARKERS = "<!-- roofline: begin -->", "<!-- roofline: end -->"

# What `bench/kernels.py` says of a build.
Row: TypeAlias = "dict[str, Any]"

# Of the bandwidth on a data sheet, what a plain copy reaches.
ACHIEVABLE = 0.9
# Of the instructions of an interpolation, those of the loop over R ratios.
LOOP = 0.5
# Of the instructions of a round of a search, those that look at a block of elements, and not at one of a list.
LOOK = 0.4
# Of the instructions of the walk, those of its loop.
WALK = 0.22
# Blocks that a program walks.
WALK_BLOCKS = 4
ELEMENTS_PER_THREAD, WARPS = 8, 4
# Neighbors that the kernels touch together or not at all.
GROUP = 8

MODELS = {"0.5 B": 5e8, "7 B": 7e9}

FUSED, PLAIN_BF16, COMPILED = "torch fused", "bf16 adamw", "torch.compile"
COPY, LINE_COPY, LERPS = "copy, 28 bytes", "copy, 20 bytes", "8 x torch.lerp"


class Device(NamedTuple):
    """A GPU, from its vendor's data sheet."""

    name: str
    match: str  # what its name, as torch reports it, contains
    target: str  # of `bench/kernels.py`
    bandwidth: float  # bytes/s of its memory
    issue: float  # instructions/s of one thread each
    sector: int  # bytes that its memory moves at least
    processors: int
    warp: int  # threads
    warps: int  # that a processor holds
    registers: int  # of a processor, one for a thread each
    shared: int  # bytes of shared memory of a processor
    reserved: int  # of these, for each program
    latency: float  # seconds from a load to its data while memory is busy

    @property
    def elements(self) -> int:
        """Elements of a block."""
        return ELEMENTS_PER_THREAD * WARPS * self.warp


def issue_rate(processors: int, lanes: int, clock: float) -> float:
    """Return instructions/s: four schedulers a processor, each issuing for so many threads a cycle."""
    return processors * 4 * lanes * clock


# What NVIDIA's own library keeps in flight on a processor to reach full bandwidth, 16, 32 and 48 KB
# (`arch_to_min_bytes_in_flight` of cub's transform, NVIDIA/cccl), by Little's law.
AMPERE, HOPPER, H200 = ((kilobytes << 10) * n / rate for kilobytes, n, rate in
                        ((16, 108, 2.039e12), (32, 132, 3.35e12), (48, 132, 4.8e12)))  # fmt: skip
# Nothing like it is known of the MI300X, whose data comes through another cache: no faster than the slowest of these.
CDNA3 = H200

DEVICES = (
    # NVIDIA A100 80 GB SXM data sheet: 2039 GB/s; 108 SMs at 1.41 GHz, 164 KB of shared memory each.
    Device("A100 SXM 80 GB", "A100", "sm_80", 2.039e12, issue_rate(108, 32, 1.41e9), 32,
           108, 32, 64, 65536, 164 << 10, 1 << 10, AMPERE),
    # NVIDIA H100 SXM data sheet: 3.35 TB/s; 132 SMs, and 67 TFLOP/s of fp32 make 1.98 GHz; 228 KB.
    Device("H100 SXM", "H100", "sm_90", 3.35e12, issue_rate(132, 32, 1.98e9), 32,
           132, 32, 64, 65536, 228 << 10, 1 << 10, HOPPER),
    # NVIDIA H200 SXM data sheet: 4.8 TB/s; otherwise the H100.
    Device("H200", "H200", "sm_90", 4.8e12, issue_rate(132, 32, 1.98e9), 32,
           132, 32, 64, 65536, 228 << 10, 1 << 10, H200),
    # AMD Instinct MI300X data sheet: 5.3 TB/s; 304 CUs at 2.1 GHz, four SIMDs of 16 lanes; lines of 128 bytes.
    # CDNA 3 ISA: a SIMD holds 8 waves of 64 threads and 512 registers for each of 64 lanes; 64 KB a CU.
    Device("MI300X", "MI300X", "gfx942", 5.3e12, issue_rate(304, 16, 2.1e9), 128,
           304, 64, 32, 4 * 512 * 64, 64 << 10, 0, CDNA3),
)  # fmt: skip


class Launch(NamedTuple):
    """A kernel, by its name in `bench/kernels.py` where it is ours, and what its programs do."""

    build: str | None
    bytes: float  # moved per element
    runs: float = 1.0  # how often a program runs through its code
    blocks: float = 1.0  # of elements, for each program
    # To memory and back, one after the other: of a step for its entry in the table of programs, for gradient and
    # moments, and for the weights, which it loads when those are stored. Entries of tensors and scalars are in a cache.
    trips: float = 3.0


class Op(NamedTuple):
    """An operation, what it is compared with, and what share of that time it may take, where it has a target."""

    launches: tuple[Launch, ...]
    targets: dict[str, float | None]

    @property
    def bytes(self) -> float:
        """Bytes per element of all launches."""
        return sum(launch.bytes for launch in self.launches)


def touched(share: float, size: int, sector: int) -> float:
    """Return which share of a tensor moves if a random share of its elements, of `size` bytes, is asked for."""
    return 1.0 - (1.0 - share) ** max(GROUP, sector // size)


def largest_count(share: float, size: int, draws: int) -> float:
    """Return the expected largest of `draws` counts of how many of `size` elements are in a random share of all."""
    below = list(accumulate(comb(size, n) * share**n * (1 - share) ** (size - n) for n in range(size)))
    return sum(1 - probability**draws for probability in below)


def ops(sector: int = 32, warp: int = 32) -> dict[str, Op]:
    """Return every operation by its name, on a memory of such sectors and with warps of so many threads."""
    rate, many, bit, offsets = 0.01, 0.3, 1 / 8, 4 / 1024
    states = 4 + 4 + 4 + 4  # m and v, read and written
    tau = bit + offsets + 2 * rate
    either = 1 - (1 - rate) ** 2
    theta, theta_bf16 = 8 * touched(either, 4, sector), 4 * touched(either, 2, sector)
    # Of normally distributed updates: what lies in a window of 3 % around the threshold, or above it.
    marked = 2 * (1 - NormalDist().cdf(0.97 * NormalDist().inv_cdf(1 - rate / 2)))
    firsts, listed = 8 / 1024, 4 * marked
    candidates = 1 - (1 - marked) * (1 - rate)
    mark = Launch("mark: onties", 4 + states + bit + firsts + listed)
    # Its entry, the interval, and a block of the list.
    count = Launch("count: onties", listed, 1 - LOOK, blocks=1 / marked)
    # The most that any thread finds in its word.
    rounds = largest_count(candidates, 32, WARPS * warp)
    walk = Launch(
        "walk: onties",
        bit + firsts + listed + tau + theta / 2 + 4 * touched(candidates, 4, sector),
        1 - WALK + WALK * rounds,
        WALK_BLOCKS,
        2 + rounds,
    )

    return {
        FUSED: Op((Launch(None, 28),), {FUSED: None}),
        "torch foreach": Op((Launch(None, 28),), {FUSED: None}),
        COMPILED: Op((Launch(None, 28 + 2),), {FUSED: None}),
        COPY: Op((Launch(None, 28),), {FUSED: None}),
        "adamw": Op((Launch("step: adamw", 28),), {FUSED: None}),
        "ondare, p = 1": Op((Launch("step: ondare, all kept", 28 + 2),), {FUSED: 1.10, COMPILED: None}),
        "ondare, p = 0.01": Op((Launch("step: ondare", 4 + states + tau + theta, trips=4),), {FUSED: 0.85}),
        "ondare, p = 0.3": Op((Launch("step: ondare, K", 28 + bit + offsets + 2 * many, trips=4),), {FUSED: None}),
        # The window is 2^19 patterns wide: three rounds of 256 bins, over what is listed.
        "onties, p = 0.01": Op((mark, *3 * [count], walk), {FUSED: 0.95}),
        # Nothing is known of the threshold: four rounds, and all of m and v in each.
        "onties, p = 0.01, first step": Op(
            (
                mark._replace(bytes=4 + states + bit + firsts),
                *4 * [Launch("count: onties", 8, LOOK, trips=1)],
                Launch("step: onties", 8 + bit + tau + theta, trips=5),
            ),
            {FUSED: None},
        ),
        "onproj, tensor": Op(
            (Launch("project: onproj", 4 + 2, trips=2), Launch("step: onproj", 28 + 2)), {FUSED: 1.35}
        ),
        "onproj, rows": Op((Launch("step: onproj, rows", 28 + 2, trips=4),), {FUSED: 1.15}),
        "ondare, K = 4, between merges": Op((Launch("step: ondare, K", 28),), {FUSED: None}),
        "ondare, K = 4, at a merge": Op((Launch("step: ondare, K", 28 + 8 + tau, trips=5),), {FUSED: None}),
        PLAIN_BF16: Op((Launch("step: bf16 adamw", 2 + states + 4),), {FUSED: None}),
        "bf16 ondare, split": Op(
            (Launch("step: bf16 ondare, split", 2 + states + 8 + tau, trips=4),), {PLAIN_BF16: None}
        ),
        "bf16 ondare, p = 0.01": Op(
            (Launch("step: bf16 ondare", 2 + states + tau + theta_bf16, trips=4),), {PLAIN_BF16: 0.95}
        ),
        LERPS: Op((Launch(None, 3 * 8 * 2),), {LERPS: None}),
        LINE_COPY: Op((Launch(None, (2 + 8) * 2),), {LINE_COPY: None}),
        "interpolation, R = 8": Op(
            (Launch("interpolate", (2 + 8) * 2, 1 - LOOP + LOOP * 8, trips=2),), {LERPS: 1 / 2.2, LINE_COPY: 1 / 0.9}
        ),
    }


def programs(device: Device, row: Row) -> int:
    """Return how many programs of a kernel a processor holds; registers come by the eight."""
    by_registers = device.registers // (-(-row["registers"] // 8) * 8 * WARPS * device.warp)
    by_shared = device.shared // max(1, row["shared"] + device.reserved)
    return min(device.warps // WARPS, by_registers, by_shared)


class Prediction(NamedTuple):
    """Seconds per element, and what takes them."""

    seconds: float
    bound: str


def times(launch: Launch, device: Device, rows: dict[str, Row]) -> dict[str, float]:
    """Return the times that a launch takes at least, in seconds per element, by what takes them."""
    found = {"memory": launch.bytes / (device.bandwidth * ACHIEVABLE)}
    if launch.build is not None:
        row = rows[launch.build]
        found["arithmetic"] = row["instructions"] * launch.runs / launch.blocks / ELEMENTS_PER_THREAD / device.issue
        in_flight = programs(device, row) * device.processors * launch.blocks * device.elements
        found["latency"] = launch.trips * device.latency / in_flight
    return found


def predict(op: Op, device: Device, rows: dict[str, Row]) -> Prediction:
    """Return how long an element of an operation takes; `rows` of `bench/kernels.py` for that device, by build."""
    total, slow = 0.0, dict.fromkeys(["memory", "arithmetic", "latency"], "")
    for launch in dict.fromkeys(op.launches):
        found = times(launch, device, rows)
        bound = max(found, key=lambda name: found[name])
        total += found[bound] * op.launches.count(launch)
        kernel = (launch.build or "").partition(":")[0]
        slow[bound] += f"{', ' if slow[bound] else ''}{kernel}"
    bounds = [bound for bound, kernels in slow.items() if kernels or bound == "memory"]
    if len(op.launches) == 1:
        return Prediction(total, bound)
    return Prediction(total, "; ".join(bound if bound == "memory" else f"{bound} in {slow[bound]}" for bound in bounds))


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as tables show it."""
    return "" if value is None else f"{value:.{digits}f}"


def meets(ratio: float | None, target: float | None) -> bool | None:
    """Return whether a target is met, or None where there is nothing to tell."""
    return None if ratio is None or target is None else ratio <= target


def word(met: bool | None) -> str:
    """Return whether a target is met, as tables show it."""
    return {True: "yes", False: "no", None: ""}[met]


def table(device: Device, rows: dict[str, Row], measured: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of a device's table."""
    every = ops(device.sector, device.warp)
    found = {
        (row["name"], row["baseline"]): row
        for row in measured
        if device.match in row["gpu"] and row["size"] == "large" and row["ms"] is not None
    }
    predictions = {name: predict(op, device, rows) for name, op in every.items()}
    columns = [
        "operation",
        "bytes",
        *(f"{model}, ms" for model in MODELS),
        "against",
        "ratio",
        "target",
        "met",
        "bound by",
    ]
    columns += ["measured, ms", "measured ratio", "measured / predicted"] if found else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, op in every.items():
        seconds, bound = predictions[name]
        for baseline, target in op.targets.items():
            ratio = seconds / predictions[baseline].seconds
            each = [number(1e3 * seconds * parameters) for parameters in MODELS.values()]
            cells = [name, number(op.bytes, 1), *each, baseline, number(ratio), number(target)]
            cells += [word(meets(ratio, target)), bound]
            if row := found.get((name, baseline)):
                share = row["ms"] / (1e3 * seconds * row["parameters"])
                cells += [number(row["ms"]), number(row["ratio"]), number(share)]
            elif found:
                cells += 3 * [""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def latency_table(device: Device, rows: dict[str, Row]) -> list[str]:
    """Return the lines of a table of what each kernel of ours keeps in flight on a device."""
    needed = device.bandwidth * device.latency / device.processors
    columns = ["kernel", "registers", "programs", "KB in flight", "of what is needed", "limit", "fills the GPU from",
               "at least, µs"]  # fmt: skip
    lines = [
        f"A load takes {1e6 * device.latency:.2f} µs here while memory is busy: "
        f"{needed / 1024:.0f} KB in flight on each multiprocessor keep it so.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    launches: dict[str, Launch] = {}
    for op in ops(device.sector, device.warp).values():
        for launch in op.launches:
            if launch.build is not None:
                launches.setdefault(launch.build, launch)
    for build, launch in launches.items():
        held = programs(device, rows[build])
        elements = held * launch.blocks * device.elements
        in_flight = elements * launch.bytes / launch.trips
        found = times(launch, device, rows)
        cells = [build, rows[build]["registers"], held, number(in_flight / 1024, 0), number(in_flight / needed)]
        cells += [max(found, key=lambda name: found[name]), f"{elements * device.processors / 1e6:.1f} M"]
        cells += [number(1e6 * launch.trips * device.latency, 1)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def report(kernels: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> str:
    """Return the tables of all devices, from rows of `bench/kernels.py` and of `bench/gpu_suite.py`."""
    lines = []
    for device in DEVICES:
        rows = {row["build"]: row for row in kernels if row["target"] == device.target and row["form"] == "whole"}
        lines += [f"### {device.name}", "", *table(device, rows, measured), "", *latency_table(device, rows), ""]
    return "\n".join(lines)


def replace_between_markers(page: str, text: str, markers: tuple[str, str] = MARKERS) -> str:
    """Return a page with what stands between its markers replaced."""
    begin, end = markers
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no lines {begin} and {end}; add them where the tables belong")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", type=Path, default=RECORD, help="output of bench/kernels.py --json; its record without it"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables between the markers of a page")
    arguments = parser.parse_args()
    kernels = json.loads(arguments.kernels.read_text())["rows"]
    measured = [row for file in sorted(RESULTS.glob("*.json")) for row in json.loads(file.read_text())]
    text = report(kernels, measured)
    if arguments.write:
        arguments.write.write_text(replace_between_markers(arguments.write.read_text(), text))
    else:
        print(text)


if __name__ == "__main__":
    main()
