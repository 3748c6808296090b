"""The same mathematics once more, in numpy and float64, written from the papers and not from the library."""

from __future__ import annotations

import hashlib
import math

import numpy as np

Array = np.ndarray


def philox(c: tuple[Array, Array, Array, Array], k0: int, k1: int) -> Array:
    """Philox4x32-10 in uint64 arithmetic; returns the four words in the last axis."""
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in c)
    low = np.uint64(2**32 - 1)
    shift = np.uint64(32)
    for _ in range(10):
        p0 = x0 * np.uint64(0xD2511F53)
        p1 = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = ((p1 >> shift) ^ x1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ x3 ^ np.uint64(k1), p0 & low)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1)


def name_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")


def words(n: int, seed: int, step: int, name: str, domain: int, first: int = 0) -> Array:
    """The random number of each element from the first on: word e & 3 of block e >> 2."""
    e = np.arange(first, first + n, dtype=np.uint64)
    block = e >> np.uint64(2)
    counter = (
        block & np.uint64(2**32 - 1),
        (block >> np.uint64(32)) | np.uint64(domain << 24),
        np.full(n, step, dtype=np.uint64),
        np.full(n, name_id(name), dtype=np.uint64),
    )
    blocks = philox(counter, seed % 2**32, seed // 2**32 % 2**32)
    return blocks[np.arange(n), (e & np.uint64(3)).astype(int)]


def keep(n: int, rate: float, seed: int, step: int, name: str, domain: int) -> Array:
    """The mask of design: the random number is below floor(rate * 2^32)."""
    return words(n, seed, step, name, domain) < math.floor(rate * 2**32)


def top(x: Array, rate: float) -> Array:
    k = max(1, math.floor(rate * x.size))
    return np.abs(x) >= np.sort(np.abs(x), axis=None)[-k]


def soft(x: Array, rate: float) -> Array:
    k = max(1, math.floor(rate * x.size))
    return np.sign(x) * np.maximum(np.abs(x) - np.sort(np.abs(x), axis=None)[-k], 0)


def projected(x: Array, tau: Array, how: str, strength: float, over: str, uphill: bool) -> Array:
    """Row by row in a loop; over the tensor is one long row."""
    rows = len(x) if over == "rows" and x.ndim > 1 else 1
    out = []
    for a, t in zip(x.reshape(rows, -1), tau.reshape(rows, -1), strict=True):
        if not t.any():
            out.append(a)
            continue
        along = a.dot(t) / t.dot(t) * t
        if how == "onto":
            out.append((1 - strength) * a + strength * along)
        elif (-a if uphill else a).dot(t) < 0:
            out.append(np.where(np.abs(a - along) < 2.0**-20 * (np.abs(a) + np.abs(along)), 0, a - along))
        else:
            out.append(a)
    return np.array(out).reshape(x.shape)


def merged(u: Array, tau: Array, update_weight: float, tau_weight: float, consensus: str) -> Array:
    if consensus == "linear":
        return update_weight * u + tau_weight * tau
    if consensus == "reference":
        sign = np.where(u + tau >= 0, 1.0, -1.0)
        return update_weight * np.where(np.sign(u) == sign, u, 0) + tau_weight * np.where(np.sign(tau) == sign, tau, 0)
    a, b = update_weight * u, tau_weight * tau
    return np.where(a * b >= 0, a + b, np.where(np.abs(a) > np.abs(b), a, np.where(a == -b, 0.0, b)))


class Run:
    """A merged AdamW over several steps of one tensor."""

    def __init__(
        self, theta: Array, m: Array, v: Array, t: int, tau: Array, name: str, **options: float | str | bool
    ) -> None:
        self.theta, self.m, self.v, self.full = (x.astype(np.float64) for x in (theta, m, v, tau))
        self.t = t
        self.name = name
        self.o = {"reserve_rate": 1.0, "seed": 0, "merge_every": 1, "rescale": True, "vote": "reference"}
        self.o |= {"project": None, "project_on": "gradient", "project_over": "tensor", "project_strength": 1.0}
        self.o |= options
        self.tau = self.sparsified(self.full, 0, 1)
        self.anchor, self.since = self.theta.copy(), 1.0

    def sparsified(self, x: Array, step: int, domain: int) -> Array:
        p, method = self.o["reserve_rate"], self.o["method"]
        if p == 1 or method == "onproj":
            return x
        if method == "onsoft":
            return soft(x, p)
        if method == "onties":
            return np.where(top(x, p), x, 0)
        return np.where(keep(x.size, p, self.o["seed"], step, self.name, domain).reshape(x.shape), x, 0)

    def projected(self, x: Array, on: str) -> Array:
        o = self.o
        if o["project"] is None or o["project_on"] != on:
            return x
        return projected(x, self.full, o["project"], o["project_strength"], o["project_over"], on == "gradient")

    def merged(self, u: Array) -> Array:
        """F(u) ⊕ F(tau) of this step."""
        o = self.o
        scale = 1 / o["reserve_rate"] if o["method"] == "ondare" and o["rescale"] else 1.0
        consensus = o["vote"] if o["method"] == "onties" else "linear"
        u = self.sparsified(u, self.t, 0)
        return merged(u, self.tau, scale * (1 - o["alpha"]), scale * o["alpha"], consensus)

    def step(self, g: Array) -> None:
        o, lr = self.o, self.o["lr"]
        b1, b2 = o["betas"]
        self.t += 1
        g = self.projected(g.astype(np.float64), "gradient")
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        if lr == 0:
            return
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        u = self.projected(-lr * m_hat / (np.sqrt(v_hat) + o["eps"]), "update")
        self.theta = self.theta * (1 - lr * o["weight_decay"]) + u
        self.since *= 1 - lr * o["weight_decay"]
        if self.t % o["merge_every"] == 0:
            start = self.since * self.anchor
            self.theta = start + self.merged(self.theta - start)
            self.anchor, self.since = self.theta.copy(), 1.0
