"""The rows of `make bench` and the tables made of them.

    python bench/tables.py --record out/bench.json out/scaling.json   keep what a run has found
    python bench/tables.py --write docs/explanation/speed.md          every table, between the markers of a page
    python bench/tables.py --plot docs/explanation/scaling.png        time and memory over size

Rows go to `bench/results/cpu/<processor>.json`, each with the number of its run. The last three runs of one commit,
with one set of versions, are kept; a table has the median over runs and their range.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from roofline import meets, number, replace_between_markers, word

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu"
MARKERS = "<!-- bench: begin -->", "<!-- bench: end -->"
RUNS = 3

SCALING = "scaling"
# Of the time per parameter at the slowest size over that at the fastest, and of MB above the tensors.
FLAT, MEMORY = 1.15, 64.0

NO_ROWS = "No rows yet: `make bench` writes them."

Row = dict[str, Any]


# --- recording


def git(*command: str) -> str:
    """Return what git says, or nothing."""
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def commit() -> str:
    """Return the commit; a dirty one if what runs differs from it: rows and pages do not run."""
    # Not --dirty: the rows of a first run would make another commit of the second.
    changed = git("status", "--porcelain", "--", "fused_merge", "kernels", "bench/*.py", "constraints.txt")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def version(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Row:
    """Return what every row says of its run."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return {
        "device": f"{model[1].strip() if model else platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numba", "numpy")},
        "commit": commit(),
    }


def rows_in(file: Path) -> list[Row]:
    """Return the rows of a script, or those in the `extra_info` of pytest-benchmark's JSON."""
    found = json.loads(file.read_text())
    return found if isinstance(found, list) else [each["extra_info"] for each in found["benchmarks"]]


def add_run(kept: Sequence[Row], found: Sequence[Row], where: Row) -> list[Row]:
    """Return the rows of a run after those of the last runs like it, counted from 1."""
    alike = [row for row in kept if all(row[key] == value for key, value in where.items())]
    earlier = sorted({row["run"] for row in alike})[-(RUNS - 1) :]
    again = [row | {"run": earlier.index(row["run"]) + 1} for row in alike if row["run"] in earlier]
    return [*again, *({**where, "run": len(earlier) + 1, **row} for row in found)]


def record(files: Iterable[Path], folder: Path = RESULTS) -> Path:
    """Keep the rows of a run, and return where."""
    where = machine()
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', where['device'])}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    rows = add_run(kept, [row for file in files for row in rows_in(file)], where)
    folder.mkdir(parents=True, exist_ok=True)
    # A line for each row.
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return path


# --- tables


def over_runs(rows: Iterable[Row]) -> list[Row]:
    """Return a row for each thing measured: medians over runs, and their ratios' range as `least` and `most`."""
    runs: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        runs[tuple(row[key] for key in ("device", "provider", "case", "dtype", "parameters"))].append(row)
    measured = ("ms", "gigabytes_per_second", "baseline_ms", "ratio", "ratio_low", "ratio_high", "processor_ratio")
    combined = []
    for group in runs.values():
        ratios = [row["ratio"] for row in group]
        medians = {key: median(row[key] for row in group) for key in measured}
        memories = [row["memory"] for row in group if row["memory"] is not None]
        combined.append(
            {**group[-1], **medians, "memory": max(memories, default=None), "least": min(ratios), "most": max(ratios)}
        )
    return combined


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(cells)} |" for cells in lines)]


def per_parameter(row: Row, which: str = "ms") -> float:
    """Return nanoseconds per parameter, of a row or with `"baseline_ms"` of its baseline."""
    return 1e6 * row[which] / row["parameters"]


def verdict(value: float | None, target: float | None, digits: int = 2) -> tuple[str, str]:
    """Return a target and whether it is met, as tables show them."""
    return number(target, digits), word(meets(value, target))


def case_table(rows: Sequence[Row]) -> list[str]:
    """Return the table of a case."""
    header = ["", "dtype", "ms", "GB/s", "bytes", "ns per parameter", "against", "ratio", "quartiles", "over runs"]
    header += ["processor time", "target", "met"]
    return markdown(
        header,
        [
            (
                row["provider"],
                row["dtype"],
                number(row["ms"], 3),
                number(row["gigabytes_per_second"], 1),
                number(row["bytes_per_parameter"], 1),
                number(per_parameter(row)),
                row["baseline"],
                number(row["ratio"]),
                f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                f"{row['least']:.2f} to {row['most']:.2f}",
                number(row["processor_ratio"]),
                *verdict(row["ratio"], row["target"]),
            )
            for row in rows
        ],
    )


