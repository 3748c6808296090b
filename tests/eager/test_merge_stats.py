"""What a merge says about itself: each number by hand, when it is taken, and the warning for what rounding loses."""

from __future__ import annotations

import logging

import pytest
import torch
from bits import assert_same_bits
from one_tensor import optimizer_of, parameter, run, states

from fused_merge.eager.merge_stats import lost_share, merge_stats, merge_sums
from fused_merge.eager.merging_adamw import Terms
from fused_merge.eager.scalars import Hyper, derive_scalars
from fused_merge.methods import merge_rule

HALF = derive_scalars(1.0, Hyper(0.5, (0.0, 0.0), 0.0, 0.0, alpha=0.5))


def stats_of(u, u_kept, tau, merged, start, stored=torch.float32, method="ondare"):
    terms = Terms(*(torch.tensor(x) for x in (u, u_kept, tau, merged, start)))
    stats = merge_stats(merge_sums(terms, HALF, merge_rule(method, 0.5), stored), len(u))
    assert all(value.shape == () for value in stats)
    return {key: value.item() for key, value in stats._asdict().items()}


FOUR = {
    "u": [3.0, -4.0, 0.0, 0.0],
    "u_kept": [0.0, -4.0, 0.0, 0.0],
    "tau": [0.0, 3.0, 0.0, 4.0],
    "merged": [0.0, -0.5, 0.0, 2.0],
    "start": [1.0, 1.0, 1.0, 1.0],
}


def test_each_number_by_hand():
    assert stats_of(**FOUR) == {
        # -12 / (5 * 5)
        "cosine": pytest.approx(-0.48, rel=1e-6),
        "kept_u": 0.25,
        "kept_tau": 0.5,
        # Only the second element has both, and they are opposite.
        "conflicts": 1.0,
        "norm_u": 5.0,
        "norm_tau": 5.0,
        "norm_merged": pytest.approx(4.25**0.5, rel=1e-6),
        "lost": 0.0,
        "lost_u": 0.0,
    }


