"""numba may be absent where only a GPU is looked at; with `fused_merge[test]` it is there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("numba") else ["test_*.py"]


@pytest.fixture
def threads(monkeypatch):
    """Work in so many threads, on however few elements."""
    from fused_merge.compiled import threads

    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_WORTH", 1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