def scaling_tables(rows: Sequence[Row]) -> list[str]:
    """Return the time per parameter and the memory at every size, and whether they grow."""
    sizes = sorted({row["parameters"] for row in rows})
    by_name: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        by_name[row["provider"]][row["parameters"]] = row

    lines, verdicts = [], []
    for name, found in by_name.items():
        ordered = [found[size] for size in sizes]
        baseline = ordered[0]["baseline"]
        times, memory = [per_parameter(row) for row in ordered], [row["memory"] for row in ordered]
        quantities = {
            "ns per parameter": (times, 2),
            f"{baseline} beside it": ([per_parameter(row, "baseline_ms") for row in ordered], 2),
            f"ratio to {baseline}": ([row["ratio"] for row in ordered], 2),
            "MB above the tensors": (memory, 0),
        }
        for what, (values, digits) in quantities.items():
            lines.append((f"{name}, {what}", *(number(value, digits) for value in values)))
        growth, most = max(times) / min(times), max(memory)
        verdicts.append((name, number(growth), *verdict(growth, FLAT), number(most, 0), *verdict(most, MEMORY, 0)))
    header = ("", "slowest over fastest", "target", "met", "most MB above the tensors", "target", "met")
    return [
        *markdown(("", *(f"{size / 1e6:.3g} M" for size in sizes)), lines),
        "",
        *markdown(header, verdicts),
        "",
        "![ns per parameter and MB above the tensors, over the size](scaling.png)",
    ]


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each device."""
    devices: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        devices[row["device"]].append(row)
    return devices


def heading(rows: Sequence[Row]) -> str:
    """Return what all rows of a device share."""
    last = rows[-1]
    versions = ", ".join(f"{name} {last[name]}" for name in ("python", "torch", "numba", "numpy") if last[name])
    return f"{versions}; commit {last['commit']}; runs: {len({row['run'] for row in rows})}."


def report(rows: Iterable[Row]) -> str:
    """Return every table, of every device."""
    lines = []
    for device, found in by_device(rows).items():
        lines += [f"### {device}", "", heading(found), ""]
        cases: dict[str, list[Row]] = defaultdict(list)
        for row in over_runs(found):
            cases[row["case"]].append(row)
        for case, own in cases.items():
            lines += [f"#### {case}", "", *(scaling_tables(own) if case == SCALING else case_table(own)), ""]
    return "\n".join(lines) or NO_ROWS


def draw(rows: Iterable[Row], path: Path) -> None:
    """Draw the time per parameter and the memory over the size, with the targets as bands."""
    import matplotlib
    from matplotlib.figure import Figure

    lines: dict[str, list[Row]] = defaultdict(list)
    for row in over_runs(rows):
        if row["case"] == SCALING:
            lines[f"{row['provider']}\n{row['device']}"].append(row)
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
        times, memories = figure.subplots(1, 2)
        for name, own in lines.items():
            own.sort(key=lambda row: row["parameters"])
            sizes = [row["parameters"] for row in own]
            fastest = min(map(per_parameter, own))
            (line,) = times.plot(sizes, list(map(per_parameter, own)), "o-", label=name)
            times.axhspan(fastest, FLAT * fastest, color=line.get_color(), alpha=0.12, lw=0)
            memories.plot(sizes, [row["memory"] for row in own], "o-")
        memories.axhspan(0, MEMORY, color="#1a7f37", alpha=0.12, lw=0)
        times.set(title="ns per parameter; bands: fastest to 1.15 times that", xscale="log", xlabel="parameters")
        memories.set(title="MB above the tensors; band: at most 64", xscale="log", xlabel="parameters")
        for axis in (times, memories):
            axis.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Do what the arguments say, in the order of the docstring; without any, print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, nargs="+", metavar="FILE", help="rows of a run to keep")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put every table between the markers of a page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory over size")
    arguments = parser.parse_args()
    if arguments.record:
        print(f"rows: {record(arguments.record)}")
    rows = [row for file in sorted(RESULTS.glob("*.json")) for row in json.loads(file.read_text())]
    if arguments.write:
        page = arguments.write
        page.write_text(replace_between_markers(page.read_text(), report(rows), MARKERS))
    if arguments.plot:
        draw(rows, arguments.plot)
    if not any(vars(arguments).values()):
        print(report(rows))


if __name__ == "__main__":
    main()
