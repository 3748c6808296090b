"""Ratios for the parts of real models: gradients, optima, and what is left of a model and of a killed run."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from bits import same_bits
from quadratic import optimum
from tiny import llama
from torch import nn

from fused_merge import LayerRatios, adapt_ratios, interpolate, reward_weighted_loss
from fused_merge.adapt.adapt import answer_loss
from fused_merge.adapt.search import CovarianceSearch


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads are slower than one on models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 6, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(6, 9), "down_proj": nn.Linear(9, 6)})
        self.input_layernorm = nn.LayerNorm(6)

    def forward(self, x):
        x = x + self.self_attn["o_proj"](torch.tanh(self.self_attn["q_proj"](self.input_layernorm(x))))
        return x + self.mlp["down_proj"](torch.sigmoid(self.mlp["up_proj"](x)))


class Network(nn.Module):
    """Smooth, and computed in the dtype of its weights throughout, as models of Transformers are not."""

    def __init__(self, seed, tied=False, dtype=torch.float64):
        torch.manual_seed(seed)
        super().__init__()
        layers = nn.ModuleList([Layer(), Layer()])
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(8, 6), "layers": layers, "norm": nn.LayerNorm(6)})
        self.lm_head = nn.Linear(6, 8, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, 0.0, 0.4)
        if tied:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.to(dtype)

    def forward(self, tokens):
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(self.model["norm"](x))


TOKENS = torch.tensor([[3, 4, 5, 6, 1], [7, 2, 0, 2, 5]])


def next_tokens(model, tokens):
    """Return a loss in the dtype of the logits."""
    return -model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()


def adapt(model=None, loss_fn=next_tokens, batches=(TOKENS,), **options):
    """Find two ratios, unless asked otherwise, between the networks 0 and 1."""
    model = Network(2) if model is None else model
    return adapt_ratios(model, Network(0), Network(1), loss_fn, batches, **{"parts": 2} | options)


def loss_at(ratios, tied=False):
    between = Network(0, tied)
    ends = (Network(seed, tied).state_dict() for seed in range(2))
    between.load_state_dict(interpolate(*ends, [ratios])[0])
    with torch.no_grad():
        return next_tokens(between, TOKENS).item()


def cut(how, tied=False):
    """Parts with ratios on either half of the path and at both ends."""
    model = Network(0, tied)
    if how == "by_parts":
        return LayerRatios.by_parts(model, [0.3, 0.8])
    if how == "by_kind":
        ratios = {"embeddings": 0.5, "attention": 0.0, "mlp": 0.6, "norm": 1.0}
        return LayerRatios.by_kind(model, ratios if tied else ratios | {"head": 0.4})
    names = list(LayerRatios.per_tensor(model, 0.5))
    return LayerRatios.per_tensor(model, dict(zip(names, np.linspace(0.0, 1.0, len(names)), strict=True)))


@pytest.mark.parametrize("how", ["by_parts", "by_kind", "per_tensor"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_is_that_of_finite_differences_in_every_part(how, tied, frozen):
    base, tuned, model = (Network(seed, tied) for seed in range(3))
    parts = cut(how, tied)
    model.model["layers"][0].mlp["up_proj"].weight.requires_grad_(not frozen)
    found = adapt_ratios(model, base, tuned, next_tokens, [TOKENS], parts.mean, parts, steps=1)
    (first,) = found.history
    at = np.array(first["ratios"])
    assert at == pytest.approx(parts.ratios, abs=1e-12)
    assert first["loss"] == pytest.approx(loss_at(parts.replace(at), tied), rel=1e-14)
    assert len(first["gradient"]) == len(parts.ratios)
    for k, derivative in enumerate(first["gradient"]):
        step = 1e-5 * np.eye(len(at))[k]
        above, below = (loss_at(parts.replace(at + change), tied) for change in (step, -step))
        # The error of the difference is of the order of step^2, and of what fp64 leaves of the loss, over the step.
        assert derivative == pytest.approx((above - below) / 2e-5, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_has_the_gradient_but_for_rounding(dtype, autocast):
    base, tuned = (Network(seed, dtype=torch.bfloat16).to(dtype) for seed in range(2))
    model, seen = copy.deepcopy(tuned), []

    def loss_fn(model, tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            seen.append(model(tokens).dtype)
            return next_tokens(model, tokens)

    options = {"parts": cut("by_parts"), "mean_ratio": 0.55, "steps": 1}
    (low,) = adapt_ratios(model, base, tuned, loss_fn, [TOKENS], **options).history
    ends = (copy.deepcopy(end).double() for end in (base, tuned))
    (exact,) = adapt_ratios(Network(2), *ends, next_tokens, [TOKENS], **options).history
    assert seen == [torch.bfloat16 if autocast else dtype]
    # A few roundings of the coarsest dtype on the way.
    rounding = 4 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert low["loss"] == pytest.approx(exact["loss"], rel=rounding)
    assert low["gradient"] == pytest.approx(exact["gradient"], rel=0, abs=rounding * max(map(abs, exact["gradient"])))
    assert low["gradient"] != pytest.approx(exact["gradient"], rel=1e-12)
    assert all(map(same_bits, model.state_dict().values(), tuned.state_dict().values()))


@pytest.mark.parametrize(
    ("make", "dtype", "mean"),
    [(Network, torch.float64, mean) for mean in (0.2, 0.5, 0.9)]
    + [(llama, dtype, 0.4) for dtype in (torch.float64, torch.float32, torch.bfloat16)],
)
def test_a_quadratic_is_solved_at_the_exact_mean(make, dtype, mean):
    base, tuned = (make(seed, dtype=dtype).eval() for seed in range(2))
    parts, batches, steps = LayerRatios.by_parts(base, [0.1, 0.9]), [1.0, 2.0], 100
    if make is Network:
        batches, steps = [1.0], 150
        # The bounds hold some of these.
        parts = LayerRatios.by_kind(base, {"embeddings": -0.4, "attention": 1.3, "mlp": 0.5, "norm": 0.1, "head": 0.7})
    ends = base.state_dict(), tuned.state_dict()
    goal = interpolate(*ends, [parts])[0]

    def loss_fn(model, batch):
        return batch * sum(((p.double() - goal[name].double()) ** 2).sum() for name, p in model.named_parameters())

    lengths = {name: ((ends[1][name] - ends[0][name]).double() ** 2).sum().item() for name in parts}
    curvature = np.array([sum(lengths[name] for name in names) for names in parts.parts.values()])
    expected = optimum(curvature, np.array(parts.ratios), mean)
    start = parts.replace([mean] * len(parts.ratios))
    found = adapt_ratios(copy.deepcopy(base), base, tuned, loss_fn, batches, mean, start, steps)
    assert bool({0.0, 1.0} & set(expected.tolist())) == (make is Network)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert np.abs(np.array(found.ratios) - expected).max() < (1e-3 if dtype != torch.bfloat16 else 1e-2)


def test_an_optimizer_goes_on_as_if_nothing_had_been():
    def train(adapts):
        model = Network(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            next_tokens(model, TOKENS).backward()
            if adapts:
                adapt(model, steps=2)
            optimizer.step()
            # The next gradients are added to the same tensors.
            optimizer.zero_grad(set_to_none=False)
        return model.state_dict()

    for one, other in zip(train(True).values(), train(False).values(), strict=True):
        assert same_bits(one, other)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt])
def test_the_model_is_given_back_as_it_was_also_when_the_loss_fails(stop):
    model = Network(2)
    frozen = model.model["norm"].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = None if p is frozen else torch.randn_like(p)
    before = [(p.detach().clone(), p.grad) for p in model.parameters()]
    calls = []

    def loss_fn(model, batch):
        calls.append(frozen.requires_grad)
        if len(calls) == 3:
            raise stop
        return next_tokens(model, batch)

    with pytest.raises(stop):
        adapt(model, loss_fn, steps=5)
    assert calls == [True] * 3
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    for p, (weight, grad) in zip(model.parameters(), before, strict=True):
        assert same_bits(p.detach(), weight)
        assert p.grad is grad


def test_batches_that_make_one_step_count_as_their_mean():
    whole = adapt(steps=3)
    parts = adapt(batches=TOKENS.split(1), steps=3, accumulate=2)
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-4, abs=1e-6)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"gradients": False}, {"parametrization": "paper"}])
def test_a_killed_run_goes_on_where_it_was(more, tmp_path):
    batches = [TOKENS.roll(i, 1) for i in range(3)]
    count, seen = more.get("accumulate", 1), []

    def loss_fn(model, batch):
        seen.append(batch[0, 0].item())
        assert torch.is_grad_enabled() == more.get("gradients", True)
        if len(seen) == 2 * count + 1:
            raise Stop
        return next_tokens(model, batch)

    whole = adapt(batches=batches, steps=7, **more)
    options = {"steps": 7, "journal": tmp_path / "journal.json"} | more
    with pytest.raises(Stop):
        adapt(None, loss_fn, batches, **options)
    resumed = adapt(None, loss_fn, batches, **options)
    assert resumed == whole
    assert resumed.history == whole.history
    assert [entry["step"] for entry in whole.history] == list(range(7))
    order = [batch[0, 0].item() for batch in batches] * 5
    assert seen == order[: 2 * count + 1] + order[2 * count : 7 * count]


def test_what_is_no_journal_of_this_run(tmp_path):
    journal = tmp_path / "journal.json"

    def refused(message, parts=2):
        with pytest.raises(ValueError, match=message):
            adapt(steps=2, journal=journal, parts=parts)

    adapt(steps=2, journal=journal)
    refused(r"journal\.json is the journal of a run with other arguments", parts=1)
    content = json.loads(journal.read_text())
    content["history"][1]["ratios"] = [0.41, 0.39]
    journal.write_text(json.dumps(content))
    refused(r"step 1 of .*journal\.json was taken by another search; name another file")
    journal.write_text("[]")
    refused(r"journal\.json is not the journal of a run")


def test_a_journal_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    journal = tmp_path / "journal.json"

    def loss_fn(model, batch):
        journal.mkdir()
        return next_tokens(model, batch)

    with pytest.raises(OSError, match=r"cannot write .*journal.json"):
        adapt(None, loss_fn, journal=journal)
    assert list(tmp_path.iterdir()) == [journal]


def test_weights_tied_by_their_storage_are_one():
    base, tuned, model = Network(0, True), Network(1, True), Network(2)
    model.lm_head.weight = nn.Parameter(model.model["embed_tokens"].weight.detach())
    options = {"parts": cut("by_kind", True), "mean_ratio": 0.525, "steps": 1}
    found = adapt_ratios(model, base, tuned, next_tokens, [TOKENS], **options)
    expected = adapt_ratios(Network(2, True), base, tuned, next_tokens, [TOKENS], **options)
    assert found.history[0]["gradient"] == pytest.approx(expected.history[0]["gradient"], rel=1e-13)


def test_the_search_without_gradients_is_that_of_half_the_rate():
    found = adapt(mean_ratio=0.5, steps=2, lr=0.2, seed=3, gradients=False)
    search = CovarianceSearch(np.full(2, 0.5), 0.5, 0.1, seed=3)
    assert found.history[0]["ratios"] == search.propose().tolist()


def test_losses_without_gradients_are_searched():
    parts = cut("by_parts")
    target = loss_at(parts.replace([0.7, 0.1]))

    def loss_fn(model, batch):
        return abs(next_tokens(model, batch).item() - target)

    found = adapt(None, loss_fn, parts=parts, steps=60, gradients=False)
    assert found.mean == pytest.approx(0.4, abs=1e-9)
    assert min(entry["loss"] for entry in found.history) == abs(loss_at(found) - target)
    assert "gradient" not in found.history[0]


@pytest.mark.parametrize("weights", ["uniform", "paper"])
def test_a_regularizer_adds_its_value_and_its_derivative(weights):
    patterns = {r"model\.layers\.0.*": 0.1, r"model\.layers\.1\.mlp.*|lm_head.*": 0.7, ".*": 0.9}
    parts = LayerRatios.by_patterns(Network(0), patterns)
    # Two layers: the middle is at 1, and the first layer and all outside are as far from it as 0.
    paper = [np.mean([25 / 1 if "layers.1" in name else 25 / 2 for name in names]) for names in parts.parts.values()]
    weight = 0.01 * np.array(paper if weights == "paper" else [1.0] * 3)
    plain, regularized = (
        adapt(mean_ratio=parts.mean, parts=parts, steps=1, **more).history[0]
        for more in ({}, {"regularizer": 0.01, "regularizer_weights": weights})
    )
    apart = np.array(parts.ratios) - parts.mean
    assert regularized["loss"] - plain["loss"] == pytest.approx(np.sum(weight * apart**2), rel=1e-9)
    added = np.subtract(regularized["gradient"], plain["gradient"])
    assert added == pytest.approx(2 * weight * apart, rel=1e-9)


def test_rewards_count_only_what_is_to_be_learnt():
    model, ids = llama(0, dtype=torch.float64).eval(), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    first, second = (answer_loss(model, {key: rows[i : i + 1] for key, rows in batch.items()}).item() for i in range(2))
    loss = reward_weighted_loss(model, batch | {"rewards": torch.tensor([2.0, -0.5])})
    assert loss.item() == pytest.approx((2.0 * first - 0.5 * second) / 2, rel=1e-6)


def test_it_stops_when_nothing_moves():
    found = adapt(None, lambda model, batch: next_tokens(model, batch) * 0, patience=5)
    assert len(found.history) == 6
    assert found.ratios == pytest.approx((0.4, 0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean_ratio": 1.1}, r"mean_ratio must lie in \[0, 1\], got 1.1"),
        ({"mean_ratio": float("nan")}, r"mean_ratio must lie in \[0, 1\], got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"regularizer": -1.0}, "regularizer must be at least 0 and finite, got -1.0"),
        ({"parametrization": "logit"}, "parametrization must be 'direct' or 'paper', got 'logit'"),
        ({"regularizer_weights": "x"}, "regularizer_weights must be 'uniform' or 'paper', got 'x'"),
        ({"parts": 0}, "parts must be at least 1, got 0"),
        ({"parts": 9}, "9 parts need as many layers, and there are 2"),
        ({"parts": LayerRatios({"all": ["w"]}, [0.4])}, "LayerRatios given as parts lack 'model.embed_tokens.weight'"),
        ({"batches": []}, "batches ended after 0; pass something that can be cycled, such as a list"),
        ({"batches": iter([TOKENS])}, "batches ended after 1; pass something that can be cycled, such as a list"),
        ({"loss_fn": lambda m, b: torch.tensor(float("nan"))}, "loss_fn returned nan; look at the batch"),
        ({"loss_fn": lambda m, b: torch.ones(2)}, r"loss_fn must return one number, got a tensor of shape \[2\]"),
        ({"loss_fn": lambda m, b: torch.tensor(1.0)}, "the loss does not depend on the weights by a graph"),
        (
            {"loss_fn": lambda m, b: sum((p - p.detach()).abs().sqrt().sum() for p in m.parameters())},
            "the loss is finite, but its derivative by the ratio of part 'layer 0' is nan; look at the batch",
        ),
        (
            {"loss_fn": lambda m, b: m.model["layers"][0].mlp["up_proj"].weight.sum()},
            "no parameter of part 'layer 1' gets a gradient; make it one part with others",
        ),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        adapt(**{"steps": 2} | options)
