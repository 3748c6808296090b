"""Every code block of the documentation runs, in the order of its page, and so does every example of a docstring."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import pytest
import yaml

pytest.importorskip("sybil")

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# A command, which may go on in further lines, and its output.
COMMAND = re.compile(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", flags=re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def run_doctest(text: str, namespace: dict, path: str, line: int) -> str:
    """Run all lines after `>>>` of a text; returns what was not as expected."""
    test = doctest.DocTestParser().get_doctest(text, {}, path, path, line)
    test.globs, failures = namespace, []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failures.append, clear_globs=False)
    return "".join(failures)


def run_pycon(example: Example) -> str:
    """Run a block of doctests in the namespace of its page."""
    return run_doctest(example.parsed, example.namespace, example.path, example.line)


def run_console(example: Example) -> str:
    """Run the commands of a block and compare the output of those that show one."""
    before, *commands = re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)
    assert not before, "a console block begins with `$ ` and a command"
    for text in commands:
        command, expected = COMMAND.fullmatch(text).groups()
        ended = subprocess.run(["bash", "-e", "-c", command], capture_output=True, text=True, timeout=200)
        if ended.returncode:
            return f"$ {command}\n{ended.stdout}{ended.stderr}ended with {ended.returncode}"
        if expected.strip() and not doctest.OutputChecker().check_output(expected, ended.stdout, FLAGS):
            shown = doctest.Example(command, expected)
            return f"$ {command}\n{doctest.OutputChecker().output_difference(shown, ended.stdout, FLAGS)}"
    return ""


def parse_yaml(example: Example) -> None:
    """Read a block."""
    assert yaml.safe_load(example.parsed) is not None


LANGUAGES = {"python": PythonEvaluator(), "pycon": run_pycon, "console": run_console, "yaml": parse_yaml}
SYBIL = Sybil([SkipParser(), *(CodeBlockParser(language, run) for language, run in LANGUAGES.items())])


@every_page
def test_the_code_of_a_page_runs(page, folder):
    document = SYBIL.parse(page)
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        with suppress(SkipTest):
            example.evaluate()


@every_page
def test_no_block_of_a_page_goes_unseen(page):
    text = page.read_text()
    fences = re.findall(r"^[ \t]*```(.*)$", text, flags=re.MULTILINE)
    # The fences that open a block; `text` says that it is no code.
    assert set(fences[::2]) <= {*LANGUAGES, "text"}
    assert set(fences[1::2]) <= {""}
    for skipped in re.findall(r"<!--[ -]*skip:(.*?)-->", text):
        assert re.fullmatch(r' next ".+" ', skipped), "to leave a block out takes a reason"


def docstrings():
    """Every docstring with an example: its text, and where it stands."""
    for path in sorted((ROOT / "fused_merge").rglob("*.py")):
        place = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    line = node.body[0].lineno
                    yield pytest.param(text, place, line, id=f"{place}:{line}")


@pytest.mark.parametrize(("text", "place", "line"), docstrings())
def test_the_example_of_a_docstring_runs(text, place, line, folder):
    failures = run_doctest(text, {"__name__": "__main__"}, str(place), line)
    assert not failures, failures
