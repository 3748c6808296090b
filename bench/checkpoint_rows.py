"""What `bench/bench_checkpoints.py` finds: rows, with the machine, and how these are shown and kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from checkpoint_pair import Bits, Pair
from checkpoint_runs import DD, OURS, Measurement, Provider

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """What one provider took."""

    provider: str
    parameters: int
    ratios: int  # that one measurement wrote
    seconds: float  # median
    seconds_min: float
    seconds_max: float
    on_disk: float  # median
    bytes: int
    gigabytes_per_second: float
    all_ratios: float  # seconds, multiplied where a measurement wrote only some
    against_dd: float | None
    anonymous: int  # peak, above an idle process with torch
    resident: int  # peak
    bits: dict[str, int] | None  # between the ends, of fused_merge


class Growth(NamedTuple):
    """The memory of one call."""

    parameters: int
    ratios: int
    bytes: int
    seconds: float  # while being watched
    anonymous: int
    resident: int


def row_of(provider: Provider, pair: Pair, count: int, turns: Sequence[Measurement], bits: Bits | None) -> Row:
    """Return the row of a provider whose first turn was watched and the others timed."""
    first, *timed = turns
    seconds = [turn.seconds for turn in timed]
    return Row(
        provider.name,
        pair.parameters,
        provider.ratios,
        median(seconds),
        min(seconds),
        max(seconds),
        median(turn.on_disk for turn in timed),
        first.bytes,
        first.bytes / median(seconds) / 1e9,
        median(seconds) * count / provider.ratios,
        None,
        *first.memory,
        bits._asdict() if bits else None,
    )


def print_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for name, *cells in (header, *lines):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *padded]))


def print_rows(rows: Sequence[Row], count: int) -> None:
    header = ("provider", "ratios", "wall s", "min", "max", "on disk s", "GB", "GB/s", f"all {count}, s", "/ dd")
    print_table(
        (*header, "anonymous MB", "RSS MB"),
        [
            (
                row.provider,
                str(row.ratios),
                *(f"{x:.2f}" for x in (row.seconds, row.seconds_min, row.seconds_max, row.on_disk)),
                *(f"{x:.2f}" for x in (row.bytes / 1e9, row.gigabytes_per_second, row.all_ratios)),
                "-" if row.against_dd is None else f"{row.against_dd:.2f}",
                *(f"{x / 1e6:.0f}" for x in (row.anonymous, row.resident)),
            )
            for row in rows
        ],
    )


def print_growth(rows: Sequence[Growth]) -> None:
    print_table(
        ("parameters", "ratios", "GB", "s, watched", "anonymous MB", "RSS MB"),
        [
            (
                f"{row.parameters / 1e9:.3g} B",
                str(row.ratios),
                *(f"{x:.2f}" for x in (row.bytes / 1e9, row.seconds)),
                *(f"{x / 1e6:.0f}" for x in (row.anonymous, row.resident)),
            )
            for row in rows
        ],
    )


def filesystem(folder: Path) -> str:
    """Return the type of the file system that holds a folder, or would."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    types = [(left.split()[4], right.split()[0]) for left, right in mounts]
    above = {str(path) for path in (folder, *folder.parents)}
    # Of several at one place the last is the one that is seen.
    return max((len(point), i, kind) for i, (point, kind) in enumerate(types) if point in above)[2]


def machine(work: Path, mergekit: Path | None) -> dict[str, Any]:
    """Return the machine and the versions that every row names."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, cwd=ROOT
    )
    return {
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "filesystem": filesystem(work),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "safetensors", "fused_merge")},
        "mergekit": mergekit_version(mergekit),
        "commit": described.stdout.strip() or "unknown",
    }


def mergekit_version(folder: Path | None) -> str | None:
    if folder is None:
        return None
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run([folder / "python", "-c", code], capture_output=True, text=True).stdout.strip() or "unknown"


def write(folder: Path, name: str, rows: Sequence[Row | Growth], where: Mapping[str, Any], **more: Any) -> Path:
    """Write all rows, each with the machine, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', where['cpu'])}-{name}-{where['commit']}.json"
    path.write_text(json.dumps([{**where, **row._asdict(), **more} for row in rows], indent=1) + "\n")
    return path


def draw(path: Path, rows: Sequence[Row], count: int, where: Mapping[str, Any]) -> None:
    """Bars of the time that all ratios take, with the disk's own time as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    ink, ours, others = "#1f2328", "#0969da", "#8b949e"
    floor = next((row.seconds for row in rows if row.provider == DD), None)
    bars = [row for row in rows if row.provider != DD]
    names = [row.provider + (f",\none ratio x {count}" if row.ratios < count else "") for row in bars]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 1.6 + 0.55 * len(bars)), dpi=130, layout="constrained")
        axis = figure.subplots()
        times = [row.all_ratios for row in bars]
        scales = [count / row.ratios for row in bars]
        ranges = [
            [scale * (row.seconds - row.seconds_min) for row, scale in zip(bars, scales, strict=True)],
            [scale * (row.seconds_max - row.seconds) for row, scale in zip(bars, scales, strict=True)],
        ]
        colors = [ours if row.provider in OURS else others for row in bars]
        axis.barh(names, times, xerr=ranges, color=colors, height=0.62, error_kw={"ecolor": ink, "elinewidth": 1})
        for i, row in enumerate(bars):
            text = f"{row.all_ratios:.3g} s" + (f", {row.against_dd:.1f} x dd" if row.against_dd else "")
            axis.annotate(
                text, (times[i] + ranges[1][i], i), (5, 0), textcoords="offset points", va="center", color=ink
            )
        if floor is not None:
            axis.axvline(floor, color="#d1570c", ls="--", lw=1.5, label=f"dd oflag=direct: {floor:.3g} s")
            figure.legend(loc="outside lower right", frameon=False)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_xlabel("seconds: median, lines from the fastest to the slowest")
        size = f"{bars[0].parameters / 1e9:.2g} B parameters in bf16"
        place = f"{where['cpu']}, {where['cores']} cores, {where['filesystem']}"
        axis.set_title(f"{count} ratios of two checkpoints of {size}\n{place}", loc="left", fontsize=12, color=ink)
        figure.savefig(path, metadata={"Software": None})
