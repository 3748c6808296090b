"""Random words of compiled code, word for word those of the eager one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import same_bits
from numba import njit

from fused_merge.compiled import philox
from fused_merge.compiled.layout import TensorEntry
from fused_merge.compiled.memory import BLOCK
from fused_merge.compiled.scratch import PLACES, RANDOM_WORDS, ROOM, scratch
from fused_merge.eager.philox import DOMAIN_ROUNDING, DOMAIN_UPDATE, MaskKey, keep_mask, keep_threshold, random_words
from fused_merge.eager.shard import ShardIndex

STEP, TENSOR_ID = 7.0, 0xFFFF_FFF1


@njit
def kept_places(t, base, count, step, domain, room, places):
    return philox.kept_places(t, base, count, step, domain, room, places)


@njit
def rounding_words(t, base, count, step, room, out):
    philox.rounding_words(t, base, count, step, room, out)


@njit
def random_word(t, i, step, domain):
    return np.int64(philox.random_word(t, i, step, domain))


# Whole ones, rows that begin anywhere, columns, and elements past 2^34, where the upper half of counters counts.
SHARDS = [
    ShardIndex.whole(10_000),
    *(ShardIndex(offset, 10_000, 10_000) for offset in (1, 2, 3, 4093, 2**33 - 5001, 2**34 - 5003, 2**40 + 1)),
    *(
        ShardIndex(start, width, total)
        for start, width, total in ((0, 1, 2), (5, 7, 13), (16, 16, 64), (3, 4100, 9999))
    ),
    ShardIndex(2**34 - 40_003, 25, 77),
]
SEEDS = [0, 3, -1, 2**63 + 5, -(2**63), 2**64 - 1]


def entry(shard, seed, rate):
    fields = dict.fromkeys(TensorEntry._fields, 0) | shard._asdict()
    fields |= {"tensor_id": TENSOR_ID, "seed": (seed + 2**63) % 2**64 - 2**63, "keep_threshold": keep_threshold(rate)}
    return np.array(list(fields.values()), np.int64)


def pieces(numel):
    """Blocks, and the end of the tensor."""
    return [(base, min(BLOCK, numel - base)) for base in range(0, numel, BLOCK)]


@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_words_and_masks(shard, seed):
    numel = 10_000 // shard.local_inner * shard.local_inner
    room = scratch(1)
    table = {rate: entry(shard, seed, rate) for rate in (0.01, 0.5, 1 - 2**-32)}
    key = MaskKey(seed, STEP, TENSOR_ID, DOMAIN_UPDATE, shard)
    for rate, t in table.items():
        kept = torch.zeros(numel, dtype=torch.bool)
        for base, count in pieces(numel):
            places = room[0, PLACES * ROOM :].view(np.int32)
            found = kept_places(t, base, count, np.float32(STEP), DOMAIN_UPDATE, room.ctypes.data, places.ctypes.data)
            kept[base + torch.from_numpy(places[:found].astype(np.int64))] = True
            assert (np.diff(places[:found]) > 0).all()
        assert torch.equal(kept, keep_mask(numel, rate, key))
    expected = random_words(numel, key._replace(domain=DOMAIN_ROUNDING))
    words = torch.full((numel,), -1)
    for base, count in pieces(numel):
        row = room[0, RANDOM_WORDS * ROOM :].view(np.uint32)
        rounding_words(t, base, count, np.float32(STEP), room.ctypes.data, row.ctypes.data)
        words[base : base + count] = torch.from_numpy(row[:count].astype(np.int64))
    assert same_bits(words, expected)
    for i in (0, 1, 2, 3, 4, 99, numel - 1):
        assert random_word(t, i, np.float32(STEP), DOMAIN_ROUNDING) == expected[i]


@pytest.mark.parametrize("step", [1.0, 2.0**24])
def test_the_step_is_part_of_the_counter(step):
    t, room = entry(ShardIndex.whole(100), 1, 0.5), scratch(1)
    places = room[0, PLACES * ROOM :].view(np.int32)
    found = kept_places(t, 0, 100, np.float32(step), DOMAIN_UPDATE, room.ctypes.data, places.ctypes.data)
    expected = keep_mask(100, 0.5, MaskKey(1, step, TENSOR_ID, DOMAIN_UPDATE))
    assert places[:found].tolist() == expected.nonzero().view(-1).tolist()
