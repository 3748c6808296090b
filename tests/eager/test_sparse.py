"""The packed format against numpy's bit packing, there and back, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import same_bits
from fragments import grids, ranges
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_merge.eager.sparse import SparseTensor, packed_nbytes

SIZES = [0, 1, 31, 32, 33, 127, 1023, 1024, 1025, 2**18 - 1, 2**18, 2**18 + 1, 600_001]


def masked(shape, share, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator) < share


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_pack_is_numpys_bit_order_and_unpack_its_inverse(n, share):
    dense, keep = masked(n, share)
    packed = SparseTensor.pack(dense, keep)

    blocks = max(1, -(-n // 1024))
    octets = np.zeros(blocks * 128, dtype=np.uint8)
    expected = np.packbits(keep.numpy(), bitorder="little")
    octets[: expected.size] = expected
    assert np.array_equal(packed.mask.numpy(), octets.view("<i4"))
    assert torch.equal(packed.values, dense[keep])
    kept_before = np.concatenate([[0], keep.numpy().cumsum()])
    assert packed.offsets.tolist() == kept_before[: 1024 * blocks : 1024].tolist()
    assert packed.offsets.dtype == torch.int32

    assert torch.equal(packed.unpack(), torch.where(keep, dense, torch.zeros(())))
    nbytes = packed.mask.nbytes + packed.values.nbytes + packed.offsets.nbytes
    assert packed_nbytes(n, int(keep.sum()), 4) == nbytes


def test_by_hand():
    dense = torch.tensor([[0.5, 0.0, -2.0], [3.0, float("nan"), -0.0]])
    packed = SparseTensor.pack(dense, torch.tensor([[True, True, False], [True, True, True]]))
    # Elements 0, 3 and 4; the zeros 1 and 5 are dropped although they were to be kept.
    assert packed.mask.tolist() == [0b011001] + [0] * 31
    assert packed.values[:2].tolist() == [0.5, 3.0]
    assert packed.values.isnan().tolist() == [False, False, True]
    assert packed.offsets.tolist() == [0]
    assert packed.shape == (2, 3)
    assert torch.equal(packed.unpack().nan_to_num(9.0), torch.tensor([[0.5, 0.0, 0.0], [3.0, 9.0, 0.0]]))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip_of_any_shape_dtype_and_strides(shape, share, dtype, transposed, seed):
    dense, keep = masked(shape, share, dtype, seed)
    if transposed and len(shape) > 1:
        dense, keep = dense.transpose(0, 1), keep.transpose(0, 1)
    packed = SparseTensor.pack(dense, keep)
    assert packed.dtype == dtype
    assert packed.unpack().dtype == dtype
    assert torch.equal(packed.unpack(), torch.where(keep, dense, torch.zeros((), dtype=dtype)))
    again = SparseTensor.from_parts(packed.mask, packed.values, packed.shape)
    assert torch.equal(again.offsets, packed.offsets)


def test_a_value_is_found_from_its_block_alone():
    dense, keep = masked(5000, 0.3)
    packed = SparseTensor.pack(dense, keep)
    for e in keep.nonzero().flatten()[::97].tolist():
        block_start = e // 1024 * 1024
        rank = int(keep[block_start:e].sum())
        assert packed.values[packed.offsets[e // 1024] + rank] == dense[e]


def test_to_a_device_and_to_the_same():
    packed = SparseTensor.pack(*masked(10, 0.5))
    assert packed.to("cpu") is packed
    there = packed.to("meta")
    assert there.device.type == there.mask.device.type == there.offsets.device.type == "meta"


@pytest.mark.parametrize(
    ("mask", "values", "message"),
    [
        (torch.zeros(31, dtype=torch.int32), torch.zeros(0), "takes 32 int32 words of mask .* got .*31"),
        (torch.zeros(32, dtype=torch.int64), torch.zeros(0), "got torch.int64"),
        (torch.zeros(32, dtype=torch.int32), torch.zeros(1, 1), r"values of \[1, 1\]"),
        (torch.ones(32, dtype=torch.int32), torch.zeros(3), "past the end"),
        (torch.tensor([7] + [0] * 31, dtype=torch.int32), torch.zeros(2), "marks 3 elements, but 2 values"),
    ],
)
def test_parts_that_contradict_one_another(mask, values, message):
    with pytest.raises(ValueError, match=message):
        SparseTensor.from_parts(mask, values, (10,))


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match=r"keep must be a bool mask of \[3\] on cpu, got torch.int64 of \[3\]"):
        SparseTensor.pack(torch.ones(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch.bool of \[2\]"):
        SparseTensor.pack(torch.ones(3), torch.ones(2, dtype=torch.bool))


SHAPES = [(7,), (0,), (), (40, 60), (5, 33, 64), (3, 5, 7, 11), (3000,), (2, 70_000), (600, 1001)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_part_is_what_packing_the_part_makes(shape, share):
    dense, keep = masked(shape, share)
    packed = SparseTensor.pack(dense, keep)
    for boxes in grids(shape):
        for box in boxes:
            own = SparseTensor.pack(dense[box], keep[box])
            assert_parts_equal(packed.part(box), own)
            for elements in ranges(own.shape.numel()):
                expected = SparseTensor.pack(dense[box].flatten()[elements], keep[box].flatten()[elements])
                assert_parts_equal(packed.part(box, elements), expected)


def assert_parts_equal(one, other):
    assert one.shape == other.shape
    for part in ("mask", "values", "offsets"):
        assert same_bits(getattr(one, part), getattr(other, part))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 5000),
    ends=st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_range_that_begins_and_ends_anywhere(n, ends, share, seed):
    dense, keep = masked(n, share, seed=seed)
    start, stop = sorted(min(end, n) for end in ends)
    part = SparseTensor.pack(dense, keep).part((slice(start, stop),))
    assert_parts_equal(part, SparseTensor.pack(dense[start:stop], keep[start:stop]))


def test_a_part_does_not_keep_the_whole():
    packed = SparseTensor.pack(*masked((64, 4096), 0.5))
    for box in [(slice(0, 4), slice(0, 4096)), (slice(0, 64), slice(0, 256))]:
        part = packed.part(box)
        kept = sum(x.untyped_storage().nbytes() for x in (part.mask, part.values, part.offsets))
        assert kept <= packed_nbytes(2**14, part.values.numel(), 4)
