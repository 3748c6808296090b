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
from fused_merge import functional

SITE = Path(__file__).parents[2] / "out/site"
PUBLIC = [
    f"{module.__name__}.{name}"
    for module in (fm, functional)
    for name in module.__all__
    if callable(getattr(module, name))
]
every_name = pytest.mark.parametrize("name", PUBLIC)


def object_of(name):
    module, _, own = name.rpartition(".")
    return getattr({"fused_merge": fm, "fused_merge.functional": functional}[module], own)


@pytest.fixture(scope="module")
def inventory():
    with (SITE / "objects.inv").open("rb") as file:
        return Inventory.parse_sphinx(file)


@every_name
def test_a_public_name_stands_in_the_reference_with_all_its_parameters(name, inventory):
    page = SITE / inventory[name].uri.partition("#")[0]
    text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))
    words = set(re.findall(r"\w+", text))
    assert inspect.signature(object_of(name)).parameters.keys() <= words
    assert "{options}" not in text


@every_name
def test_a_public_name_has_an_example(name):
    text = inspect.cleandoc(object_of(name).__doc__ or "")
    assert re.search(r"^Examples?:\n(?:.*\n)*? +>>> ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("word", ["FSDP2", "bf16", "mergekit"])
def test_the_search_knows_a_word(word):
    index = json.loads((SITE / "search/search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"] if re.search(rf"\b{word}\b", entry["title"] + entry["text"])}
    assert found
