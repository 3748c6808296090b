"""What whole tensors decide, found in blocks, against numpy and against the eager code on tensors in one piece."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_raw

from fused_merge.eager.merge import kept_ranks, trim_bounds
from fused_merge.eager.sums import inner_product
from fused_merge.io.headers import CODES
from fused_merge.io.sources import open_files
from fused_merge.merge import whole_tensors
from fused_merge.merge.whole_tensors import Inputs, inner_products, kth_magnitudes, lowest_bits

BLOCK = 64
INF, NAN = float("inf"), float("nan")
PATTERN = {torch.float32: (np.int32, torch.int32), torch.float64: (np.int64, torch.int64)}
WIDE = pytest.mark.parametrize("wide", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(whole_tensors, "_BLOCK", BLOCK)


@pytest.fixture
def small_digits(monkeypatch):
    """More and smaller histograms, for tests that ask for many ranks."""
    monkeypatch.setattr(whole_tensors, "_DIGIT", 7)


def inputs_of(folder, *tensors, wide=None, name="w"):
    """Vectors in files, each after an odd byte: where they lie is a multiple of nothing."""
    places = []
    for i, tensor in enumerate(tensors):
        odd = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        entry = {"dtype": CODES[tensor.dtype], "shape": [len(tensor)], "data_offsets": [1, 1 + tensor.nbytes]}
        data = b"\0" + tensor.view(torch.uint8).numpy().tobytes()
        path = write_raw(folder / f"{name}.{i}.safetensors", {"odd": odd, name: entry}, data)
        places.append(open_files(path).file_range(name))
    if wide is None:
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return Inputs(tuple(places), len(tensors[0]), wide)


def unread(nbytes):
    """Nobody counts here."""


def kth(delta, k):
    """The pattern of the k-th largest magnitude, by numpy; all NaN have one, above infinity."""
    patterns = np.abs(delta).view(PATTERN[torch.from_numpy(delta).dtype][0])
    patterns[np.isnan(delta)] = np.array(INF, delta.dtype).view(patterns.dtype) + 1
    return int(np.partition(patterns, patterns.size - k)[patterns.size - k])


@WIDE
@pytest.mark.parametrize("numel", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_the_kth_magnitude_is_that_of_a_sort(wide, numel, tmp_path, small_digits):
    torch.manual_seed(numel)
    base, model = torch.randn(2, numel, dtype=wide)
    delta = (model - base).numpy()
    pair = inputs_of(tmp_path, base, model)
    for k in {1, 2, numel // 3, numel - 1, numel}.intersection(range(1, numel + 1)):
        assert kth_magnitudes([pair], [k], unread) == (kth(delta, k),)


STRANGE = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e-39, 1.0, -1.0, 1.0, 1.0000001, 65504.0, 3e38, -3e38]
STRANGE += [INF, -INF, NAN, -NAN]


@WIDE
def test_every_rank_of_zeros_ties_subnormals_infinities_and_nan(wide, tmp_path, small_digits):
    model = torch.tensor(STRANGE * 4, dtype=wide)
    if wide == torch.float64:
        model = torch.cat([model, torch.tensor([5e-324, 1e-310, 1e308, -1e-320], dtype=wide)])
    model = model[torch.randperm(len(model), generator=torch.Generator().manual_seed(0))]
    pair = inputs_of(tmp_path, torch.zeros_like(model), model)
    delta = (model - torch.zeros_like(model)).numpy()
    for k in range(1, len(model) + 1):
        assert kth_magnitudes([pair], [k], unread) == (kth(delta, k),)
    # NaN lies above infinity, and a zero of either sign below everything.
    assert kth_magnitudes([pair], [1], unread)[0] > int(torch.tensor(INF, dtype=wide).view(PATTERN[wide][1]))
    assert kth_magnitudes([pair], [len(model)], unread) == (0,)


@WIDE
def test_neighboring_patterns_are_told_apart(wide, tmp_path):
    # They share all digits but the last one.
    patterns = torch.arange(300, dtype=PATTERN[wide][1]) + torch.tensor(1.5, dtype=wide).view(PATTERN[wide][1])
    model = patterns.view(wide)[torch.randperm(300)]
    pair = inputs_of(tmp_path, torch.zeros_like(model), model)
    for k in (1, 137, 300):
        assert kth_magnitudes([pair], [k], unread) == (int(patterns[300 - k]),)


@pytest.mark.parametrize("each", ["one by one", "threads"])
def test_several_pairs_are_one_vector(each, tmp_path):
    torch.manual_seed(0)
    sizes = [1, BLOCK, 3 * BLOCK + 5, 7]
    ends = [torch.randn(2, n) * 10.0**i for i, n in enumerate(sizes)]
    pairs = [inputs_of(tmp_path, *two, name=f"w{i}") for i, two in enumerate(ends)]
    joined = torch.cat([model - base for base, model in ends]).numpy()
    with ThreadPoolExecutor(3) as pool:
        mapped = pool.map if each == "threads" else map
        for k in (1, 5, 100, joined.size):
            assert kth_magnitudes(pairs, [k], unread, mapped) == (kth(joined, k),)
    for shares in ((0.3,), (0.3, 0.1), (0.9, 0.5)):
        ranks = kept_ranks(joined.size, *shares)
        assert trim_bounds(torch.from_numpy(joined), *shares) == kth_magnitudes(pairs, ranks, unread)


@pytest.mark.parametrize(
    ("base", "model", "wide"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        # A third model, in fp64, makes the merge one in fp64.
        (torch.bfloat16, torch.bfloat16, torch.float64),
    ],
)
def test_differences_are_taken_in_the_wide_dtype(base, model, wide, tmp_path):
    torch.manual_seed(0)
    ends = torch.randn(200).to(base), torch.randn(200).to(model)
    delta = (ends[1].to(wide) - ends[0].to(wide)).numpy()
    pair = inputs_of(tmp_path, *ends, wide=wide)
    for k in (1, 10, 150):
        assert kth_magnitudes([pair], [k], unread) == (kth(delta, k),)


@WIDE
def test_what_is_read_is_counted(wide, tmp_path):
    base, model = torch.randn(2, 1000).to(torch.bfloat16)
    pair = inputs_of(tmp_path, base, model, wide=wide)
    read = []
    # However many ranks are asked for.
    kth_magnitudes([pair, pair], [7, 300], read.append)
    assert len(lowest_bits(wide)) == (2 if wide == torch.float32 else 4)
    assert sum(read) == len(lowest_bits(wide)) * 2 * pair.nbytes == len(lowest_bits(wide)) * 2 * 4000
    assert max(read) == BLOCK * 2


EDGES = st.sampled_from([0, 1, 2**10, 2**17 - 1, 2**17, 2**24, 2**31 - 1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), patterns=st.lists(EDGES | st.integers(0, 2**31 - 1), min_size=1))
def test_any_patterns(data, patterns, tmp_path, small_digits):
    k = data.draw(st.integers(1, len(patterns)))
    model = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    pair = inputs_of(tmp_path, torch.full_like(model, -0.0), model)
    # Subtracting -0 from a number keeps its bits, but quiets a NaN.
    quiet = (model - torch.full_like(model, -0.0)).numpy()
    assert kth_magnitudes([pair], [k], unread) == (kth(quiet, k),)


def products(*vectors):
    return [[float(inner_product(x, y)) for y in vectors] for x in vectors]


@WIDE
@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 63, 64, 65, 2 * BLOCK, 3 * BLOCK, 5 * BLOCK + 17, 16 * BLOCK, 7000])
def test_inner_products_are_the_tree_of_the_whole(wide, count, numel, tmp_path):
    torch.manual_seed(numel)
    base, *models = torch.randn(count, numel, dtype=wide)
    inputs, read = inputs_of(tmp_path, base, *models), []
    assert inner_products(inputs, read.append, deltas=False) == products(base, *models)
    assert sum(read) == count * numel * wide.itemsize == inputs.nbytes
    assert inner_products(inputs, unread, deltas=True) == products(*(model - base for model in models))


def test_inner_products_of_what_cancels_overflows_or_is_no_number(tmp_path):
    cancelling = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e4
    ends = [
        (cancelling, torch.cat([cancelling[:250], -cancelling[250:]])),
        (torch.full((200,), 1e30), torch.full((200,), -1e30)),
        (torch.full((200,), -0.0), torch.ones(200)),
        (torch.tensor([NAN] + [1.0] * 99), torch.ones(100)),
    ]
    for i, (base, model) in enumerate(ends):
        got = inner_products(inputs_of(tmp_path, base, model, name=f"w{i}"), unread, deltas=False)
        np.testing.assert_array_equal(np.array(got).view(np.int64), np.array(products(base, model)).view(np.int64))


def test_inner_products_of_16_bits_are_taken_in_fp32(tmp_path):
    torch.manual_seed(0)
    base, model = torch.randn(300).bfloat16(), torch.randn(300).half()
    got = inner_products(inputs_of(tmp_path, base, model), unread, deltas=False)
    assert got == products(base.float(), model.float())


def test_a_file_that_ends_early_or_is_gone(tmp_path):
    pair = inputs_of(tmp_path, torch.randn(100), torch.randn(100))
    base, model = pair.places
    longer = pair._replace(places=(base, model._replace(offset=model.offset + 1)))
    with pytest.raises(OSError, match=r"w\.1\.safetensors ends before byte \d+: it changed while it was read; run"):
        kth_magnitudes([longer], [1], unread)
    model.file.unlink()
    with pytest.raises(OSError, match=r"cannot read .*w\.1\.safetensors: No such file or directory; put it back"):
        inner_products(pair, unread, deltas=False)
