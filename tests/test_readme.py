"""The README is short, its links lead somewhere, and its numbers are those that were recorded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

sys.path.insert(0, str(ROOT / "bench"))

import readme

# There is a `kernels` in that folder, and one that others look for.
sys.path.pop(0)


def test_the_numbers_are_the_recorded_ones():
    assert readme.filled(README) == README


def test_it_is_read_in_two_screens():
    assert README.count("\n") <= 130


def test_every_link_into_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
