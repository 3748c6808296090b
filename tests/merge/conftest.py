from __future__ import annotations

import os
from pathlib import Path

import pytest
from merge_models import NAMES, SHAPES, split, tensors_of, write

from fused_merge.checkpoints import engine
from fused_merge.merge import merge, whole_tensors
from fused_merge.merge.mergekit import read_mergekit


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Wait for no disk: that files are on it is another test's."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Let small tensors cross every boundary that large ones cross."""
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
    monkeypatch.setattr(merge, "_BLOCK", 301)
    monkeypatch.setattr(whole_tensors, "_BLOCK", 64)


@pytest.fixture
def models(tmp_path):
    """Write models of given dtypes: each in files of its own kind and order."""

    def models(*dtypes, shapes=SHAPES):
        tensors = [tensors_of(i, dtype, shapes) for i, dtype in enumerate(dtypes)]
        folders = []
        for i, (name, own) in enumerate(zip(NAMES, tensors, strict=False)):
            first, *rest = own
            files = [(own,), split(own, *rest[::-1]), split(own, first), (dict(reversed(own.items())),)][i]
            folders.append(write(tmp_path / name, *files))
        return folders, tensors

    return models


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Write a file beside the empty folders base, a and b, and read it."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        Path(name).mkdir()

    def read(text):
        Path("merge.yaml").write_text(text)
        return read_mergekit("merge.yaml")

    return read
