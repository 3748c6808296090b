"""F of a reference delta in compiled code against the eager one: mask, values and offsets."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from one_tensor import draw

import fused_merge as fm
from fused_merge import functional
from fused_merge.compiled.sparsify import Delta
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.eager.sparsify import kth_largest
from fused_merge.functional.sparsify import SPARSIFY
from fused_merge.lockstep import finish

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 31, 1000, 1024, 1025, 4096, 4097, 50_003]
METHODS = ["random", "magnitude", "soft_threshold"]


def tau_of(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A delta with zeros of both signs, ties and numbers that are not normal."""
    tau = draw(numel, 1e-3, seed=numel)
    tau[::7], tau[1::50], tau[3::60], tau[5:90] = 0.0, -0.0, 1e-40, float(tau[5]) if numel > 5 else 0.0
    return tau.to(dtype)


def parts(tau: torch.Tensor, **options) -> list:
    """What is stored of F(tau), compiled and eager."""
    made = [functional.sparsify(tau, name="layers.0.weight", impl=impl, **options) for impl in ("compiled", "eager")]
    assert made[0].shape == made[1].shape == tau.shape
    return [[x.mask, x.values, x.offsets] for x in made]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_it_equals_the_eager_one(method, dtype):
    for numel in SIZES:
        for tau in (tau_of(numel, dtype), torch.ones(numel, dtype=dtype)):
            for rate in (1.0, 0.3, 0.01, 1e-6):
                options = {"method": method, "reserve_rate": rate, "seed": 2**64 - 5}
                assert_same_bits(*parts(tau, **options), f"{numel} {rate}")


@pytest.mark.parametrize("method", METHODS)
def test_strides_are_read_in_row_major_order(method):
    assert_same_bits(*parts(draw((70, 90)).t(), method=method, reserve_rate=0.3, seed=1))


SHARDS = {
    "rows": ShardIndex(37 * 11, 60 * 37, 60 * 37),
    "columns": ShardIndex(5, 37, 100),
    "over the words of a counter": ShardIndex(2**34 - 50, 37, 2**33),
}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_tensor(method, shard):
    elements = SHARDS[shard]
    # What other processes hold is not there: the threshold is that of this part, at its rank in the whole.
    whole = Shard(elements, (100, 60) if shard != "rows" else (100, 37))
    assert_same_bits(*parts(draw((60, 37)), method=method, reserve_rate=0.1, seed=-3, shard=whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_that_of_the_eager_code(dtype):
    tau = tau_of(20_001, dtype)
    for strange in (False, True):
        if strange:
            tau[:50], tau[50:60] = torch.nan, torch.inf
        for k in (1, 30, 55, 100, 5000, 20_001):
            rate = k / 20_001
            if k == max(1, int(rate * 20_001)):
                assert finish(Delta(tau).kth_largest(k, ())) == int(kth_largest(tau.float(), rate))


def test_a_delta_is_sparsified_and_saved_the_same(tmp_path, monkeypatch):
    base, tuned = ({"a": draw((40, 50), seed=i), "b": draw(3000, seed=i).bfloat16()} for i in range(2))
    delta = fm.ReferenceDelta.from_models(base, tuned)
    for method in METHODS:
        for impl in ("compiled", "eager"):
            monkeypatch.setenv("FUSED_MERGE_IMPL", impl)
            delta.save(tmp_path / f"{impl}.safetensors", method=method, reserve_rate=0.1, seed=4)
        assert (tmp_path / "compiled.safetensors").read_bytes() == (tmp_path / "eager.safetensors").read_bytes()


def test_auto_decides_by_all_that_is_to_be_sparsified(monkeypatch):
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 5000)
    compiled = []
    monkeypatch.setattr(Delta, "sparsify", lambda self, *_, **__: compiled.append(self))
    options = {"name": "w", "method": "random", "reserve_rate": 0.1, "seed": 0}
    functional.sparsify(draw(1000), **options)
    assert not compiled
    functional.sparsify(draw(1000), work=5000, **options)
    assert len(compiled) == 1


def test_what_is_not_served_is_refused_by_name(monkeypatch):
    options = {"name": "w", "reserve_rate": 0.1, "seed": 0, "impl": "compiled"}
    with pytest.raises(RuntimeError, match="cannot serve 'w': there is no compiled code for"):
        functional.sparsify(draw(50, dtype=torch.float64), method="random", **options)
    monkeypatch.setitem(SPARSIFY, "own", lambda x, rate, key: x)
    with pytest.raises(RuntimeError, match="cannot serve 'w': there is no compiled code for F 'own'"):
        functional.sparsify(draw(50), method="own", **options)
