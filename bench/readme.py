"""The numbers of the README, from the rows that benchmarks and experiments have recorded.

python bench/readme.py            prints them
python bench/readme.py --write    puts them between the markers of README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "alignment_tax"))
sys.path.insert(0, str(Path(__file__).parent / "study"))

from comparisons import OPPONENTS, counted, tax_at_equal_reward, units_of
from plan import CONTENDERS, FULL, Point
from report import TAXES, Tax
from roofline import replace_between_markers
from step_cases import FUSED, REAL
from tables import RESULTS as CPU
from tables import ROOT, over_runs

README = ROOT / "README.md"
RECORDS = ROOT / "bench" / "results"
# Eleven ratios of a pair of 0.5 B: the last run in which every provider was measured.
CHECKPOINTS = RECORDS / "checkpoints" / "AMD_EPYC-0.5B-11-615a061.json"
TAX = RECORDS / "alignment_tax" / "full.json"
DEPTH = RECORDS / "adaptive_averaging" / "table.json"
STUDY = RECORDS / "study" / "table.json"

# A run of the experiment that was trained too far, how far back it is taken, and against whom merging is held.
TOO_FAR, BACK = "adamw-lr4e-4", 0.5
SAME_START, EVERYTHING = "AdamW and its interpolations", "all of these"

STEPS = {
    "OnDARE with all kept": "ondare, p = 1",
    "OnDARE with 1 % kept": "ondare, p = 0.01",
    "OnTIES with 1 % kept": "onties, p = 0.01",
}

Row = dict[str, Any]


def cost_of_a_step() -> str:
    """Return what steps cost over torch's fused AdamW, on a model's own list of tensors."""
    rows = [row for file in sorted(CPU.glob("*.json")) for row in json.loads(file.read_text())]
    found = {row["provider"]: row for row in over_runs(rows) if row["case"] == REAL and row["dtype"] == "float32"}
    ours = [f"{name} {found[key]['ratio']:.1f}" for name, key in STEPS.items()]
    published = [f"{found[f'published {name}, p = 0.01']['ratio']:.0f}" for name in ("ondare", "onties")]
    shape, device = found[FUSED], found[FUSED]["device"]
    return (
        f"- **A step costs little more than AdamW's.** As multiples of `torch.optim.AdamW(fused=True)` on a CPU: "
        f"{', '.join(ours)}; the published algorithms, operation by operation, {' and '.join(published)} "
        f"({shape['parameters'] / 1e6:.1f} M parameters in the shapes of {REAL}, {device}; `make bench`)."
    )


def eleven_ratios() -> str:
    """Return what many ratios of two checkpoints take, ours and others'."""
    rows = {row["provider"]: row for row in json.loads(CHECKPOINTS.read_text())}
    own = rows["fused_merge call"]
    taken = {
        name: f"{rows[key]['all_ratios']:.0f} s and {rows[key]['anonymous'] / 1e6:.0f} MB"
        for name, key in {"load, `torch.lerp`, save": "naive torch", "mergekit": "mergekit-multi"}.items()
    }
    others = ", ".join(f"{name} {what}" for name, what in taken.items())
    return (
        f"- **Many ratios in one read.** {own['ratios']} ratios of two models of {own['parameters'] / 1e9:.1f} B, "
        f"{own['bytes'] / 1e9:.1f} GB written: {own['all_ratios']:.1f} s and {own['anonymous'] / 1e6:.0f} MB of "
        f"memory; {others} (`bench/bench_checkpoints.py`)."
    )


def bullets() -> str:
    """Return what the library is, in three points."""
    bits = (
        "- **The same bits everywhere.** Plain PyTorch that reads like the papers' equations is the truth; Triton "
        "kernels, compiled code for CPUs and sharded runs give its bits, in parameters and states, at every run of the "
        "tests."
    )
    return "\n".join((bits, cost_of_a_step(), eleven_ratios()))


