"""Paths between models under FSDP2 and DDP: two processes do what one does, fail together, and write once."""

from __future__ import annotations

import json

import pytest
import sharded
import torch
from families import family_model
from processes import Pair
from safetensors.torch import save_file
from sharded import OPTIONS, PARTS, Network, batch_of, loss_of, points_of

KINDS = ["fsdp", "fsdp that keeps gathered weights", "ddp"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


def assert_stopped(answers, first, error, message):
    """Assert that one process raised an error of its own, and the other one the same sentence."""
    with pytest.raises(error, match=message):
        raise answers[first]
    assert type(answers[1 - first]) in (ValueError, RuntimeError)
    assert str(answers[1 - first]) == str(answers[first])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "where"), [(torch.float64, "memory"), (torch.bfloat16, "files")])
def test_each_process_holds_the_bits_of_its_part(kind, dtype, where, pair, tmp_path):
    for name, end in zip(("base", "tuned"), sharded.ends(dtype), strict=True):
        save_file(end.state_dict(), tmp_path / f"{name}.safetensors")
    empty = pair.both(sharded.sweep, kind, dtype, tmp_path if where == "files" else None)
    # Of a single element the second process has nothing to write.
    assert [any(found) for found in empty] == [False, kind != "ddp"]


@pytest.mark.parametrize("family", ["gpt-neox", "qwen3-moe"])
def test_each_process_reads_its_part_of_what_files_call_or_pack_otherwise(family, pair, tmp_path):
    folders = [tmp_path / name for name in ("base", "tuned")]
    for seed, folder in enumerate(folders):
        family_model(family, seed).save_pretrained(folder)
    pair.both(sharded.sweep_of_a_family, family, folders)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_uses_the_weights_that_were_just_written(kind, pair):
    pair.both(sharded.forward_after_moving, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"accumulate": 1}, {"accumulate": 2}, {"gradients": False, "steps": 10}], ids=str)
def test_two_processes_with_a_batch_each_are_one_with_both(kind, options, pair):
    answers = pair.both(sharded.adapt, kind, options)
    assert answers[0] == answers[1]
    ratios, history, alone, alone_history = answers[0]
    assert ratios.ratios != PARTS.ratios
    assert len(history) == options.get("steps", OPTIONS["steps"])
    # The sums, in fp64, are those of other orders, and few steps make little of that.
    assert ratios.ratios == pytest.approx(alone.ratios, rel=0, abs=1e-13)
    for one, other in zip(history, alone_history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-13)
        assert ("gradient" in one) is options.get("gradients", True)
        assert one.get("gradient", []) == pytest.approx(other.get("gradient", []), rel=1e-11, abs=1e-13)


def test_replicas_that_nothing_ties_together_do_not_wait_for_one_another(pair):
    _, ratios = pair.both(sharded.adapt_alone)
    assert ratios == pytest.approx(sharded.adapted(Network(2), [batch_of(1)]).ratios, abs=1e-13)


def test_ddp_reduces_no_gradient_meanwhile_and_all_afterwards(pair):
    assert min(pair.both(sharded.adapt_counting_reductions)) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "first", "error", "message"),
    [
        ("nan", 1, ValueError, "loss_fn returned nan; look at the batch"),
        ("batches", 0, ValueError, "batches ended after 2; pass something that can be cycled"),
        ("journal", 0, OSError, "cannot write .*journal.json"),
        ("later journal", 0, OSError, "cannot write .*journal.json"),
        ("base", 1, ValueError, "do not match: .* is torch.float64 and torch.float32"),
        *((nth, 1, OSError, "the disk went away") for nth in (5, 15, 25)),
    ],
)
def test_what_stops_one_process_stops_both(kind, fault, first, error, message, pair, tmp_path):
    (tmp_path / "file").touch()
    assert_stopped(pair(sharded.adapt_badly, kind, fault, tmp_path), first, error, message)


@pytest.mark.parametrize("kind", KINDS)
def test_the_journal_of_the_first_process_is_that_of_both(kind, pair, tmp_path):
    answers = pair.both(sharded.adapt_twice, kind, tmp_path)
    assert answers[0] == answers[1]
    found, history, whole, whole_history = answers[0]
    assert (found, history) == (whole, whole_history)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.json*")] == ["rank0/journal.json"]
    assert len(json.loads((tmp_path / "rank0/journal.json").read_text())["history"]) == OPTIONS["steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_first_processs_and_written_by_it_alone(kind, pair, tmp_path):
    # What the second process finds at its own place is no concern of the sweep.
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere/results.json").write_text("another's")
    for answer in pair(sharded.evaluate, kind, tmp_path, "stop"):
        assert isinstance(answer, KeyboardInterrupt)
    answers = pair.both(sharded.evaluate, kind, tmp_path, None)
    assert answers[0] == answers[1]
    rows, calls = answers[0]
    # The second process has learnt from the first that one ratio was finished.
    assert calls == 2
    whole, batch = Network(3), batch_of(0)
    for row, point in zip(rows, points_of([0.25, PARTS, 1.0]), strict=True):
        whole.load_state_dict(point)
        assert row.scores == {"loss": loss_of(whole, batch).item(), "own/rank": 0.0}
    assert [file.name for file in (tmp_path / "nowhere").iterdir()] == ["results.json"]
    assert (tmp_path / "nowhere/results.json").read_text() == "another's"
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["label"] for row in document["rows"]] == ["0.25", "parts", "1"]
    assert document["lower_is_better"] == ["own/rank"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "first", "error", "message"),
    [
        ("nan", 1, RuntimeError, r"scorer 'own' at ratio parts returned nan, .* \(1 of 3 ratios, and of this one"),
        # A folder that only the first process cannot write to.
        (None, 0, OSError, r"cannot write .*out/results.json"),
    ],
)
def test_what_stops_one_process_of_a_sweep_stops_both(kind, fault, first, error, message, pair, tmp_path):
    if fault is None:
        (tmp_path / "out").touch()
    assert_stopped(pair(sharded.evaluate, kind, tmp_path, fault), first, error, message)
