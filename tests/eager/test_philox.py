from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import triton
import triton.language as tl
from device import DEVICE

from fused_merge.eager import philox
from fused_merge.eager.philox import DOMAIN_TAU, DOMAIN_UPDATE, MaskKey, keep_mask, random_words
from fused_merge.eager.shard import ShardIndex
from fused_merge.kernels import philox as device_functions
from fused_merge.names import tensor_id

KEY = MaskKey(seed=2**40 + 12345, step=7, tensor_id=tensor_id("layers.0.weight"), domain=DOMAIN_UPDATE)

# From the test vectors of the Random123 library (kat_vectors, philox4x32 10): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    output = philox._philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in output) == words
    assert tuple(reference.philox(tuple(np.array([word]) for word in counter), *key)[0]) == words


@pytest.mark.parametrize("n", [0, 1, 4, 127, 1025, 5001])
@pytest.mark.parametrize("rate", [0.01, 0.5, 1 - 2**-33])
def test_masks_equal_an_independent_calculation(n, rate, monkeypatch):
    # The larger ones are drawn in pieces.
    monkeypatch.setattr(philox, "_BLOCKS_PER_CHUNK", 64)
    expected = reference.keep(n, rate, KEY.seed, KEY.step, "layers.0.weight", KEY.domain)
    assert np.array_equal(keep_mask(n, rate, KEY).numpy(), expected)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 1021, 2**34 + 5])
def test_a_shard_of_rows_sees_its_part_of_the_mask(offset):
    # Of far elements the high word of the counter is in use.
    local = random_words(777, KEY._replace(shard=ShardIndex(offset, 777, 777)))
    expected = reference.words(777, KEY.seed, KEY.step, "layers.0.weight", KEY.domain, first=offset)
    assert np.array_equal(local.numpy(), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "start", "stop"), [(37, 64, 16, 32), (37, 61, 5, 18), (9, 7, 6, 7), (5, 400, 3, 304)]
)
def test_a_shard_of_columns_sees_its_part_of_the_mask(rows, columns, start, stop, monkeypatch):
    # The last is drawn in pieces, across its rows as well.
    monkeypatch.setattr(philox, "_BLOCKS_PER_CHUNK", 64)
    whole = keep_mask(rows * columns, 0.3, KEY).view(rows, columns)
    shard = ShardIndex(start, stop - start, columns)
    local = keep_mask(rows * (stop - start), 0.3, KEY._replace(shard=shard)).view(rows, stop - start)
    assert torch.equal(local, whole[:, start:stop])


def test_a_shard_that_is_not_made_of_whole_runs_is_refused():
    with pytest.raises(ValueError, match="a shard of 10 elements is not made of whole runs of 4"):
        keep_mask(10, 0.5, KEY._replace(shard=ShardIndex(0, 4, 16)))


def test_masks_have_their_rate_and_are_independent():
    n, rate = 50_000, 0.1
    masks = [
        keep_mask(n, rate, KEY),
        keep_mask(n, rate, KEY._replace(step=8)),
        keep_mask(n, rate, KEY._replace(tensor_id=tensor_id("layers.1.weight"))),
        keep_mask(n, rate, KEY._replace(domain=DOMAIN_TAU)),
        keep_mask(n, rate, KEY._replace(seed=KEY.seed + 1)),
        keep_mask(n, rate, KEY._replace(seed=KEY.seed + 2**32)),
    ]
    deviation = (n * rate * (1 - rate)) ** 0.5
    for mask in masks:
        assert abs(int(mask.sum()) - n * rate) < 5 * deviation
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(int((a & b).sum()) - n * rate**2) < 5 * (n * rate**2) ** 0.5


def test_masks_are_words_below_a_threshold():
    words = random_words(5000, KEY)
    assert torch.equal(words < philox.keep_threshold(0.3), keep_mask(5000, 0.3, KEY))
    assert words.min() >= 0
    assert words.max() < 2**32
    assert keep_mask(1000, 1.0, KEY).all()
    # The step may be a tensor.
    assert torch.equal(random_words(5000, KEY._replace(step=torch.tensor(7.0))), words)


@triton.jit
def _words_kernel(
    out, offset, local_inner, global_inner, seed, step, tensor_id, base,
    STRIDED: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = base + tl.program_id(0).to(tl.int64) * BLOCK
    words = device_functions.random_bits(
        start, (tl.load(offset), tl.load(local_inner), tl.load(global_inner)),
        (tl.load(seed), tl.load(step).to(tl.uint32), tl.load(tensor_id).to(tl.uint32)), 0, STRIDED, QUADS, BLOCK,
    )  # fmt: skip
    tl.store(out + start + tl.arange(0, BLOCK), words.to(tl.int64))


@pytest.mark.parametrize(
    ("shard", "quads"),
    [
        (ShardIndex(0, 1024, 1024), True),
        (ShardIndex(0, 1024, 1024), False),
        (ShardIndex(2**34 + 4, 1024, 1024), True),
        (ShardIndex(1, 1024, 1024), False),
        (ShardIndex(2, 1024, 1024), False),
        (ShardIndex(3, 1024, 1024), False),
        (ShardIndex(2**34 + 3, 1024, 1024), False),
        (ShardIndex(64, 32, 128), True),
        (ShardIndex(64, 32, 128), False),
        (ShardIndex(5, 16, 37), False),
        (ShardIndex(6, 1, 7), False),
    ],
)
@pytest.mark.parametrize("block", [256, 1024])
def test_the_device_function_draws_the_same_words(shard, quads, block):
    n = 1024
    values = (*shard, KEY.seed, KEY.step, KEY.tensor_id)
    scalars = [torch.tensor([value], device=DEVICE) for value in values]
    out = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    _words_kernel[(n // block,)](out, *scalars, 0, STRIDED=shard.local_inner < n, QUADS=quads, BLOCK=block)
    assert torch.equal(out.cpu(), random_words(n, KEY._replace(shard=shard)))
