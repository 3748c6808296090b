"""Online merging as its paper prints it, operation by operation in plain PyTorch: what `make bench` compares with.

Lu et al. 2024 (arXiv 2405.17931), algorithm 1: Adam's update is sparsified and merged with the sparsified reference
delta, tensor by tensor, with a dense tau. The paper sparsifies tau inside the step; here it is done once, as its
authors' code does, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def random_drop(x: Tensor, rate: float) -> Tensor:
    """Return x where a coin of probability p says so (equation 4, after DARE), divided by p as in the experiments."""
    return x * torch.bernoulli(torch.full_like(x, rate)) / rate


def top_magnitudes(x: Tensor, rate: float) -> Tensor:
    """Return the share p of x with the largest magnitudes (equation 5, after TIES)."""
    magnitudes = x.abs()
    k = max(1, int(rate * x.numel()))
    return torch.where(magnitudes >= magnitudes.flatten().kthvalue(x.numel() - k + 1).values, x, 0.0)


def weighted_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return a + b (equation 4)."""
    return a + b


def sign_consensus(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of what has the sign of a + b (equations 6 and 7)."""
    elected = (a + b).sign()
    return a * (a.sign() == elected) + b * (b.sign() == elected)


METHODS = {"ondare": (random_drop, weighted_sum), "onties": (top_magnitudes, sign_consensus)}


class PublishedOnlineMerging(torch.optim.Optimizer):
    """Adam with theta += (1 - alpha)*F(u) ⊕ alpha*F(tau).

    Args:
        params: parameters.
        taus: the reference delta of each, of its shape and dtype.
        method: a key of `METHODS`, which has F and ⊕.
        rate: p, the share of elements that F keeps.
        alpha, lr, betas, eps: as in the paper.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        taus: Iterable[Tensor],
        method: str,
        rate: float,
        alpha: float = 1e-6,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "betas": betas, "eps": eps, "rate": rate})
        self._sparsify, self._merge = METHODS[method]
        (group,) = self.param_groups
        for param, tau in zip(group["params"], taus, strict=True):
            self.state[param] = {
                "step": 0,
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
                "tau": self._sparsify(tau, rate),
            }

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        for group in self.param_groups:
            (beta1, beta2), alpha = group["betas"], group["alpha"]
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(param.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                unbiased_m = m / (1 - beta1 ** state["step"])
                unbiased_v = v / (1 - beta2 ** state["step"])
                u = -group["lr"] * unbiased_m / (unbiased_v.sqrt() + group["eps"])
                param.add_(self._merge((1 - alpha) * self._sparsify(u, group["rate"]), alpha * state["tau"]))