def test_a_conflict_needs_both_signs():
    stats = stats_of([1.0, -1.0, 2.0, 0.0], [1.0, -1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4, [0.0] * 4)
    assert stats["conflicts"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("stored", "start", "lost"),
    [
        # 0.5 * tau adds 1.5 to the second element and 2 to the last. Numbers at 2^25 are 4 apart, and 2^25 + 2 goes
        # to the even neighbor: the half of tau is lost.
        (torch.float32, [1.0, 1.0, 1.0, 2.0**25], 0.5),
        (torch.float32, [1.0, 1.0, 1.0, 2.0**24], 0.0),
        (torch.float32, [2.0**30] * 4, 1.0),
        # bf16 has 8 digits: 4 apart from 512 on, 2 from 256 on.
        (torch.bfloat16, [1.0, 1.0, 1.0, 512.0], 0.5),
        (torch.bfloat16, [1.0, 1.0, 1.0, 256.0], 0.0),
        (torch.float16, [1.0, 1.0, 1.0, 4096.0], 0.5),
        (torch.float16, [1.0, 1.0, 1.0, 2048.0], 0.0),
    ],
    ids=str,
)
def test_what_is_lost_depends_on_what_is_stored(stored, start, lost):
    assert stats_of(**FOUR | {"start": start}, stored=stored)["lost"] == lost


@pytest.mark.parametrize(
    ("stored", "start", "lost"),
    [
        # 0.5 * u adds 1 to the first element and 2 to the third; to the second tau alone adds anything. Numbers at
        # 2^24 are 2 apart, at 2^25 4, and a half goes to the even neighbor.
        (torch.float32, [1.0, 1.0, 1.0, 1.0], 0.0),
        (torch.float32, [2.0**24, 1.0, 2.0**24, 1.0], 0.5),
        (torch.float32, [2.0**25, 1.0, 2.0**25, 1.0], 1.0),
        (torch.float32, [1.0, 2.0**30, 1.0, 2.0**30], 0.0),
        (torch.bfloat16, [256.0, 1.0, 256.0, 1.0], 0.5),
        (torch.bfloat16, [512.0, 1.0, 512.0, 1.0], 1.0),
        (torch.float16, [2048.0, 1.0, 2048.0, 1.0], 0.5),
    ],
    ids=str,
)
def test_what_is_lost_of_u_depends_on_what_is_stored(stored, start, lost):
    terms = {"u": [2.0, 8.0, 4.0, 8.0], "u_kept": [2.0, 0.0, 4.0, 0.0], "tau": [0.0, 2.0, 0.0, 0.0]}
    assert stats_of(**terms, merged=[1.0, 1.0, 2.0, 0.0], start=start, stored=stored)["lost_u"] == lost


def test_what_a_vote_drops_changes_nothing_either():
    # u + tau < 0 in the second element: tau is dropped there, u alone stays.
    merged = [0.0, -2.0, 0.0, 2.0]
    stats = stats_of(**FOUR | {"merged": merged}, method="onties")
    assert (stats["lost"], stats["lost_u"]) == (0.5, 0.0)
    # u + tau > 0: u is dropped.
    stats = stats_of(**FOUR | {"tau": [0.0, 5.0, 0.0, 4.0], "merged": [0.0, 2.5, 0.0, 2.0]}, method="onties")
    assert (stats["lost"], stats["lost_u"]) == (0.0, 1.0)


@pytest.mark.parametrize("zero", ["u", "tau"])
def test_nothing_has_no_direction(zero):
    stats = stats_of(**FOUR | {zero: [0.0] * 4})
    assert (stats["cosine"], stats["conflicts"], stats[f"norm_{zero}"]) == (0.0, 0.0, 0.0)
    assert (stats["lost"], stats["lost_u"]) == (0.0, 0.0)


def test_an_empty_tensor_has_stats_too():
    assert set(stats_of(**{key: [] for key in FOUR}).values()) == {0.0}


def test_lost_share_by_hand():
    param = torch.tensor([1.0, 1.0, 256.0, 256.0], dtype=torch.bfloat16)
    tau = torch.tensor([0.0, 1.0, 2.0, 4.0])
    # 0.5 * tau = 0.5, 1 and 2; 257 goes to the even 256.
    assert lost_share(param, tau, 0.5, torch.bfloat16) == pytest.approx(1 / 3)
    assert lost_share(param, tau, 0.5, torch.float32) == 0.0
    assert lost_share(param, torch.zeros(4), 0.5, torch.bfloat16) == 0.0


def of(values, tau, dtype=torch.float32, **options):
    """An optimizer whose u is -lr * sign(g)."""
    base = {"betas": (0.0, 0.0), "eps": 0.0, "lr": 0.5, "alpha": 0.5, "weight_decay": 0.0, "reserve_rate": 1.0}
    return optimizer_of(parameter(values, dtype), tau, **base | options)


def step(optimizer):
    """Take a step; returns the statistics after it of the only tensor."""
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.tensor((2.0, 3.0, -1.0, -4.0), dtype=param.dtype)
    optimizer.step()
    return optimizer.merge_stats().get("w", {})


def test_the_optimizer_reports_its_step():
    # u = -lr * sign(g) = (-0.5, -0.5, 0.5, 0.5).
    stats = step(of([1.0, 1.0, 1.0, 2.0**25], [0.0, 2.0, 2.0, 1.0], stats_every=1))
    assert stats == {
        "cosine": pytest.approx(0.5 / 3),
        "kept_u": 1.0,
        "kept_tau": 0.75,
        "conflicts": pytest.approx(1 / 3),
        "norm_u": 1.0,
        "norm_tau": 3.0,
        # (-0.25, 0.75, 1.25, 0.75)
        "norm_merged": pytest.approx(2.75**0.5),
        "lost": pytest.approx(1 / 3),
        # Of the four, 0.25 into 2^25.
        "lost_u": 0.25,
    }
    assert all(isinstance(value, float) for value in stats.values())


@pytest.mark.parametrize(("master", "lost"), [("none", 1.0), ("fp32", 0.0), ("split", 0.0)])
def test_a_master_loses_less(master, lost):
    # alpha * tau = 2^-10, where the neighbors of 1 in bf16 are at least 2^-8 away.
    options = {"alpha": 2.0**-6, "lr": 2.0**-12, "stats_every": 1}
    optimizer = of([1.0] * 4, [2.0**-4] * 4, torch.bfloat16, master=master, **options)
    stats = step(optimizer)
    assert stats["lost"] == lost
    # u = 2^-12 goes the way of 2^-10; where both are exact, none is lost.
    assert stats["lost_u"] == lost


def test_the_density_that_ties_leave_is_reported():
    # p = 0.5 asks for two of four; all of |u| and three of |tau| are equal.
    stats = step(of([1.0] * 4, [2.0, -2.0, 2.0, 1.0], method="onties", reserve_rate=0.5, stats_every=1))
    assert (stats["kept_u"], stats["kept_tau"]) == (1.0, 0.75)


def test_only_every_nth_step_is_looked_at():
    optimizer, seen = of([1.0] * 4, [1.0] * 4, stats_every=3), []
    for i in range(1, 8):
        optimizer.param_groups[0]["lr"] = float(i)
        # |u| = lr on four elements.
        seen.append(step(optimizer).get("norm_u"))
    assert seen == [None, None, 6.0, 6.0, 6.0, 12.0, 12.0]


def test_between_merges_there_is_nothing_to_look_at():
    optimizer = of([1.0] * 4, [1.0] * 4, merge_every=3, stats_every=1)
    norms = [step(optimizer).get("norm_u") for _ in range(7)]
    # A window of three steps of lr = 0.5 each on four elements.
    assert norms == [None, None, 3.0, 3.0, 3.0, 3.0, 3.0]


def test_a_skipped_merge_has_no_stats():
    optimizer = of([1.0] * 4, [1.0] * 4, stats_every=1, lr=0.0)
    assert step(optimizer) == {}
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.found_inf = torch.tensor(1.0)
    assert step(optimizer) == {}
    optimizer.found_inf = torch.tensor(0.0)
    assert step(optimizer)["norm_u"] == 1.0


def test_statistics_change_no_bit():
    ends = []
    for every in (0, 1):
        optimizer = of([1.0, 2.0, 3.0, 4.0], [0.1, -0.2, 0.3, 0.4], stats_every=every)
        run(optimizer, 3)
        ends.append(states(optimizer))
    assert_same_bits(*ends)


def test_a_tensor_without_a_delta_has_no_stats():
    optimizer = of([1.0] * 2, [1.0] * 2, stats_every=1)
    optimizer.add_param_group({"params": [("head", parameter([1.0] * 2))], "missing": "plain"})
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.merge_stats()) == {"w"}


