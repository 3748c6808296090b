"""How long each operation should take on a GPU: by the bytes it moves and by the instructions it issues.

`python bench/roofline.py` prints the tables, `--write docs/performance.md` puts them between the markers of that page.
These are predictions. Rows that `bench/gpu_suite.py` has measured, in `bench/results/gpu/`, are set beside them.

A launch takes the longer of two times, and an operation the sum over its launches:

    bytes per element / (bandwidth of the data sheet * ACHIEVABLE)
    instructions per element / instructions that the device can issue

The bytes are those of the kernels' docstrings. The instructions are counted in the machine code for whole blocks that
`bench/kernels.py` has compiled and recorded; of code that runs only at times, as at a merge of step-K, all counts.
Launch overheads, waiting, and pipes that are narrower than the issue rate are left out, so the times are lower bounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results" / "gpu"
RECORD = BENCH / "results" / "kernels.json"
MARKERS = "<!-- roofline: begin -->", "<!-- roofline: end -->"

# Of the bandwidth on a data sheet, what a plain copy reaches.
ACHIEVABLE = 0.9
# Of the instructions of an interpolation, those of the loop over R ratios.
LOOP = 0.5
# Of the instructions of a round of a search, those that look at all elements and not at a list.
LOOK = 0.5
ELEMENTS_PER_THREAD = 8
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


def issue_rate(processors: int, lanes: int, clock: float) -> float:
    """Return instructions/s: four schedulers a processor, each issuing for so many threads a cycle."""
    return processors * 4 * lanes * clock


DEVICES = (
    # NVIDIA A100 80 GB SXM data sheet: 2039 GB/s; 108 SMs at 1.41 GHz.
    Device("A100 SXM 80 GB", "A100", "sm_80", 2.039e12, issue_rate(108, 32, 1.41e9), 32),
    # NVIDIA H100 SXM data sheet: 3.35 TB/s; 132 SMs, and 67 TFLOP/s of fp32 make 1.98 GHz.
    Device("H100 SXM", "H100", "sm_90", 3.35e12, issue_rate(132, 32, 1.98e9), 32),
    # NVIDIA H200 SXM data sheet: 4.8 TB/s; otherwise the H100.
    Device("H200", "H200", "sm_90", 4.8e12, issue_rate(132, 32, 1.98e9), 32),
    # AMD Instinct MI300X data sheet: 5.3 TB/s; 304 CUs at 2.1 GHz, four SIMDs of 16 lanes; lines of 128 bytes.
    Device("MI300X", "MI300X", "gfx942", 5.3e12, issue_rate(304, 16, 2.1e9), 128),
)


class Launch(NamedTuple):
    """A kernel, by its name in `bench/kernels.py` where it is ours, and the bytes per element that it moves."""

    build: str | None
    bytes: float
    runs: float = 1.0  # how much of its code an element runs through


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


def ops(sector: int = 32) -> dict[str, Op]:
    """Return every operation on a memory of such sectors, by name; one table for predictions and measurements."""
    rate, many, bit, offsets = 0.01, 0.3, 1 / 8, 4 / 1024
    states = 4 + 4 + 4 + 4  # m and v, read and written
    tau = bit + offsets + 2 * rate
    either = 1 - (1 - rate) ** 2
    theta, theta_bf16 = 8 * touched(either, 4, sector), 4 * touched(either, 2, sector)
    # Of normally distributed updates: what lies above a window of 3 % around the threshold, and in it or above.
    threshold = NormalDist().inv_cdf(1 - rate / 2)
    marked, above = (2 * (1 - NormalDist().cdf(edge * threshold)) for edge in (0.97, 1.03))
    listed = 4 * (marked - above)
    moments_again = 8 * touched(marked, 4, sector)
    mark = Launch("mark: onties", 4 + states + bit + listed)
    last = bit + tau + theta

    return {
        FUSED: Op((Launch(None, 28),), {FUSED: None}),
        "torch foreach": Op((Launch(None, 28),), {FUSED: None}),
        COMPILED: Op((Launch(None, 28 + 2),), {FUSED: None}),
        COPY: Op((Launch(None, 28),), {FUSED: None}),
        "adamw": Op((Launch("step: adamw", 28),), {FUSED: None}),
        "ondare, p = 1": Op((Launch("step: ondare, all kept", 28 + 2),), {FUSED: 1.10, COMPILED: None}),
        "ondare, p = 0.01": Op((Launch("step: ondare", 4 + states + tau + theta),), {FUSED: 0.85}),
        "ondare, p = 0.3": Op((Launch("step: ondare, K", 28 + bit + offsets + 2 * many),), {FUSED: None}),
        # The window is 2^19 patterns wide: three rounds of 256 bins, over what is listed.
        "onties, p = 0.01": Op(
            (mark, *3 * [Launch(None, listed)], Launch("step: onties", last + moments_again)), {FUSED: 0.95}
        ),
        # Nothing is known of the threshold: four rounds, and all of m and v in each.
        "onties, p = 0.01, first step": Op(
            (mark, *4 * [Launch("count: onties", 8, LOOK)], Launch("step: onties", last + 8)), {FUSED: None}
        ),
        "onproj, tensor": Op((Launch("project: onproj", 4 + 2), Launch("step: onproj", 28 + 2)), {FUSED: 1.35}),
        "onproj, rows": Op((Launch("step: onproj, rows", 28 + 2),), {FUSED: 1.15}),
        "ondare, K = 4, between merges": Op((Launch("step: ondare, K", 28),), {FUSED: None}),
        "ondare, K = 4, at a merge": Op((Launch("step: ondare, K", 28 + 8 + tau),), {FUSED: None}),
        PLAIN_BF16: Op((Launch("step: bf16 adamw", 2 + states + 4),), {FUSED: None}),
        "bf16 ondare, split": Op((Launch("step: bf16 ondare, split", 2 + states + 8 + tau),), {PLAIN_BF16: None}),
        "bf16 ondare, p = 0.01": Op((Launch("step: bf16 ondare", 2 + states + tau + theta_bf16),), {PLAIN_BF16: 0.95}),
        LERPS: Op((Launch(None, 3 * 8 * 2),), {LERPS: None}),
        LINE_COPY: Op((Launch(None, (2 + 8) * 2),), {LINE_COPY: None}),
        "interpolation, R = 8": Op(
            (Launch("interpolate", (2 + 8) * 2, 1 - LOOP + LOOP * 8),), {LERPS: 1 / 2.2, LINE_COPY: 1 / 0.9}
        ),
    }


class Prediction(NamedTuple):
    """Seconds per element, and what takes them."""

    seconds: float
    bound: str


def predict(op: Op, device: Device, instructions: dict[str, int]) -> Prediction:
    """Return how long an element of an operation takes; `instructions` of a build on that device, all of them."""
    total, slow = 0.0, []
    for launch in op.launches:
        memory = launch.bytes / (device.bandwidth * ACHIEVABLE)
        arithmetic = 0.0
        if launch.build is not None:
            arithmetic = instructions[launch.build] * launch.runs / ELEMENTS_PER_THREAD / device.issue
        if arithmetic > memory and launch.build not in slow:
            slow.append(launch.build)
        total += max(memory, arithmetic)
    kernels = ", ".join(build.split(":")[0] for build in slow if build)
    if not slow:
        return Prediction(total, "memory")
    return Prediction(total, "arithmetic" if len(op.launches) == 1 else f"memory; arithmetic in {kernels}")


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as tables show it."""
    return "" if value is None else f"{value:.{digits}f}"


