"""Keep a finished run of the study: its files in bench/results/study, its summary and claims in the page of the docs.

python bench/study/record.py out/study
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from roofline import replace_between_markers

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench" / "results" / "study"
PAGE = ROOT / "docs" / "explanation" / "study.md"
# What the page shows of the table: sections by the beginning of their heading, and the markers they stand between.
SHOWN = {
    "summary": ("Summary: exact match", "Summary: perplexity"),
    "claims": ("Claims",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of a finished run")
    out = parser.parse_args().out
    RECORD.mkdir(exist_ok=True)
    for file in (out / "table.md", out / "table.json", *sorted(out.glob("fronts-*.png"))):
        shutil.copy(file, RECORD)
    PAGE.write_text(filled(PAGE.read_text(), (RECORD / "table.md").read_text()))


def filled(page: str, table: str) -> str:
    """The page with what it shows of the recorded table."""
    sections = {part.partition("\n\n")[0]: part.partition("\n\n")[2].strip() for part in table.split("\n## ")[1:]}
    for marker, headings in SHOWN.items():
        found = [(title, text) for each in headings for title, text in sections.items() if title.startswith(each)]
        text = "\n\n".join(text if len(found) == 1 else f"**{title}.** {text}" for title, text in found)
        page = replace_between_markers(page, f"\n{text}\n", (f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"))
    return page


if __name__ == "__main__":
    main()
