"""The study: what each contender changes about a training, what is made of AdamW's, and the choice of settings."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "alignment_tax"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "study"))

import afterwards
import training as trainings
from evaluate import Weights
from plan import (
    ADAMW,
    ALGORITHMS,
    ALPHAS,
    CONTENDERS,
    FULL,
    MEAN_RATIO,
    QUICK,
    Point,
    Training,
    middle,
)
from plan import trainings as planned
from study_jobs import choose
from toy import Toy
from training import train
from worlds import weights_in

STEPS = 4
TINY = replace(
    FULL,
    name="tiny",
    base_steps=6,
    sft_steps=6,
    steps=STEPS,
    warmup=1,
    batch=4,
    micro_batch=4,
    prompts=10,
    samples=3,
    new_tokens=6,
    generated_at_once=8,
    examined_prompts=4,
    examined_tasks=1,
    answers=8,
    search_steps=2,
    reward_search_steps=3,
    reward_search_answers=4,
)
TRAINED = [contender for contender in CONTENDERS.values() if not contender.after_adamw]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A start that has learned next to nothing."""
    torch.set_num_threads(1)
    toy = Toy(tmp_path_factory.mktemp("toy"), TINY)
    toy.prepare(0)
    return toy.start(0)


@pytest.fixture
def run(start, tmp_path):
    """Trains once, with one order, and returns what is left."""

    def run(contender: str, setting: float = 1.0, algorithm: str = "dpo", **kept: tuple[float, ...]):
        named = {name.replace("_", " "): values for name, values in kept.items()}
        return train(Training(0, 0, algorithm, contender, setting), start, tmp_path / "work", named)

    return run


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first: Weights, second: Weights) -> float:
    return sum((first[name] - second[name]).square().sum().item() for name in first) ** 0.5


def along(start, weights: Weights) -> float:
    """How far weights lie from the start along tau, in units of tau."""
    dot = sum(((weights[name] - start.sft[name]) * tau).sum().item() for name, tau in start.tau.items())
    return dot / sum(tau.square().sum().item() for tau in start.tau.values())


# ---------------------------------------------------------------- trainings


@pytest.mark.parametrize("contender", [contender.name for contender in TRAINED])
def test_every_contender_trains(contender, start, run):
    trained = run(contender, middle(CONTENDERS[contender]))
    assert trained.weights.keys() == start.sft.keys()
    assert all(torch.isfinite(tensor).all() for tensor in trained.weights.values())
    assert distance(trained.weights, start.sft) > 0.0


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "dpo"])
def test_every_algorithm_trains_what_merges_and_what_is_given_gradients(algorithm, start, run):
    plain = run(ADAMW, algorithm=algorithm).weights
    assert distance(plain, start.sft) > 0.0
    assert along(start, run("OnDARE", 0.1, algorithm).weights) > along(start, plain) + 0.2
    assert not same(run("SFT replay", 1.0, algorithm).weights, plain)


def test_losses_differ_between_algorithms(run):
    results = [run(ADAMW, algorithm=algorithm).weights for algorithm in ALGORITHMS]
    assert not any(same(first, second) for i, first in enumerate(results) for second in results[:i])


def test_a_training_twice_is_the_same(run):
    for contender in ("OnDARE", "OnTIES", "LoRA"):
        setting = middle(CONTENDERS[contender])
        assert same(run(contender, setting).weights, run(contender, setting).weights)


@pytest.mark.parametrize(
    ("contender", "nothing"), [("learning rate", 1.0), ("beta", 1.0), ("L2 to SFT", 0.0), ("SFT replay", 0.0)]
)
def test_a_setting_that_changes_nothing_is_adamw(contender, nothing, run):
    plain = run(ADAMW).weights
    assert same(run(contender, nothing).weights, plain)
    assert not same(run(contender, middle(CONTENDERS[contender])).weights, plain)


def test_the_pull_to_sft_holds_the_weights(start, run):
    plain, held = run(ADAMW).weights, run("L2 to SFT", 1e6).weights
    assert distance(held, start.sft) < 0.9 * distance(plain, start.sft)


def test_half_back_at_the_last_step_is_the_middle_of_start_and_adamw(start, run):
    plain = run(ADAMW).weights
    assert same(
        run("half back to SFT", 1.0).weights,
        {name: torch.lerp(tensor, start.sft[name], 0.5) for name, tensor in plain.items()},
    )


def test_adamw_is_watched_without_being_changed(run):
    plain = run(ADAMW)
    watched = run(ADAMW, early_stop=(0.5, 1.0), weight_EMA=(0.9,), BEMA=(0.5,))
    assert not plain.on_the_way
    assert same(plain.weights, watched.weights)
    assert same(watched.on_the_way["early stop", 1.0], plain.weights)
    assert not same(watched.on_the_way["early stop", 0.5], plain.weights)


def test_averages_are_those_of_their_equations(start, run):
    shares = tuple((step + 1) / STEPS for step in range(STEPS))
    found = run(ADAMW, early_stop=shares, weight_EMA=(0.9,), BEMA=(0.5,)).on_the_way
    path = [found["early stop", share] for share in shares]
    for name, first in start.sft.items():
        ema, slow = first.clone(), first.clone()
        for step, weights in enumerate(path, 1):
            ema = 0.9 * ema + 0.1 * weights[name]
            share = (10 + step) ** -0.5
            slow = (1 - share) * slow + share * weights[name]
        debiased = slow + (10 + STEPS) ** -0.5 * (path[-1][name] - first)
        torch.testing.assert_close(found["weight EMA", 0.9][name], ema)
        torch.testing.assert_close(found["BEMA", 0.5][name], debiased)


