from __future__ import annotations

import math

import pytest
import torch

from fused_merge.eager import adamw
from fused_merge.eager.precision import sqrt_rn
from fused_merge.eager.scalars import Hyper, derive_scalars, scalar_table

HYPER = Hyper(lr=0.1, betas=(0.9, 0.99), eps=0.5, weight_decay=0.2, alpha=0.25)


def test_two_steps_by_hand():
    # g = 2 then -1, with b1 = 1/2, b2 = 3/4, lr = 1, eps = 0: every number is exact.
    hyper = Hyper(lr=1.0, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0, alpha=0.0)
    m, v = torch.zeros(1), torch.zeros(1)
    m, v = adamw.moments(torch.tensor([2.0]), m, v, derive_scalars(1.0, hyper))
    assert (m.item(), v.item()) == (1.0, 1.0)
    # m/bc1 = 1/0.5 = 2, v/bc2 = 1/0.25 = 4: u = -2/2.
    assert adamw.update(m, v, derive_scalars(1.0, hyper)).item() == -1.0
    m, v = adamw.moments(torch.tensor([-1.0]), m, v, derive_scalars(2.0, hyper))
    assert (m.item(), v.item()) == (0.0, 1.0)
    assert adamw.update(m, v, derive_scalars(2.0, hyper)).item() == 0.0


def test_the_scalars_by_hand():
    s = derive_scalars(2.0, HYPER._replace(update_scale=4.0, tau_scale=8.0))
    assert s.step_size == 0.1 / (1 - 0.9**2)
    assert s.inv_sqrt_bias2 == pytest.approx(1 / math.sqrt(1 - 0.99**2), rel=1e-15)
    assert s.decay == 1 - 0.1 * 0.2
    assert (s.update_weight, s.tau_weight) == (0.75 * 4.0, 0.25 * 8.0)
    assert (s.step, s.eps, s.moves) == (2.0, 0.5, 1.0)
    assert derive_scalars(1.0, HYPER._replace(lr=0.0)).moves == 0.0


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_tensors_and_floats_give_one_table(lr):
    steps = [torch.tensor(1.0), torch.tensor(1000.0), torch.tensor(1.0)]
    here = torch.device("cpu")
    by_host = scalar_table(steps, HYPER._replace(lr=lr), here)
    by_tensor = scalar_table(steps, HYPER._replace(lr=torch.tensor(lr, dtype=torch.float64)), here)
    assert by_host.dtype == by_tensor.dtype == torch.float64
    torch.testing.assert_close(by_host, by_tensor, rtol=1e-15, atol=0)
    assert torch.equal(by_host[0], by_host[2])
    assert torch.equal(by_host[1], torch.tensor(derive_scalars(1000.0, HYPER._replace(lr=lr)), dtype=torch.float64))


def test_the_square_root_is_correctly_rounded():
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    root = sqrt_rn(x)
    # Half a unit in the last place to either side: the exact root lies between their squares.
    up = torch.nextafter(root, torch.tensor(torch.inf)).double()
    down = torch.nextafter(root, torch.tensor(-torch.inf)).double()
    exact = x.double().sqrt()
    assert (exact <= (root.double() + up) / 2).all()
    assert (exact >= (root.double() + down) / 2).all()
