"""What pages of docs/explanation copy: recorded numbers, and the list of options."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "study"))

import record

from fused_merge.optim.options import MergingOptions
from fused_merge.options import options_of

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "explanation"
TAX = ROOT / "bench" / "results" / "alignment_tax"
BY_DEPTH = ROOT / "bench" / "results" / "adaptive_averaging" / "table.md"
# A number with a spread, or with two decimals or more; settings have neither.
MEASURED = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+|\d+\.\d\d+")


def table_of(record: Path, heading: str) -> str:
    """Return the first table below a heading of a record."""
    below = record.read_text().split(f"## {heading}\n\n")[1]
    return below[below.index("|") :].split("\n\n")[0]


def test_the_tables_are_the_recorded_ones():
    page = (PAGES / "does-it-help.md").read_text()
    models, hypervolumes = table_of(TAX / "quick.md", "Models"), table_of(BY_DEPTH, "Hypervolumes")
    assert [models.count("\n") > 8, hypervolumes.count("\n") > 6] == [True, True]
    assert [models in page, hypervolumes in page] == [True, True]
    # The page shows some of the comparisons of all seeds.
    recorded = table_of(TAX / "full.md", "Paired differences at equal reward").splitlines()
    shown = page.split(recorded[0])[1].strip().split("\n\n")[0].splitlines()
    assert len(shown) > 6
    assert [line for line in shown if line not in recorded] == []


def test_the_measured_numbers_are_recorded_ones():
    for_all, by_depth = (PAGES / "does-it-help.md").read_text().split("## A ratio for each part")
    for text, records in ((for_all, [TAX / "quick.md", TAX / "full.md"]), (by_depth, [BY_DEPTH])):
        recorded = {number for record in records for number in MEASURED.findall(record.read_text())}
        found = set(MEASURED.findall(" ".join(text.split())))
        assert len(found) > 20
        assert found - recorded == set()


def test_the_page_of_the_study_shows_its_record():
    page, table = record.PAGE.read_text(), (record.RECORD / "table.md").read_text()
    assert record.filled(page, table) == page
    # What the text around it says is taken from there too.
    prose = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    found = set(MEASURED.findall(" ".join(prose.split())))
    assert len(found) > 10
    assert found - set(MEASURED.findall(table)) == set()


def test_the_page_of_the_equations_lists_every_option():
    listed = re.findall(r"^\| `(\w+)` \|", (PAGES / "equations.md").read_text(), flags=re.MULTILINE)
    assert options_of(MergingOptions).keys() - listed == set()