def test_asking_without_collecting_is_refused():
    with pytest.raises(ValueError, match="no statistics are collected; pass stats_every=n to look at every n-th step"):
        step(of([1.0] * 4, [1.0] * 4))


@pytest.mark.parametrize(
    ("dtype", "options", "lost"),
    [
        # alpha * tau = 2^-10; the neighbors of 1 in bf16 are 2^-7 away, in fp16 2^-10.
        (torch.bfloat16, {}, "100 % of 'w'"),
        (torch.float16, {}, None),
        (torch.float32, {}, None),
        (torch.bfloat16, {"master": "fp32"}, None),
        (torch.bfloat16, {"master": "split"}, None),
        (torch.bfloat16, {"rounding": "stochastic"}, None),
        (torch.bfloat16, {"alpha": 0.0}, None),
        (torch.bfloat16, {"alpha": 2.0**-1}, None),
        # Rescaled: 2^-10 / p.
        (torch.bfloat16, {"reserve_rate": 2.0**-4}, None),
        (torch.bfloat16, {"reserve_rate": 2.0**-4, "rescale": False}, "100 % of 'w'"),
        (torch.float32, {"alpha": 2.0**-22}, "100 % of 'w'"),
        (torch.float32, {"alpha": 2.0**-22, "rounding": "stochastic"}, None),
        (torch.bfloat16, {"alpha": 2.0**-22, "master": "split"}, "100 % of 'w'"),
    ],
    ids=str,
)
def test_binding_warns_of_what_rounding_will_lose(dtype, options, lost, caplog):
    optimizer = of([1.0] * 200, [2.0**-4] * 200, dtype, **{"alpha": 2.0**-6} | options)
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.bind()
        optimizer.bind()
    messages = [record.message for record in caplog.records]
    assert len(messages) == (lost is not None)
    if lost:
        assert "will change no bit for more than 20 % of the kept entries of 1 tensors" in messages[0]
        assert lost in messages[0]


