"""Thresholds of ranked methods from one step to the next: where the window holds them and where it does not."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from tensors import Tensors

from fused_merge import functional
from fused_merge.compiled import thresholds
from fused_merge.compiled.memory import BLOCK

# Lists all of u, a few blocks, many.
SHAPES = [(1000,), (5000,), (0,), (1,), (3, 11_000), (1025,)]
RANKED = [
    {"method": "onties", "reserve_rate": 0.01},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper"},
    {"method": "onsoft", "reserve_rate": 0.05},
]
STORED = [{"sparse": True}, {"sparse": False}]


def follow(made, options, change=lambda step, tensors: None, steps=5, each=lambda step: None, lists=None):
    """Step by compiled and by eager code, with gradients that `change` makes others, and compare after each step."""
    compiled, eager = made, made.clone()
    workspace = functional.Workspace()
    for step in range(steps):
        for tensors in (compiled, eager):
            generator = torch.Generator().manual_seed(step)
            for grad in tensors.grads:
                grad.copy_(0.1 * torch.randn(grad.shape, generator=generator))
            change(step, tensors)
        more = each(step) or {}
        compiled.step("compiled", lists, workspace=workspace, **options, **more)
        eager.step("eager", lists, **options, **more)
        assert_same_bits(*(numbers(tensors.outputs()) for tensors in (compiled, eager)), f"step {step}")


def numbers(outputs):
    """Make every NaN the same one: their patterns are nobody's promise."""
    return {key: [x.masked_fill(x.isnan(), torch.nan) for x in values] for key, values in outputs.items()}


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_thresholds_that_drift(options, stored, workers, threads):
    threads(workers)
    follow(Tensors(*SHAPES, tau=torch.bfloat16, **stored), options)


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
def test_thresholds_that_jump(options, stored, threads):
    threads(2)

    def by_a_factor(step, tensors):
        for x in tensors.exp_avgs:
            x *= [1.0, 1e4, 1e-6, 1.2, 0.8, 1e20, 1e-30, 1.0][step]

    follow(Tensors(*SHAPES, tau=torch.bfloat16, **stored), options, by_a_factor, 8)


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
def test_step_sizes_that_jump(options, stored):
    rates = [1e-2, 1e-6, 0.0, 1e-2, 1e30, 1e-2, 1e-45, 0.5]
    follow(Tensors(*SHAPES, **stored), options, steps=8, each=lambda step: {"lr": rates[step]})


def constant(step, tensors):
    """Give all updates the same magnitude, and some of them the other sign."""
    for grad, exp_avg, exp_avg_sq in zip(tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, strict=True):
        exp_avg.fill_(0.25).view(-1)[::3] *= -1
        grad.copy_(exp_avg)
        exp_avg_sq.fill_(0.0625)


def zeros(step, tensors):
    for group in (tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs) if step < 2 else (tensors.grads,):
        for x in group:
            x.zero_()


def ever_zeros(step, tensors):
    for group in (tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs):
        for x in group:
            x.zero_()


def not_finite(step, tensors):
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan])
    group = (tensors.grads, tensors.exp_avgs, tensors.params, tensors.exp_avg_sqs, [])[step]
    for x in group:
        x.view(-1)[1::7] = bad.repeat(x.numel())[: x.view(-1)[1::7].numel()]


def nearly_all_zeros(step, tensors):
    for group in (tensors.grads, tensors.exp_avgs):
        for x in group:
            x.view(-1)[step + 3 :] = 0.0


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
@pytest.mark.parametrize("change", [constant, zeros, ever_zeros, not_finite, nearly_all_zeros])
def test_updates_of_few_values(options, stored, change, threads):
    threads(2)
    follow(Tensors(*SHAPES, **stored), options, change)


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
def test_steps_that_change_nothing_keep_the_window(options, stored):
    stops = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    follow(Tensors(*SHAPES, **stored), options, steps=6, each=lambda step: {"found_inf": torch.tensor(stops[step])})


@pytest.mark.parametrize("stored", STORED, ids=["sparse", "dense"])
@pytest.mark.parametrize("options", RANKED, ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_lists_without_room(options, stored, workers, threads, monkeypatch):
    """Blocks that do not fit are looked at again, or all is counted."""
    threads(workers)
    make_room = thresholds.Thresholds._room_for_lists

    def little(self):
        made = make_room(self)
        return made._replace(values=made.values[: 2 * BLOCK])

    monkeypatch.setattr(thresholds.Thresholds, "_room_for_lists", little)
    follow(Tensors(*SHAPES, **stored), options)


@pytest.mark.parametrize("options", RANKED, ids=str)
def test_the_number_of_threads_may_change(options, threads):
    follow(Tensors(*SHAPES, sparse=True), options, each=lambda step: threads([1, 3, 2, 4, 1][step]))


@pytest.mark.parametrize("options", RANKED, ids=str)
def test_tensors_may_come_and_go(options):
    workspace = functional.Workspace()
    compiled = Tensors((5000,), (9000,), (700,), (6000,), sparse=True)
    eager = compiled.clone()
    for members in ([0, 1, 2, 3], [1, 3], [3, 2, 1], [0, 1, 2, 3], [2], [0, 3]):
        lists = [{key: [values[i] for i in members] for key, values in vars(t).items()} for t in (compiled, eager)]
        names = {"names": [f"w{i}" for i in members]}
        compiled.step("compiled", lists[0] | names, workspace=workspace, **options)
        eager.step("eager", lists[1] | names, **options)
        assert_same_bits(compiled.outputs(), eager.outputs(), str(members))


def test_a_threshold_near_the_last_one_is_not_counted(monkeypatch):
    """All elements are counted at the first step alone, which knows no threshold."""
    counted = []
    count = thresholds.Thresholds._count

    def noted(self, told, crew, hows, missed, *rest):
        counted.append(int(missed.sum()))
        return count(self, told, crew, hows, missed, *rest)

    monkeypatch.setattr(thresholds.Thresholds, "_count", noted)
    tensors = Tensors((50_000,), (600,), sparse=True)
    for exp_avg, exp_avg_sq, step in zip(tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps, strict=True):
        # As after many steps with such gradients.
        exp_avg *= (1 / 19) ** 0.5
        exp_avg_sq.fill_(0.01)
        step.fill_(1000.0)
    # Of the small tensor everything is listed, and nothing counted.
    follow(tensors, RANKED[0], steps=4)
    assert counted == [1, 0, 0, 0]
