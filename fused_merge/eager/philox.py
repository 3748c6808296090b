"""Random masks that depend on (seed, step, name, element) and on nothing else.

Philox4x32-10 is a counter-based generator: word `e & 3` of the block at counter `e >> 2` belongs to element `e`
of the *unsharded* tensor. A mask is therefore the same on every device, for every block size and for every
way of cutting the tensor into shards.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fused_merge.sharding import ShardIndex

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

DOMAIN_UPDATE = 0
DOMAIN_TAU = 1

_MASK32 = 0xFFFFFFFF
# Blocks whose int64 intermediates stay in a core's cache.
_BLOCKS_PER_CHUNK = 1 << 15


def _philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit output words of Philox4x32-10, as int64 tensors in [0, 2^32).

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each word in [0, 2^32).
        key: two ints in [0, 2^32).
    """
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


def _block_words(block: Tensor, *, seed: int, step: int | Tensor, tensor_id: int, domain: int) -> Tensor:
    """Return the words of the Philox blocks `block` (int64 `[..., B]`) as int64 `[..., 4 * B]` in element order."""
    step_word = torch.as_tensor(step, device=block.device).to(torch.int64)
    counter = (
        block & _MASK32,
        (domain << 24) | (block >> 32),
        step_word.expand_as(block),
        torch.full_like(block, tensor_id),
    )
    words = _philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    return torch.stack(words, dim=-1).flatten(-2)


def keep_threshold(rate: float) -> int:
    """Return floor(rate * 2^32): an element is kept iff its 32-bit word is below it (`0 < rate < 1`)."""
    return int(rate * 2**32)


def keep_mask(
    numel: int,
    rate: float,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    domain: int,
    shard: ShardIndex | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return which of `numel` local elements a random drop at `rate` keeps.

    Args:
        numel: number of local, row-major elements.
        rate: probability of keeping an element, in (0, 1]; 1 keeps all without drawing a number.
        seed: 64-bit key; low and high word are the key of Philox.
        step: counter word 2: the optimizer step for updates, 0 for the reference delta. An int, or a 0-d
            tensor on `device`, which is then never read by the host.
        tensor_id: counter word 3, `fused_merge.names.tensor_id` of the tensor's name.
        domain: `DOMAIN_UPDATE` or `DOMAIN_TAU`, in the top byte of counter word 1.
        shard: where the local elements lie in the unsharded tensor; None for a whole tensor.
        device: where the mask is made.

    Returns:
        Bool tensor `[numel]` on `device`.
    """
    keep = torch.ones(numel, dtype=torch.bool, device=device)
    if rate == 1.0 or numel == 0:
        return keep
    offset, inner, global_inner = shard or ShardIndex.whole(numel)
    inner = min(inner, numel)
    if numel % inner:
        raise ValueError(f"a shard of {numel} elements is not made of whole runs of {inner}")
    threshold = keep_threshold(rate)
    grid = keep.view(-1, inner)
    # Rows are runs, drawn as whole blocks in pieces that fit a cache, then trimmed to their elements.
    width = min(4 * _BLOCKS_PER_CHUNK, inner)
    rows_per_chunk = max(1, 4 * _BLOCKS_PER_CHUNK // width)
    for rows, columns in product(range(0, len(grid), rows_per_chunk), range(0, inner, width)):
        piece = grid[rows : rows + rows_per_chunk, columns : columns + width]
        run = torch.arange(rows, rows + len(piece), device=device)
        start = (offset + columns + run * global_inner)[:, None]
        blocks = (start >> 2) + torch.arange((piece.shape[1] + 6) // 4, device=device)
        words = _block_words(blocks, seed=seed, step=step, tensor_id=tensor_id, domain=domain)
        lanes = (start & 3) + torch.arange(piece.shape[1], device=device)
        piece.copy_(words.gather(1, lanes) < threshold)
    return keep
