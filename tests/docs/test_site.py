"""The site that `make docs` has just built: every public name is explained, and people find what they look for."""

from __future__ import annotations

import html
import inspect
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings")

from mkdocstrings import Inventory

import fused_merge as fm

SITE = Path(__file__).parents[2] / "out/site"
PUBLIC = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in (fm, fm.functional)
    for name in module.__all__
    if callable(getattr(module, name))
]


@pytest.fixture(scope="module")
def inventory():
    with (SITE / "objects.inv").open("rb") as file:
        return Inventory.parse_sphinx(file)


@pytest.mark.parametrize("public", PUBLIC)
def test_a_public_name_stands_in_the_reference_with_all_its_parameters(public, inventory):
    page = SITE / inventory[f"{public.__module__}.{public.__qualname__}"].uri.partition("#")[0]
    text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))
    assert inspect.signature(public).parameters.keys() <= set(re.findall(r"\w+", text))
    assert "{options}" not in text


@pytest.mark.parametrize("public", PUBLIC)
def test_a_public_name_has_an_example(public):
    text = inspect.cleandoc(public.__doc__ or "")
    assert re.search(r"^Example:\n(.*\n)*? +>>> ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("word", ["FSDP2", "bf16", "mergekit"])
def test_the_search_knows_a_word(word):
    index = json.loads((SITE / "search/search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"] if re.search(rf"\b{word}\b", entry["title"] + entry["text"])}
    assert found
