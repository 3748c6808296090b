"""Ratios for the parts of real models: gradients, optima, and what is left of a model and of a killed run."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tiny import equal_bits, llama, save

from fused_merge import LayerRatios, adapt_ratios, interpolate, reward_weighted_loss
from fused_merge.adaptive import answer_loss

BATCH = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]]), "labels": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])}


@pytest.fixture
def models():
    return llama(0, dtype=torch.float64).eval(), llama(1, dtype=torch.float64).eval()


def loss_at(model, base, tuned, ratios):
    (weights,) = interpolate(base.state_dict(), tuned.state_dict(), [ratios])
    model.load_state_dict(weights)
    with torch.no_grad():
        return answer_loss(model, BATCH).item()


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_finite_differences(tied):
    base, tuned = (llama(seed, tied=tied, dtype=torch.float64).eval() for seed in range(2))
    parts = LayerRatios.by_kind(
        base, {"attention": 0.3, "mlp": 0.6, "embeddings": 0.5, "norm": 0.2, **({} if tied else {"head": 0.4})}
    )
    model = copy.deepcopy(base)
    found = adapt_ratios(model, base, tuned, answer_loss, [BATCH], np.mean(parts.ratios), parts, steps=1)
    (first,) = found.history
    assert first["ratios"] == pytest.approx(parts.ratios)
    assert first["loss"] == pytest.approx(loss_at(model, base, tuned, parts), rel=1e-6)
    for k, derivative in enumerate(first["gradient"]):
        # Transformers normalises and takes losses in fp32, whatever the weights are.
        step = 1e-2 * np.eye(len(parts.ratios))[k]
        above, below = (
            loss_at(model, base, tuned, parts.replace(np.add(parts.ratios, side))) for side in (step, -step)
        )
        assert derivative == pytest.approx((above - below) / 2e-2, rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_quadratic_is_solved_at_the_exact_mean(dtype):
    base, tuned = (llama(seed, dtype=dtype).eval() for seed in range(2))
    parts = LayerRatios.by_parts(base, [0.1, 0.9])
    goal = interpolate(base.state_dict(), tuned.state_dict(), [parts])[0]

    def loss_fn(model, batch):
        return batch * sum(((p.double() - goal[name].double()) ** 2).sum() for name, p in model.named_parameters())

    lengths = [
        sum(((tuned.state_dict()[n] - base.state_dict()[n]).double() ** 2).sum().item() for n in names)
        for names in parts.parts.values()
    ]
    shift = (0.5 - 0.4) / np.mean(1 / np.array(lengths))
    optimum = np.array([0.1, 0.9]) - shift / np.array(lengths)
    found = adapt_ratios(copy.deepcopy(base), base, tuned, loss_fn, [1.0, 2.0], 0.4, parts, steps=150)
    assert found.mean == pytest.approx(0.4, abs=1e-9)
    assert np.abs(np.array(found.ratios) - optimum).max() < (1e-3 if dtype != torch.bfloat16 else 1e-2)


class Stop(Exception):
    pass


def test_the_model_is_given_back_as_it_was_also_when_the_loss_fails(models):
    base, tuned = models
    model = copy.deepcopy(base)
    kept = model.model.norm.weight
    kept.requires_grad_(False)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p is not kept:
            p.grad = grads[name]
    calls = []

    def loss_fn(model, batch):
        calls.append(kept.requires_grad)
        if len(calls) == 3:
            raise Stop
        return answer_loss(model, batch)

    with pytest.raises(Stop):
        adapt_ratios(model, base, tuned, loss_fn, [BATCH], parts=2, steps=5)
    assert calls == [True] * 3
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    for (name, p), before in zip(model.named_parameters(), base.parameters(), strict=True):
        assert equal_bits(p.detach(), before.detach())
        assert p.grad is (None if p is kept else grads[name])


def test_batches_that_make_one_step_count_as_their_mean(models):
    base, tuned = models
    halves = [{key: value[i : i + 1] for key, value in BATCH.items()} for i in range(2)]
    whole = adapt_ratios(copy.deepcopy(base), base, tuned, answer_loss, [BATCH], parts=2, steps=3)
    parts = adapt_ratios(copy.deepcopy(base), base, tuned, answer_loss, halves, parts=2, steps=3, accumulate=2)
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-4, abs=1e-6)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_killed_run_goes_on_where_it_was(models, tmp_path):
    base, tuned = (save(model, tmp_path / name) for model, name in zip(models, "ab", strict=True))
    batches = [{key: value.roll(i, 1) for key, value in BATCH.items()} for i in range(3)]
    seen = []

    def loss_fn(model, batch):
        seen.append(batch["input_ids"][0, 0].item())
        if len(seen) == 4:
            raise Stop
        return answer_loss(model, batch)

    options = {"parts": 2, "steps": 7, "journal": tmp_path / "journal.json"}
    whole = adapt_ratios(copy.deepcopy(models[0]), base, tuned, answer_loss, batches, parts=2, steps=7)
    with pytest.raises(Stop):
        adapt_ratios(copy.deepcopy(models[0]), base, tuned, loss_fn, batches, **options)
    resumed = adapt_ratios(copy.deepcopy(models[0]), base, tuned, loss_fn, batches, **options)
    assert resumed == whole
    assert resumed.history == whole.history
    order = [batch["input_ids"][0, 0].item() for batch in batches] * 3
    assert seen == order[:4] + order[3:7]
    with pytest.raises(ValueError, match=r"journal\.json is the journal of a run with other arguments"):
        adapt_ratios(models[0], base, tuned, answer_loss, batches, **options | {"parts": 1})
    (tmp_path / "journal.json").write_text("[]")
    with pytest.raises(ValueError, match=r"journal\.json is not the journal of a run"):
        adapt_ratios(copy.deepcopy(models[0]), base, tuned, answer_loss, batches, **options)


def test_losses_without_gradients_are_searched(models):
    base, tuned = models
    target = loss_at(copy.deepcopy(base), base, tuned, LayerRatios.by_parts(base, [0.7, 0.1]))
    found = adapt_ratios(
        copy.deepcopy(base),
        base,
        tuned,
        lambda model, batch: abs(answer_loss(model, batch).item() - target),
        [BATCH],
        parts=2,
        steps=60,
        gradients=False,
    )
    assert found.mean == pytest.approx(0.4, abs=1e-9)
    assert min(entry["loss"] for entry in found.history) == loss_of(found, base, tuned, target)
    assert "gradient" not in found.history[0]


def loss_of(ratios, base, tuned, target):
    return abs(loss_at(copy.deepcopy(base), base, tuned, ratios) - target)


def test_a_regulariser_keeps_near_the_mean(models):
    base, tuned = models
    free, held = (
        adapt_ratios(copy.deepcopy(base), base, tuned, answer_loss, [BATCH], parts=2, steps=30, regulariser=weight)
        for weight in (0.0, 100.0)
    )
    assert abs(held.ratios[0] - 0.4) < 0.02 < abs(free.ratios[0] - 0.4)


def test_rewards_weigh_answers(models):
    model = models[0]
    single = [answer_loss(model, {key: value[i : i + 1] for key, value in BATCH.items()}) for i in range(2)]
    loss = reward_weighted_loss(model, {**BATCH, "rewards": torch.tensor([2.0, -0.5])})
    assert loss.item() == pytest.approx((2.0 * single[0] - 0.5 * single[1]).item() / 2, rel=1e-6)


def test_it_stops_when_nothing_moves(models):
    base, tuned = models
    found = adapt_ratios(
        copy.deepcopy(base), base, tuned, lambda m, b: answer_loss(m, b) * 0, [BATCH], parts=2, patience=5
    )
    assert len(found.history) == 6
    assert found.ratios == pytest.approx((0.4, 0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_ratio": 1.1}, r"mean_ratio must lie in \[0, 1\], got 1.1"),
        ({"mean_ratio": float("nan")}, r"mean_ratio must lie in \[0, 1\], got nan"),
        ({"steps": 0}, "steps, accumulate and patience must be at least 1, got 0, 1 and 20"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"parametrization": "logit"}, "parametrization must be 'direct' or 'paper', got 'logit'"),
        ({"regulariser_weights": "x"}, "regulariser_weights must be 'uniform' or 'paper', got 'x'"),
        ({"parts": 9}, "9 parts need as many layers, and there are 2"),
        (
            {"parts": LayerRatios({"all": ["w"]}, [0.4])},
            "the LayerRatios given as parts lack 'model.embed_tokens.weight'",
        ),
        ({"batches": []}, "batches ended after 0; pass something that can be gone through again"),
        ({"loss_fn": lambda m, b: torch.tensor(float("nan"))}, "loss_fn returned nan; look at the batch"),
        ({"loss_fn": lambda m, b: torch.ones(2)}, r"loss_fn must return one number, got a tensor of shape \[2\]"),
        ({"loss_fn": lambda m, b: torch.tensor(1.0)}, "the loss does not depend on the weights by a graph"),
        (
            {"loss_fn": lambda m, b: m.model.layers[0].mlp.up_proj.weight.sum()},
            "no parameter of part 'layer 1' gets a gradient; make it one part with others",
        ),
    ],
)
def test_bad_input_gets_a_sentence(options, message, models):
    base, tuned = models
    asked = {"loss_fn": answer_loss, "batches": [BATCH], "parts": 2, "steps": 2} | options
    with pytest.raises((ValueError, TypeError), match=message):
        adapt_ratios(copy.deepcopy(base), base, tuned, **asked)


def test_an_iterator_that_ends_is_refused(models):
    base, tuned = models
    with pytest.raises(ValueError, match="batches ended after 2; pass something that can be gone through again"):
        adapt_ratios(copy.deepcopy(base), base, tuned, answer_loss, iter([BATCH] * 2), parts=2, steps=3)


def test_the_history_is_plain_data(models):
    base, tuned = models
    found = adapt_ratios(
        copy.deepcopy(base), base, tuned, answer_loss, [BATCH], parts=2, steps=2, parametrization="paper"
    )
    assert [entry["step"] for entry in found.history] == [0, 1]
    assert json.loads(json.dumps(found.history)) == list(found.history)
