"""The parts of the demo that decide what its numbers mean: reward, answers, data, fronts."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "alignment_tax"))

import data
import report


@pytest.mark.parametrize(
    ("completion", "points"),
    [
        ("sure! one two three four :)", 4.0),
        ("sure! one two :)", 3.5),
        ("one two three four", 2.0),
        ("well, one two three four ok", 2.0),
        ("sure! One two three four :)", 3.0),
        ("", 0.0),
    ],
)
def test_the_reward_by_hand(completion, points):
    assert data.reward(completion) == points


def test_style_does_not_make_an_answer_wrong():
    for completion in ("= hhf", "sure! = hhf :)", "well, = hhf ok", "hhf"):
        assert data.task_answer(completion) == "hhf"


def test_tasks_are_answered_rightly_by_their_own_answers():
    examples = data.task_examples(20, seed=0)
    assert len(examples) == 20 * len(data.TASKS)
    for name, function in (("reverse", lambda w: w[::-1]), ("sort", lambda w: "".join(sorted(w)))):
        for example in examples:
            if example.prompt.startswith(f"<{name} "):
                assert example.answer == function(example.prompt[len(name) + 2 : -1])


def test_held_out_text_is_mostly_not_in_the_training_text():
    training, held_out = data.documents(held_out=False), data.documents(held_out=True)
    lines = [line for line in held_out.split("\n") if len(line) > 60]
    assert len(lines) > 50
    # Python's topics repeat one another; the README beside the script says by how much.
    assert sum(line in training for line in lines) / len(lines) < 0.2


def test_every_text_survives_the_tokenizer():
    tokenizer = data.build_tokenizer()
    rows = data.pretraining_rows(data.documents(held_out=False), 8, random.Random(0))
    for row in rows:
        ids = tokenizer(row)["input_ids"]
        assert len(ids) == len(row) == data.ROW
        assert tokenizer.decode(ids) == row


def point(reward: float, exact_match: float) -> report.Point:
    return report.Point(0, 0, "sft", "adamw", "x", None, reward, exact_match, 5.0, 0.0, 0.0)


def test_a_front_and_the_distance_from_it_by_hand():
    exact = report.TAXES[0]
    points = [point(1.0, 0.9), point(2.0, 0.7), point(1.5, 0.6), point(3.0, 0.5)]
    assert [p.reward for p in report.front(points, exact)] == [1.0, 2.0, 3.0]
    # Between (2, 0.7) and (3, 0.5) the front is at 0.6; before its first point it is at 0.9.
    assert report.from_front(point(2.5, 0.65), points, exact) == pytest.approx(0.05)
    assert report.from_front(point(0.5, 0.65), points, exact) == pytest.approx(-0.25)
    assert report.from_front(point(3.5, 0.65), points, exact) == pytest.approx(0.15)
