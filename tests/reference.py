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
        x0, x1, x2, x3 = (
            (p1 >> shift) ^ x1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ x3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1)


def name_id(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")


def keep(n: int, rate: float, seed: int, step: int, name: str, domain: int) -> Array:
    """The mask of design: word e & 3 of block e >> 2 is below floor(rate * 2^32)."""
    e = np.arange(n, dtype=np.uint64)
    block = e >> np.uint64(2)
    counter = (
        block & np.uint64(2**32 - 1),
        (block >> np.uint64(32)) | np.uint64(domain << 24),
        np.full(n, step, dtype=np.uint64),
        np.full(n, name_id(name), dtype=np.uint64),
    )
    words = philox(counter, seed % 2**32, seed // 2**32 % 2**32)
    return words[np.arange(n), (e & np.uint64(3)).astype(int)] < math.floor(rate * 2**32)


def top(x: Array, rate: float) -> Array:
    k = max(1, math.floor(rate * x.size))
    return np.abs(x) >= np.sort(np.abs(x), axis=None)[-k]


class Run:
    """A merged AdamW over several steps of one vector."""

    def __init__(
        self, theta: Array, m: Array, v: Array, t: int, tau: Array, name: str, **options: float | str | bool
    ) -> None:
        self.theta, self.m, self.v = (x.astype(np.float64) for x in (theta, m, v))
        self.t = t
        self.name = name
        self.o = options
        p, seed = options["reserve_rate"], options.get("seed", 0)
        if p < 1:
            chosen = keep(tau.size, p, seed, 0, name, 1) if options["method"] == "ondare" else top(tau, p)
            tau = np.where(chosen, tau, 0)
        self.tau = tau.astype(np.float64)

    def step(self, g: Array) -> None:
        o, p, alpha = self.o, self.o["reserve_rate"], self.o["alpha"]
        b1, b2 = o["betas"]
        self.t += 1
        g = g.astype(np.float64)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        u = -o["lr"] * m_hat / (np.sqrt(v_hat) + o["eps"])
        self.theta *= 1 - o["lr"] * o["weight_decay"]
        if o["method"] == "ondare":
            if p < 1:
                u = np.where(keep(u.size, p, o.get("seed", 0), self.t, self.name, 0), u, 0)
            scale = 1 / p if o.get("rescale", True) else 1.0
            self.theta += scale * ((1 - alpha) * u + alpha * self.tau)
            return
        if p < 1:
            u = np.where(top(u, p), u, 0)
        if o.get("vote", "reference") == "reference":
            sign = np.where(u + self.tau >= 0, 1.0, -1.0)
            u = np.where(np.sign(u) == sign, u, 0)
            tau = np.where(np.sign(self.tau) == sign, self.tau, 0)
            self.theta += (1 - alpha) * u + alpha * tau
            return
        a, b = (1 - alpha) * u, alpha * self.tau
        self.theta += np.where(a * b >= 0, a + b, np.where(np.abs(a) > np.abs(b), a, np.where(a == -b, 0.0, b)))
