"""The bar: there on a terminal, and nowhere else."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fused_merge.progress import progress_bar


@pytest.fixture
def shown(capsys, monkeypatch):
    """Return what stands on standard error after some steps."""

    def shown(steps=(4_000_000, 6_000_000), total=10_000_000, *, terminal=True, threads=1, **options) -> str:
        # What rich takes for a terminal.
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
        monkeypatch.setenv("COLUMNS", "80")
        bar = progress_bar("saving the reference delta", total, **options)
        with bar as advance, ThreadPoolExecutor(threads) as pool:
            list(pool.map(advance, steps))
        printed, errors = capsys.readouterr()
        assert printed == ""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", errors)

    return shown


def test_on_a_terminal(shown):
    # How much of how much, how fast, time left and time spent.
    assert re.search(r"saving the reference delta ━+ 10.0/10.0 MB +[\d.]+ [kMGT]B/s 0:00:00 0:00:0\d", shown())
    # A line of eighty columns holds every number.
    assert "10.0/30.0 GB" in shown([10_000_000_000], 30_000_000_000)


def test_many_threads_may_advance_it(shown):
    assert "2.0/2.0 kB" in shown([1] * 2_000, 2_000, threads=8)


def test_silent_elsewhere(shown, monkeypatch):
    assert shown(terminal=False) == ""
    assert shown(enabled=False) == ""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown() == ""


def test_it_may_count_something_else_than_bytes(shown):
    assert re.search(r"saving the reference delta .* 3/11 ratios .*0:00:0\d", shown([3], 11, unit="ratios"))
