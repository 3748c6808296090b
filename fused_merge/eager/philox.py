"""Random masks that depend on (seed, step, name, element) and on nothing else.

Word `e & 3` of the block of Philox4x32-10 at counter `e >> 2` belongs to element `e` of the *unsharded* tensor. A mask
is therefore the same on every device, for every block size and for every way of cutting the tensor into shards.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.shard import ShardIndex

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

DOMAIN_UPDATE = 0
DOMAIN_TAU = 1
DOMAIN_ROUNDING = 2

_MASK32 = 0xFFFFFFFF
# Blocks drawn at once: enough to wake torch's threads, few enough to stay in a cache.
_BLOCKS_PER_CHUNK = 1 << 15


class MaskKey(NamedTuple):
    """All that the random numbers of one tensor depend on."""

    seed: int  # 64 bits: the key of Philox
    step: float | Tensor  # counter word 2: the optimizer step, 0 for tau; a 0-d tensor is never read by the host
    tensor_id: int  # counter word 3: `fused_merge.names.tensor_id` of the tensor's name
    domain: int  # top byte of counter word 1
    shard: ShardIndex | None = None  # where local elements lie in the unsharded tensor; None for a whole one


def _philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10, int64 in [0, 2^32), of a counter and a key of such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product wraps modulo 2^64; shift and mask read its high word as if it were unsigned.
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK32) ^ c1 ^ k0,
            high & _MASK32,
            ((low >> 32) & _MASK32) ^ c3 ^ k1,
            low & _MASK32,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _MASK32, (k1 + KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def _draw(numel: int, threshold: int | None, key: MaskKey, device: torch.device | str) -> Tensor:
    """Return which words are below `threshold`, or the words themselves without one."""
    out = torch.zeros(numel, dtype=torch.int64 if threshold is None else torch.bool, device=device)
    if numel == 0:
        return out
    step = torch.as_tensor(key.step, dtype=torch.int64, device=device)
    offset, inner, global_inner = key.shard or ShardIndex.whole(numel)
    inner = min(inner, numel)
    if numel % inner:
        raise ValueError(f"a shard of {numel} elements is not made of whole runs of {inner}")
    grid = out.view(-1, inner)
    # Rows are runs, drawn as whole blocks in pieces that fit a cache, then trimmed to their elements.
    width = min(4 * _BLOCKS_PER_CHUNK, inner)
    rows_per_chunk = max(1, 4 * _BLOCKS_PER_CHUNK // width)
    for rows, columns in product(range(0, len(grid), rows_per_chunk), range(0, inner, width)):
        piece = grid[rows : rows + rows_per_chunk, columns : columns + width]
        run = torch.arange(rows, rows + len(piece), device=out.device)
        start = (offset + columns + run * global_inner)[:, None]
        blocks = (start >> 2) + torch.arange((piece.shape[1] + 6) // 4, device=out.device)
        lanes = (start & 3) + torch.arange(piece.shape[1], device=out.device)
        name = torch.full_like(blocks, key.tensor_id)
        counter = (blocks & _MASK32, (key.domain << 24) | (blocks >> 32), step.expand_as(blocks), name)
        words = _philox4x32(counter, (key.seed & _MASK32, (key.seed >> 32) & _MASK32))
        values = words if threshold is None else tuple(word < threshold for word in words)
        piece.copy_(torch.stack(values, dim=-1).flatten(-2).gather(1, lanes))
    return out


def random_words(numel: int, key: MaskKey, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the 32-bit word of each of `numel` local, row-major elements as int64 `[numel]` on `device`."""
    return _draw(numel, None, key, device)


def keep_threshold(rate: float) -> int:
    """Return floor(rate * 2^32): an element is kept iff its 32-bit word is below it (`0 < rate < 1`)."""
    return int(rate * 2**32)


def keep_mask(numel: int, rate: float, key: MaskKey, *, device: torch.device | str = "cpu") -> Tensor:
    """Return which of `numel` local, row-major elements a random drop keeps, as bool `[numel]` on `device`.

    `rate` is the probability of keeping one, in (0, 1]; 1 keeps all without drawing a number.
    """
    if rate == 1.0:
        return torch.ones(numel, dtype=torch.bool, device=device)
    return _draw(numel, keep_threshold(rate), key, device)
