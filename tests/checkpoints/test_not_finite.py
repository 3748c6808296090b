"""Elements that are not finite are counted by their cause, said once, and recorded in each output."""

from __future__ import annotations

import pytest
import torch
from folders import load, manifest_of
from jobs import DeadError, patched
from safetensors.torch import save_file

import fused_merge as fm
from fused_merge.checkpoints import job

NAN, INF = float("nan"), float("inf")
# Of the output at 0.3 of `pair`, in fp16.
COUNTS = {"weight": {"inputs": 2, "overflow": 0}, "head": {"inputs": 0, "overflow": 1}}


@pytest.fixture
def pair(tmp_path):
    """Two models with a NaN in one and an infinity in the other, an element beyond fp16, and a mask of one alone."""
    generator = torch.Generator().manual_seed(0)
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for path, odd, row in zip(paths, (NAN, -INF), (0, 999), strict=True):
        # Pieces of several threads.
        weight, head = (torch.randn(1000, 1100, generator=generator) for _ in range(2))
        weight[row, 7] = odd
        head[500, 500] = 1e5
        own = {} if row else {"mask": torch.full((3, 3), -INF).triu(1)}
        save_file({"weight": weight, "norm": torch.ones(9), "head": head, "steps": torch.tensor([1]), **own}, path)
    return paths


def not_finite(folder):
    return manifest_of(folder).get("not_finite")


def test_each_output_says_how_many_elements_and_why(pair, tmp_path, caplog):
    low, half, high = fm.interpolate_checkpoints(
        *pair, [0.0, 0.3, 1.0], tmp_path / "line", dtype="float16", unmatched="copy", max_shard_size="3MB", threads=3
    )
    assert not_finite(half) == COUNTS
    assert not_finite(low) == not_finite(high) == {"head": COUNTS["head"]}
    for name, own in COUNTS.items():
        assert sum(own.values()) == int((~load(half)[name].isfinite()).sum())
    (record,) = caplog.records
    weight = "2 of 'weight', where an input is NaN or infinite (check the checkpoints)"
    head = "1 of 'head' in torch.float16, which the result is too large for (write dtype='float32')"
    assert record.getMessage() == (
        f"{low}, {half}, {high}: written with elements that are not finite: {weight}; {head}"
    )
    assert f"It holds elements that are not finite: {weight}; {head}." in (half / "README.md").read_text()


@pytest.mark.parametrize("ratios", [[0.5, 0.9], [0.0, 0.5, 1.0], [1.0, 0.2]])
def test_nothing_between_finite_ends_is_missed_and_copies_are_no_fault(ratios, pair, tmp_path, caplog):
    folders = fm.interpolate_checkpoints(*pair, ratios, tmp_path / "line", unmatched="copy")
    for ratio, folder in zip(ratios, folders, strict=True):
        assert not_finite(folder) == (None if ratio in (0.0, 1.0) else {"weight": {"inputs": 2, "overflow": 0}})
    assert len(caplog.records) == 1


def test_an_extrapolation_that_overflows_is_seen_at_the_farthest_ratio(tmp_path):
    ends = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for end, value in zip(ends, (1e4, 4e4), strict=True):
        save_file({"w": torch.full((5,), value).half()}, end)
    inside, outside = fm.interpolate_checkpoints(*ends, [0.5, 3.0], tmp_path / "line")
    assert (not_finite(inside), not_finite(outside)) == (None, {"w": {"inputs": 0, "overflow": 5}})


def test_a_sum_that_overflows_is_no_fault(tmp_path, caplog):
    ends = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for end in ends:
        save_file({"half": torch.full((400,), 6e4).half(), "wide": torch.full((400,), 3e38)}, end)
    (folder,) = fm.interpolate_checkpoints(*ends, [0.5], tmp_path / "line")
    assert (not_finite(folder), caplog.records) == (None, [])


def test_a_merge_counts_too_and_a_killed_job_remembers(pair, tmp_path, caplog):
    def merge():
        options = {"dtype": "float16", "unmatched": "drop", "max_shard_size": "3MB"}
        return fm.merge_checkpoints(pair[0], {pair[1]: 0.3}, method="task_arithmetic", out=tmp_path / "out", **options)

    def die_at_the_last(original, file, *arguments):
        if file.name.startswith("model-00002"):
            raise DeadError
        return original(file, *arguments)

    with patched(job, "write_file", die_at_the_last), pytest.raises(DeadError):
        merge()
    assert caplog.records == []
    assert not_finite(merge()) == COUNTS
    assert "2 of 'weight', where an input is NaN" in caplog.text
