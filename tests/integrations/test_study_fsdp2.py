"""The study sharded by FSDP2 over two processes, as `accelerate launch` runs it, and in one."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import small_study
from processes import Ranks
from worlds import weights_in

ALGORITHMS = ("dpo", "rft")
DURING = ("LoRA", "OnDARE", "OnTIES", "OnProj, update", "OnDARE, K = 8")
CONTENDERS = ("AdamW", "early stop", "weight EMA", "BEMA", *DURING)
# Two processes add up gradients in another order. That is a matter of the last bits, except in elements whose gradient
# is nothing but rounding: AdamW divides by it, and they may step the other way. A wrong step of one tensor shows more.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_study.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data):
    """The folder and the points of two processes."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), 2, ready=small_study.ready, seconds=600)
    out = tmp_path_factory.mktemp("two")
    try:
        first, second = ranks.all(small_study.sharded, small_study.study, out, data, ALGORITHMS, CONTENDERS)
    finally:
        ranks.stop()
    assert first == second
    return out, first


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The folder of one process."""
    out = tmp_path_factory.mktemp("one")
    small_study.prepare(out, data)
    return out


@pytest.mark.timeout(1200)
def test_they_make_the_start_of_one(sharded, alone):
    out, _ = sharded
    base, start = (weights_in(alone / "seed0" / name) for name in ("base", "sft"))
    for name, of in (("sft", base), ("reward", start)):
        here, there = (weights_in(folder / "seed0" / name) for folder in (alone, out))
        assert here.keys() == there.keys()
        for key in here.keys() & of.keys():
            assert (here[key] - there[key]).norm() <= TOLERANCE * (here[key] - of[key]).norm(), (name, key)


@pytest.mark.timeout(1200)
def test_they_measure_what_one_does(sharded, data, tmp_path):
    out, there = sharded
    shutil.copytree(out / "seed0", tmp_path / "seed0")  # from the same start
    here = small_study.study(tmp_path, data, ALGORITHMS, CONTENDERS)
    here = [point for point in here if point.family != "BEMA"]  # which TRL makes in one process only
    assert len(there) > 2 * len(CONTENDERS)
    for mine, theirs in zip(here, there, strict=True):
        assert (mine.algorithm, mine.family, mine.setting) == (theirs.algorithm, theirs.family, theirs.setting)
        for name in ("reward", "exact_match", "perplexity", "along_tau", "cosine"):
            expected = pytest.approx(getattr(mine, name), rel=TOLERANCE, abs=TOLERANCE)
            assert getattr(theirs, name) == expected, (mine.algorithm, mine.family, name)