def meets(ratio: float | None, target: float | None) -> bool | None:
    """Return whether a target is met, or None where there is nothing to tell."""
    return None if ratio is None or target is None else ratio <= target


def word(met: bool | None) -> str:
    """Return whether a target is met, as tables show it."""
    return {True: "yes", False: "no", None: ""}[met]


def table(device: Device, instructions: dict[str, int], measured: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of a device's table."""
    every = ops(device.sector)
    found = {
        (row["name"], row["baseline"]): row
        for row in measured
        if device.match in row["gpu"] and row["size"] == "large" and row["ms"] is not None
    }
    predictions = {name: predict(op, device, instructions) for name, op in every.items()}
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
            times = [number(1e3 * seconds * parameters) for parameters in MODELS.values()]
            cells = [name, number(op.bytes, 1), *times, baseline, number(ratio), number(target)]
            cells += [word(meets(ratio, target)), bound]
            if row := found.get((name, baseline)):
                share = row["ms"] / (1e3 * seconds * row["parameters"])
                cells += [number(row["ms"]), number(row["ratio"]), number(share)]
            elif found:
                cells += 3 * [""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(kernels: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> str:
    """Return the tables of all devices, from rows of `bench/kernels.py` and of `bench/gpu_suite.py`."""
    lines = []
    for device in DEVICES:
        instructions = {
            row["build"]: row["instructions"]
            for row in kernels
            if row["target"] == device.target and row["form"] == "whole"
        }
        lines += [f"### {device.name}", "", *table(device, instructions, measured), ""]
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