def test_an_adapter_moves_linear_layers_only(start, run):
    trained = run("LoRA", 5.0).weights
    moved = {name for name in trained if not torch.equal(trained[name], start.sft[name])}
    assert moved == {name for name in trained if name.endswith("proj.weight")}


@pytest.mark.parametrize("contender", ["OnDARE", "OnTIES", "OnTIES, paper's vote", "Muon + OnDARE"])
def test_merging_goes_along_tau(contender, start, run):
    assert along(start, run(contender, 0.1).weights) > along(start, run(contender, 1e-6).weights) + 0.1


def test_step_k_merges_after_k_steps_only(start, run):
    """K = 8 of four steps never merges: what is left is AdamW's."""
    assert same(run("OnDARE, K = 8", 0.01).weights, run("OnTIES, K = 64", 0.01).weights)


def test_muon_follows_the_schedule_of_the_trainer(start):
    optimizer = trainings.build_optimizer(Training(0, 0, "dpo", "Muon", 1.0), start.model(), start)
    assert [len(group["params"]) for group in optimizer.param_groups] == [14, 6]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    before = [parameter.clone() for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.step()
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(map(torch.equal, before, after))


# ---------------------------------------------------------------- after AdamW


@pytest.fixture
def trained(start, tmp_path):
    """A checkpoint beside the start, which random numbers have moved."""
    torch.manual_seed(1)
    model = start.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_merges_after_training(start, trained, tmp_path):
    own = weights_in(trained)
    added = afterwards.merged("+ c tau", 0.4, start, trained, tmp_path / "out")
    line = afterwards.merged("linear merge", 0.6, start, trained, tmp_path / "out")
    dare = afterwards.merged("DARE merge", 1.0, start, trained, tmp_path / "out")
    ties = afterwards.merged("TIES merge", 1.0, start, trained, tmp_path / "out")
    for name, tensor in own.items():
        base, sft, tau = start.base[name], start.sft[name], start.tau[name]
        torch.testing.assert_close(added[name], tensor + 0.4 * tau)
        torch.testing.assert_close(line[name], sft + 0.6 * (tensor - sft))
        # Nothing is dropped: half the one delta and half the other.
        torch.testing.assert_close(dare[name], (sft + tensor) / 2)
        # Nothing is trimmed: the mean of the deltas that agree with the sign of their sum.
        deltas = torch.stack([sft - base, tensor - base])
        agree = torch.sign(deltas) == torch.sign(deltas.sum(0))
        mean = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(ties[name], base + mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_parts_hold_every_tensor_once_from_low_to_high(count, start):
    ratios = start.parts(count, 0.25)
    listed = [name for names in ratios.parts.values() for name in names]
    assert len(ratios.parts) == count
    assert sorted(listed) == sorted(start.sft)
    assert set(ratios.values()) == {0.25}
    layers = [name.split(".")[2] for name in listed if ".layers." in name]
    assert layers == sorted(layers)


def test_averages_of_every_family(start, trained):
    found = list(afterwards.averages(start, trained, seed=5))
    assert [family for family, _, _ in found].count("uniform") == 5
    assert len(found) == 5 + 3 * 2 + 3 * 3
    for family, ratio, ratios in found:
        if family.startswith("adaptive"):
            assert ratio == MEAN_RATIO
            assert ratios.mean == pytest.approx(MEAN_RATIO, abs=1e-6)
        elif family == "middle third":
            assert ratios.ratios == (1.0, ratio, 1.0)
    again = list(afterwards.averages(start, trained, seed=5))
    assert [each[2].ratios for each in again] == [each[2].ratios for each in found]


# ---------------------------------------------------------------- the plan


def test_what_is_trained_to_choose_and_what_is_reported():
    every = planned(FULL, 100, 0, None)
    names = {each.contender for each in every}
    assert len({(each.algorithm, each.contender, each.setting) for each in every}) == len(every)
    assert ("rft", "beta") not in {(each.algorithm, each.contender) for each in every}
    assert names == {contender.name for contender in TRAINED if contender.chosen_with is None}
    chosen = {(name, contender.name): middle(contender) for name in ALGORITHMS for contender in CONTENDERS.values()}
    reported = planned(FULL, 0, 1, chosen)
    assert {each.contender for each in reported} == {contender.name for contender in TRAINED}
    assert len(reported) == len(ALGORITHMS) * len(TRAINED) - 1
    assert len({each.path for each in reported}) == len(reported)


def test_the_choice_is_the_largest_area_above_the_base():
    def point(family: str, setting: float | None, reward: float, exact: float) -> Point:
        return Point(100, 0, "dpo" if setting is not None else None, family, setting, reward, exact, 5.0, 0.0, 0.0)

    points = [
        point("base", None, 1.0, 0.0),
        point("OnDARE", ALPHAS[0], 3.0, 0.5),  # (3 - 1) * 0.5 = 1
        point("OnDARE", ALPHAS[1], 2.5, 0.8),  # 1.2
        point("OnDARE", ALPHAS[2], 0.5, 1.0),  # nothing
        point("beta", 0.3, 0.2, 0.9),
        point("beta", 3.0, 0.1, 0.9),
    ]
    chosen = choose(points, replace(FULL, algorithms=("dpo",)))
    assert chosen["dpo", "OnDARE"] == ALPHAS[1]
    assert chosen["dpo", "OnDARE, K = 64"] == ALPHAS[1]
    assert chosen["dpo", "beta"] == 0.3


def test_settings_are_not_chosen_on_what_is_reported():
    with pytest.raises(ValueError, match="seed 1 chooses the settings; what is reported needs other seeds"):
        replace(FULL, tuning_seed=1)
    assert QUICK.tuning_seed is None
