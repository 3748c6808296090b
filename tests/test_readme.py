"""The README is short, and its links lead somewhere; its numbers are looked at beside the script that writes them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_read_in_two_screens():
    assert README.count("\n") <= 130


def test_every_link_into_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