def account() -> str:
    """Return what the two experiments have found, in five lines."""
    record = json.loads(TAX.read_text())
    points: Sequence[Row] = record["points"]

    def mean(field: str, **wanted: Any) -> float:
        return fmean(point[field] for point in points if all(point[key] == value for key, value in wanted.items()))

    def compared(run: str, against: str) -> tuple[str, str]:
        """Return the difference of exact match and of perplexity, as the report says them."""
        start = f"{run} against {against}, at equal reward: "
        (sentence,) = (each for each in record["summary"] if each.startswith(start))
        found = re.findall(r"[+-][\d.]+ ± [\d.]+ \(better in \d+ of \d+\)", sentence)
        return found[0], found[1]

    start = {"role": "checkpoint", "run": "sft"}
    path = {"role": "interpolation", "run": TOO_FAR, "start": "sft", "value": BACK}
    trained = {"run": TOO_FAR, "role": "adamw", "start": "sft"}
    same, everything = ({run: compared(run, x) for run in ("onties", "ondare")} for x in (SAME_START, EVERYTHING))
    depth = json.loads(DEPTH.read_text())["hypervolumes"]["exact_match"]
    searched = {name: own for name, own in depth.items() if name.startswith("adaptive")}
    better = sum(a > b for own in searched.values() for a, b in zip(own, depth["uniform"], strict=True))
    return "\n".join(
        (
            "Measured on a model of 0.44 M parameters that is trained for real, base, SFT and TRL's DPO, over "
            f"{len(record['setting']['seeds'])} seeds with {len(record['setting']['orders'])} data orders each "
            "(`bench/alignment_tax/run.py`):\n",
            f"- Preference training costs a lot: AdamW takes the reward from {mean('reward', **start):.2f} to "
            f"{mean('reward', **trained):.2f}, and exact match from {mean('exact_match', **start):.2f} to "
            f"{mean('exact_match', **trained):.2f}.",
            f"- The path back repairs that for nothing: at ratio {BACK}, reward {mean('reward', **path):.2f} and exact "
            f"match {mean('exact_match', **path):.2f}.",
            "- At equal reward, against AdamW and its path, merging keeps more exact match: OnTIES "
            f"{same['onties'][0]}, OnDARE {same['ondare'][0]}; both pay in perplexity, {same['onties'][1]} and "
            f"{same['ondare'][1]}.",
            "- Against all that needs no new optimizer (AdamW from the full SFT, c·tau added afterwards) nothing is "
            f"left: OnTIES {everything['onties'][0]}, OnDARE {everything['ondare'][0]}.",
            f"- Ratios by depth, searched as in the paper, beat one ratio for all in {better} of "
            f"{sum(map(len, searched.values()))} comparisons (`bench/adaptive_averaging/run.py`).",
        )
    )


def study() -> str:
    """Return what the study has found, in one line."""
    points = [Point(**{**entry, "ratios": tuple(entry["ratios"])}) for entry in json.loads(STUDY.read_text())["points"]]
    units = units_of(points, FULL)

    def found(opponents: str, tax: Tax) -> str:
        compared = {name: tax_at_equal_reward(units, name, OPPONENTS[opponents], tax) for name in ("OnTIES", "OnDARE")}
        return ", ".join(f"{name} {counted(changes, tax.digits)}" for name, changes in compared.items()).replace(
            "*", ""
        )

    exact, perplexity = TAXES
    path, rivals = OPPONENTS
    others = sum(contender.group == "rival" for contender in CONTENDERS.values())
    return (
        f"- With five algorithms (DPO, IPO, KTO, GRPO, rejection sampling), better in so many of {len(units)} runs "
        f"(`bench/study/run.py`): exact match against {path} {found(path, exact)}; against the front of {others} "
        f"rivals, replay of SFT data among them, {found(rivals, exact)}; perplexity against {path} "
        f"{found(path, perplexity)}."
    )


PARTS = {"numbers": bullets, "results": lambda: f"{account()}\n{study()}"}


def filled(page: str) -> str:
    """Return a page with the numbers between its markers."""
    for name, text in PARTS.items():
        lines = text().splitlines()
        wrapped = [textwrap.fill(line, 120, subsequent_indent="  " * line.startswith("- ")) for line in lines]
        page = replace_between_markers(page, "\n".join(wrapped), (f"<!-- {name}: begin -->", f"<!-- {name}: end -->"))
    return page


def main() -> None:
    """Print or write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them between the markers of README.md")
    if parser.parse_args().write:
        README.write_text(filled(README.read_text()))
    else:
        print("\n\n".join(text() for text in PARTS.values()))


if __name__ == "__main__":
    main()
