"""Searches for ratios with a given mean: what to evaluate next, from what was found.

The set is {0 <= r_k <= 1, mean of r_k = rho}; everything is computed in fp64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# Added to each sigmoid, so that no part can vanish.
_EPSILON = 1e-3
# Of the largest second moment's root: what a part with hardly any gradient is scaled by at least.
_FLOOR = 1e-2


def project_ratios(x: Vector, mean: float, metric: Vector | None = None) -> Vector:
    """Return the point of {0 <= r_k <= 1, mean of r_k = `mean`} that is nearest to x.

    Nearest is what has the least sum of metric_k * (r_k - x_k)^2. It is clip(x - s / metric, 0, 1) for one s, which is
    bisected down to two neighbouring numbers; between what they give lies the mean, however coarse numbers are there.

    Args:
        x: any finite point.
        mean: in [0, 1].
        metric: positive; None is 1 for every ratio.
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
    nearest: Vector = np.clip(below + between * (above - below), 0.0, 1.0)
    return nearest


class Search(ABC):
    """Proposes ratios and learns what came of them; what it does depends on nothing else."""

    @abstractmethod
    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""

    @abstractmethod
    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""

    def best(self) -> Vector:
        """Return the ratios that it would choose now."""
        return self.propose()


class ProjectedAdam(Search):
    """Adam on the ratios themselves, projected in the metric of its own second moments.

    In that metric the projection undoes the scaling, so that it rests where all free ratios have one gradient: at the
    optimum. A Euclidean projection would rest elsewhere.
    """

    def __init__(self, start: Vector, mean: float, lr: float, betas: tuple[float, float], steps: int) -> None:
        self._ratios = project_ratios(start, mean)
        self._mean = mean
        self._adam = _Adam(len(start), lr, betas, steps)

    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""
        return self._ratios

    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""
        assert gradient is not None
        # Along (1, ..., 1) nothing can move: the moments should not see it.
        step, root = self._adam.step(gradient - gradient.mean())
        if root.max() > 0.0:
            metric = np.maximum(root, _FLOOR * root.max())
            self._ratios = project_ratios(self._ratios - step / metric, self._mean, metric)


class SigmoidAdam(Search):
    """Adam on w, with r_k = K * rho * (sigmoid(w_k) + e) / sum of the same, as in the paper's code."""

    def __init__(self, parts: int, mean: float, lr: float, betas: tuple[float, float], steps: int) -> None:
        self._w = np.zeros(parts)
        self._mean = mean
        self._adam = _Adam(parts, lr, betas, steps)

    def propose(self) -> Vector:
        """Return the next ratios to evaluate."""
        share = self._sigmoid() + _EPSILON
        return project_ratios(len(share) * self._mean * share / share.sum(), self._mean)

    def learn(self, loss: float, gradient: Vector | None) -> None:
        """Take the outcome of the last proposal."""
        assert gradient is not None
        sigmoid = self._sigmoid()
        share = sigmoid + _EPSILON
        weight = share / share.sum()
        # The chain rule through share / sum of shares.
        by_w = len(share) * self._mean / share.sum() * sigmoid * (1 - sigmoid) * (gradient - np.sum(weight * gradient))
        step, root = self._adam.step(by_w)
        self._w = self._w - step / np.where(root > 0, root, 1.0)

    def _sigmoid(self) -> Vector:
        sigmoid: Vector = 1.0 / (1.0 + np.exp(-self._w))
        return sigmoid


class CovarianceSearch(Search):
    """CMA-ES on points that are projected before they are evaluated."""

    def __init__(self, start: Vector, mean: float, deviation: float, seed: int) -> None:
        try:
            import cma
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a search without gradients needs the package cma: pip install 'fused_merge[search]'", name=error.name
            ) from None
        if len(start) < 2:
            raise ValueError("one part has only its mean; ask for two or more")
        self._mean = mean
        # A generator of its own: a seed would be that of numpy's common one, which belongs to the caller.
        options = {"randn": np.random.RandomState(seed).randn, "seed": np.nan, "verbose": -9, "verb_log": 0}
        self._strategy = cma.CMAEvolutionStrategy(project_ratios(start, mean), deviation, options)
        self._waiting: list[Vector] = []
        self._told: list[tuple[Vector, float]] = []
        self._best = (math.inf, project_ratios(start, mean))

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


class _Adam:
    """The moments of Adam, their bias corrections, and a learning rate that falls to 0 as a cosine."""

    def __init__(self, size: int, lr: float, betas: tuple[float, float], steps: int) -> None:
        self.momentum, self._second = np.zeros(size), np.zeros(size)
        self._lr = lr
        self._betas = betas
        self._steps = steps
        self._done = 0

    def step(self, gradient: Vector) -> tuple[Vector, Vector]:
        """Return rate times momentum, and the root of the second moment, both corrected."""
        rate = self._lr * 0.5 * (1.0 + math.cos(math.pi * self._done / self._steps))
        self._done += 1
        beta1, beta2 = self._betas
        self.momentum = beta1 * self.momentum + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        root = np.sqrt(self._second / (1.0 - beta2**self._done))
        return rate * self.momentum / (1.0 - beta1**self._done), root
