"""Two pairs of checkpoints, and what a job makes of them that nothing happens to."""

from __future__ import annotations

import shutil

import pytest
from jobs import RATIOS, contents, write_model

from fused_merge.checkpoints.interpolate import interpolate_checkpoints


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return write_model(folder / "base", 0, 40), write_model(folder / "tuned", 1, 40)


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """Files of two and three pieces."""
    folder = tmp_path_factory.mktemp("big")
    return write_model(folder / "base", 0, 5000), write_model(folder / "tuned", 1, 5000)


@pytest.fixture(scope="session")
def expected(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    interpolate_checkpoints(*models, RATIOS, out, threads=1)
    return contents(out)


@pytest.fixture(scope="session")
def expected_big(big, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected")
    interpolate_checkpoints(*big, RATIOS, out, threads=1)
    return contents(out)


@pytest.fixture
def own(models, tmp_path):
    """Copies of the models, to be changed."""
    return tuple(shutil.copytree(model, tmp_path / model.name) for model in models)
