"""Run the blocks of docs/tutorial.md on the demo's models, and write what they print into the page.

    python bench/alignment_tax/run.py --quick    # trains the models, once
    python bench/tutorial.py

A `text` block holds the output of the block above it; a picture `images/tutorial/NAME.png` is `out/NAME/pareto.png`.
Blocks behind `skip: next "why"` are not run, nor are those in comments, which prepare the stand-ins of CI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
TRAINED = ROOT / "out" / "alignment_tax"

BLOCK = re.compile(
    r'(?P<skip><!-- skip: next "[^"]*" -->\n+)?^```(?P<language>\w+)\n(?P<body>.*?)^```$', re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)", re.MULTILINE)  # it may go on in further lines
PICTURE = re.compile(r"\((?P<path>images/tutorial/(?P<name>[\w-]+)\.png)\)")


def main() -> None:
    if not (TRAINED / "table.md").is_file():
        raise SystemExit(f"{TRAINED} has no finished run; train the models with bench/alignment_tax/run.py --quick")
    page = PAGE.read_text()
    # DeepSpeed, where it is installed, prints that it finds no GPU unless it is told.
    os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    with TemporaryDirectory() as folder:
        # What the commands write is not the repository's: only what they read is there.
        os.chdir(folder)
        Path("out").mkdir()
        Path("out", TRAINED.name).symlink_to(TRAINED)
        Path("bench").symlink_to(ROOT / "bench")
        namespace: dict[str, object] = {}
        page = recorded(page, lambda language, body: run(language, body, namespace))
        for picture in PICTURE.finditer(page):
            shutil.copy(Path("out", picture["name"], "pareto.png"), PAGE.parent / picture["path"])
        os.chdir(ROOT)
    PAGE.write_text(page)


def recorded(page: str, run: Callable[[str, str], str]) -> str:
    """Return the page with what `run(language, body)` returns of each block in the `text` block that follows it."""
    output: str | None = None

    def fill(block: re.Match[str]) -> str:
        nonlocal output
        if block["language"] != "text":
            output = None if block["skip"] else run(block["language"], block["body"])
            return block[0]
        if output is None:
            raise ValueError(f"this text block follows no block that is run:\n{block[0]}")
        text, output = output, None
        return f"```text\n{text.rstrip()}\n```"

    return BLOCK.sub(fill, page)


def run(language: str, body: str, namespace: dict[str, object]) -> str:
    """Run the commands or the Python of a block, and return its standard output."""
    began = time.perf_counter()
    if language == "python":
        with redirect_stdout(StringIO()) as printed:
            exec(body, namespace)
        output = printed.getvalue()
    elif language == "console":
        commands = COMMAND.findall(body)
        output = "".join(subprocess.check_output(command, shell=True, text=True) for command in commands)
    else:
        raise ValueError(f"the tutorial has a block of {language}, which nothing here runs")
    print(f"{time.perf_counter() - began:5.1f} s  {body.splitlines()[0]}", file=sys.stderr)
    return output


if __name__ == "__main__":
    main()
