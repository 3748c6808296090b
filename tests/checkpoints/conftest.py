"""Two pairs of checkpoints, and what a job makes of them that nothing happens to."""

from __future__ import annotations

import shutil

import pytest
from jobs import RATIOS, contents, write_model

from fused_merge.checkpoints.interpolate import interpolate_checkpoints


def pair(folder, rows):
    return write_model(folder / "base", 0, rows), write_model(folder / "tuned", 1, rows)


def line(models, out):
    interpolate_checkpoints(*models, RATIOS, out, threads=1)
    return contents(out)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("small"), 40)


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """Files of two and three pieces."""
    return pair(tmp_path_factory.mktemp("big"), 5000)


@pytest.fixture(scope="session")
def expected(models, tmp_path_factory):
    return line(models, tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="session")
def expected_big(big, tmp_path_factory):
    return line(big, tmp_path_factory.mktemp("expected"))


@pytest.fixture
def finish(models, expected, tmp_path):
    """Run the job to its end, which is always the same."""

    def finish(out=tmp_path, **options):
        interpolate_checkpoints(*models, RATIOS, out, **options)
        assert contents(out) == expected

    return finish


@pytest.fixture
def own(models, tmp_path):
    """Copies of the models, to be changed."""
    return tuple(shutil.copytree(model, tmp_path / model.name) for model in models)
