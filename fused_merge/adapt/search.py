"""Searches for ratios with a given mean: what to evaluate next, from what was found.

The set is {0 <= r_k <= 1, mean of r_k = rho}; everything is computed in fp64.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_EPSILON = 1e-3  # added to each sigmoid, so that no part can vanish
_FLOOR = 1e-2  # of the largest second moment's root: what a part with hardly any gradient is scaled by at least


def project_ratios(x: Vector, mean: float, metric: Vector | None = None) -> Vector:
    """Return the point of {0 <= r_k <= 1, mean of r_k = `mean`} that is nearest to x.

    Nearest is what has the least sum of metric_k * (r_k - x_k)^2, the metric being positive; None is 1 for all. It is
    clip(x - s / metric, 0, 1) for one s, which is bisected down to two neighboring numbers; between what they give
    lies the mean, however coarse numbers are there.
    """
    if mean in (0.0, 1.0):
        return np.full_like(x, mean)
    shift = np.ones_like(x) if metric is None else 1.0 / metric
    low, high = float(((x - 1.0) / shift).min()), float((x / shift).max())
    above, below = np.ones_like(x), np.zeros_like(x)
    while low < (middle := low + (high - low) / 2) < high:
        ratios = np.clip(x - middle * shift, 0.0, 1.0)
        if ratios.mean() > mean:
            low, above = middle, ratios
        else:
            high, below = middle, ratios
    between = (mean - below.mean()) / (above.mean() - below.mean())
    return np.asarray(np.clip(below + between * (above - below), 0.0, 1.0))


class ProjectedAdam:
    """Adam on the ratios themselves, projected in the metric of its own second moments.

    In that metric the projection undoes the scaling, so that it rests where all free ratios have one gradient: at the
    optimum. A Euclidean projection would rest elsewhere. It begins at `start`, whose mean is `mean`; the learning rate
    falls to 0 as a cosine in so many `steps`.
    """

    def __init__(self, start: Vector, mean: float, lr: float, betas: tuple[float, float], steps: int) -> None:
        self._x, self._mean = start, mean
        self._lr, self._betas, self._steps = lr, betas, steps
        self._momentum, self._second = np.zeros((2, len(start)))
        self._done = 0

    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""
        return self._x

    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""
        assert gradient is not None
        # Along (1, ..., 1) nothing can move: the moments should not see it.
        step, root = self._step(gradient - gradient.mean())
        if root.max() > 0.0:
            metric = np.maximum(root, _FLOOR * root.max())
            self._x = project_ratios(self._x - step / metric, self._mean, metric)

    def best(self) -> Vector:
        """Return the ratios that it would choose now."""
        return self.propose()

    def _step(self, gradient: Vector) -> tuple[Vector, Vector]:
        """Return rate times momentum, and the root of the second moment, both corrected."""
        rate = self._lr * 0.5 * (1.0 + math.cos(math.pi * self._done / self._steps))
        self._done += 1
        beta1, beta2 = self._betas
        self._momentum = beta1 * self._momentum + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        root = np.sqrt(self._second / (1.0 - beta2**self._done))
        return rate * self._momentum / (1.0 - beta1**self._done), root


class SigmoidAdam(ProjectedAdam):
    """Adam on w, from `start`, with r_k = K * rho * (sigmoid(w_k) + e) / sum of the same, as in the paper's code."""

    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""
        share = 1.0 / (1.0 + np.exp(-self._x)) + _EPSILON
        return project_ratios(len(share) * self._mean * share / share.sum(), self._mean)

    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""
        assert gradient is not None
        sigmoid = 1.0 / (1.0 + np.exp(-self._x))
        share = sigmoid + _EPSILON
        weight = share / share.sum()
        # The chain rule through share / sum of shares.
        by_w = len(share) * self._mean / share.sum() * sigmoid * (1 - sigmoid) * (gradient - np.sum(weight * gradient))
        step, root = self._step(by_w)
        self._x = self._x - step / np.where(root > 0, root, 1.0)


class CovarianceSearch:
    """CMA-ES on points that are projected before they are evaluated."""

    def __init__(self, start: Vector, mean: float, deviation: float, seed: int) -> None:
        try:
            import cma
        except ModuleNotFoundError as error:
            message = "a search without gradients needs the package cma: pip install 'fused_merge[search]'"
            raise ModuleNotFoundError(message, name=error.name) from None
        if len(start) < 2:
            raise ValueError("one part has only its mean; ask for two or more")
        self._mean = mean
        # A generator of its own: a seed would be that of numpy's common one, which belongs to the caller.
        options = {"randn": np.random.RandomState(seed).randn, "seed": np.nan, "verbose": -9, "verb_log": 0}
        self._strategy = cma.CMAEvolutionStrategy(start, deviation, options)
        self._waiting: list[Vector] = []
        self._told: list[tuple[Vector, float]] = []
        self._best = (math.inf, start)

    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""
        if not self._waiting:
            self._waiting = [np.asarray(x) for x in self._strategy.ask()]
        return project_ratios(self._waiting[0], self._mean)

    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""
        proposed = self._waiting.pop(0)
        ratios = project_ratios(proposed, self._mean)
        self._best = min(self._best, (loss, ratios), key=lambda found: found[0])
        # What lies outside is evaluated where it is projected to, and is the worse the further it lies.
        self._told.append((proposed, loss + float(np.sum((proposed - proposed.mean() - ratios + ratios.mean()) ** 2))))
        if not self._waiting:
            self._strategy.tell(*map(list, zip(*self._told, strict=True)))
            self._told = []

    def best(self) -> Vector:
        """Return the ratios that it would choose now."""
        return self._best[1]


# Proposes ratios and learns what came of them; what it does depends on nothing else.
Search: TypeAlias = ProjectedAdam | CovarianceSearch
