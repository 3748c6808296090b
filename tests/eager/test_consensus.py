"""Every case of ⊕ by hand: agreeing, opposed, tied, zero, NaN."""

from __future__ import annotations

import pytest
import torch
from one_tensor import draw

from fused_merge.eager.consensus import linear, sign_paper, sign_reference

NAN = float("nan")


def merged(function, u, tau, alpha):
    return function(torch.tensor([u]), torch.tensor([tau]), 1 - alpha, alpha).item()


@pytest.mark.parametrize(
    ("u", "tau", "by_code", "as_printed"),
    [
        (4.0, 2.0, 3.5, 3.5),  # both +: the weighted sum
        (-4.0, -2.0, -3.5, -3.5),
        (4.0, -2.0, 3.0, 3.0),  # u + tau = 2 elects +: only u
        (2.0, -4.0, -1.0, 1.5),  # u + tau = -2 elects -: only tau; 1.5 against -1: u wins although tau is larger
        (-4.0, 2.0, -3.0, -3.0),
        (-2.0, 4.0, 1.0, -1.5),
        (1.0, -4.0, -1.0, -1.0),  # 0.75 against -1
        (-1.0, 4.0, 1.0, 1.0),
        (4.0, -12.0, -3.0, 0.0),  # 3 against -3: equal magnitudes cancel
        (4.0, -4.0, 3.0, 3.0),  # a tie elects +
        (-4.0, 4.0, 1.0, -3.0),
        (0.0, -4.0, -1.0, -1.0),  # zeros oppose nobody
        (4.0, 0.0, 3.0, 3.0),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_every_consensus_by_hand(u, tau, by_code, as_printed):
    assert merged(linear, u, tau, 0.25) == 0.75 * u + 0.25 * tau
    assert merged(sign_reference, u, tau, 0.25) == by_code
    assert merged(sign_paper, u, tau, 0.25) == as_printed


def test_opposite_terms_whose_product_underflows_are_still_opposed():
    assert merged(sign_paper, 1e-30, -2e-30, 0.5) == pytest.approx(-1e-30, rel=1e-6)


@pytest.mark.parametrize("function", [linear, sign_reference, sign_paper])
def test_a_nan_update_stays(function):
    assert merged(function, NAN, 3.0, 0.25) != merged(function, NAN, 3.0, 0.25)


def test_with_a_small_alpha_the_two_votes_are_two_optimizers():
    u, tau = draw(10_000, 1e-6), draw(10_000, 1e-3, 1)
    opposed = u * tau < 0
    alpha = 1e-7
    by_code = sign_reference(u, tau, 1 - alpha, alpha)[opposed]
    as_printed = sign_paper(u, tau, 1 - alpha, alpha)[opposed]
    # The code elects tau's sign and drops the update; the formula keeps the update.
    assert (by_code.sign() == tau[opposed].sign()).float().mean() > 0.99
    assert (as_printed.sign() == u[opposed].sign()).float().mean() > 0.99