@pytest.mark.parametrize(
    ("dtype", "options", "lost"),
    [
        # Adam's updates are about lr = 2^-10; the neighbors of 1 in bf16 are 2^-7 away, in fp16 2^-10.
        (torch.bfloat16, {}, "100 % of 'w'"),
        (torch.float16, {}, None),
        (torch.float32, {}, None),
        (torch.float32, {"lr": 2.0**-25}, "100 % of 'w'"),
        (torch.bfloat16, {"master": "fp32"}, None),
        (torch.bfloat16, {"master": "split"}, None),
        (torch.bfloat16, {"master": "split", "lr": 2.0**-25}, "100 % of 'w'"),
        (torch.bfloat16, {"rounding": "stochastic"}, None),
        (torch.bfloat16, {"lr": 2.0**-7}, None),
        (torch.bfloat16, {"lr": torch.tensor(2.0**-10)}, "100 % of 'w'"),
        # (1 - alpha) * u, over p where it is rescaled; between the merges of step-K nothing is multiplied.
        (torch.bfloat16, {"lr": 2.0**-7, "alpha": 0.5}, "100 % of 'w'"),
        (torch.bfloat16, {"lr": 2.0**-7, "alpha": 0.5, "merge_every": 2}, None),
        (torch.bfloat16, {"reserve_rate": 2.0**-4}, None),
        (torch.bfloat16, {"reserve_rate": 2.0**-4, "rescale": False}, "100 % of 'w'"),
        (torch.bfloat16, {"reserve_rate": 2.0**-4, "merge_every": 2}, "100 % of 'w'"),
    ],
    ids=str,
)
def test_binding_warns_of_updates_that_rounding_will_lose(dtype, options, lost, caplog):
    # alpha * tau is 0 or large.
    optimizer = of([1.0] * 200, [1.0] * 200, dtype, **{"alpha": 0.0, "lr": 2.0**-10} | options)
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.bind()
    messages = [record.message for record in caplog.records]
    assert len(messages) == (lost is not None)
    if lost:
        assert (
            "adding an update as large as lr will change no bit for more than 20 % of the elements of 1" in messages[0]
        )
        assert f"({lost})" in messages[0]
        assert "use rounding='stochastic', a larger lr or, for 16-bit weights, a master" in messages[0]


def test_a_warm_up_from_zero_hides_no_lost_updates(caplog):
    optimizer = of([1.0] * 4, [1.0] * 4, torch.bfloat16, lr=2.0**-10)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.bind()
    assert [record.message[:32] for record in caplog.records] == ["adding an update as large as lr "]


def test_updates_of_what_steps_plainly_are_lost_as_well(caplog):
    optimizer = of([1.0] * 2, [1.0] * 2, lr=2.0**-10)
    optimizer.add_param_group({"params": [("head", parameter([1.0] * 2, torch.bfloat16))], "missing": "plain"})
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.bind()
    assert "(100 % of 'head')" in caplog.records[-1].message


def test_what_is_warned_of_is_what_happens(caplog):
    """As announced: bf16, a learning rate of 1e-6, no master."""
    values = torch.linspace(-0.06, 0.06, 999)
    optimizer = of(values, [0.01] * 999, torch.bfloat16, lr=1e-6, alpha=1e-6, stats_every=1)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.step()
    stats = optimizer.merge_stats()["w"]
    announced = caplog.records[-1].message
    assert f"({100 * stats['lost_u']:.0f} % of 'w')" in announced
    assert stats["lost_u"] > 0.98
    assert (param == before).float().mean() == pytest.approx(stats["lost_u"])


@pytest.mark.parametrize(("large", "warned"), [(1, False), (2, True)])
def test_a_fifth_may_be_lost(large, warned, caplog):
    # 0.5 * tau is lost in a weight of 512 and not in one of 1.
    optimizer = of([512.0] * large + [1.0] * (5 - large), [2.0] * 5, torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="fused_merge"):
        optimizer.bind()
    assert bool(caplog.records) == warned
