"""The bar: there on a terminal, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from fused_merge.progress import progress_bar


@pytest.fixture
def shown(capsys, monkeypatch):
    def shown(*, terminal: bool, enabled: bool = True) -> str:
        # What rich takes for a terminal.
        monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
        with progress_bar("merging", 10, enabled=enabled) as advance:
            advance(4)
            advance(6)
        printed, errors = capsys.readouterr()
        assert printed == ""
        return errors

    return shown


def test_on_a_terminal(shown):
    assert "merging" in shown(terminal=True)


def test_silent_elsewhere(shown, monkeypatch):
    assert shown(terminal=False) == ""
    assert shown(terminal=True, enabled=False) == ""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(terminal=True) == ""
