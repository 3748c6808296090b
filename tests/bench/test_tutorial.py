"""The tutorial and the script that records its outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import tutorial

# There is a `kernels` in that folder, and one that others look for.
sys.path.pop(0)

PAGE = tutorial.PAGE.read_text()


def page_of(*blocks: str) -> str:
    return "# A page\n\n" + "\n\nProse.\n\n".join(blocks) + "\n\n![a picture](images/tutorial/front.png)\n"


def a_block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


COMMAND, PYTHON = a_block("console", "$ fused-merge env"), a_block("python", "print(1)")
SKIPPED = '<!-- skip: next "it takes minutes" -->\n' + a_block("console", "$ make demo")
HIDDEN = "<!-- invisible-code-block: python\nprint(2)\n-->"


def test_outputs_go_below_the_blocks_that_print_them():
    seen = []

    def run(language, body):
        seen.append((language, body))
        return f"printed by {language}\n\n"

    page = page_of(HIDDEN, SKIPPED, COMMAND, a_block("text", "old", "lines"), PYTHON, a_block("text"), PYTHON)
    printed = [a_block("text", f"printed by {language}") for language in ("console", "python")]
    assert tutorial.recorded(page, run) == page_of(HIDDEN, SKIPPED, COMMAND, printed[0], PYTHON, printed[1], PYTHON)
    assert seen == [("console", "$ fused-merge env\n"), ("python", "print(1)\n"), ("python", "print(1)\n")]


@pytest.mark.parametrize("before", [(), (SKIPPED,), (COMMAND, a_block("text", "its output"))])
def test_an_output_without_a_block_that_is_run_is_refused(before):
    with pytest.raises(ValueError, match="follows no block that is run"):
        tutorial.recorded(page_of(*before, a_block("text", "whose?")), lambda language, body: "")


def test_commands_run_in_order_and_python_keeps_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = "$ echo one > file\n$ cat file\nan output that the page shows\n$ echo two \\\n  three\n"
    assert tutorial.run("console", commands, {}) == "one\ntwo three\n"
    names: dict[str, object] = {}
    assert tutorial.run("python", "x = 20\nprint(x)\n", names) == "20\n"
    assert tutorial.run("python", "print(x + 1)\n", names) == "21\n"
    with pytest.raises(ValueError, match="a block of yaml"):
        tutorial.run("yaml", "a: 1\n", {})


def test_every_output_and_picture_of_the_page_is_there():
    # Each output under its block, none of them empty, and none that only a skipped block could give.
    outputs = [block["body"] for block in tutorial.BLOCK.finditer(PAGE) if block["language"] == "text"]
    assert len(outputs) > 4
    assert all(output.strip() for output in outputs)
    rewritten = tutorial.recorded(PAGE, lambda language, body: "recorded")
    assert rewritten.count("```text\nrecorded\n```") == len(outputs)
    pictures = [tutorial.PAGE.parent / picture["path"] for picture in tutorial.PICTURE.finditer(PAGE)]
    assert pictures
    assert all(picture.is_file() for picture in pictures)


def test_the_page_shows_the_scorers_as_they_are():
    scorers = (tutorial.ROOT / "bench" / "alignment_tax" / "scores.py").read_text()
    blocks = [block["body"] for block in tutorial.BLOCK.finditer(PAGE) if block["language"] == "python"]
    assert scorers in blocks
