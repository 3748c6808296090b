"""Compiled points of a path against eager ones, bit for bit; a NaN is a NaN."""

from __future__ import annotations

import pytest
import torch
from bits import PATTERNS, assert_same_bits, same_bits
from one_tensor import draw

import fused_merge as fm
from fused_merge import functional
from fused_merge.compiled import interpolate
from fused_merge.compiled.memory import BLOCK

RATIOS = [0.0, 0.25, 0.3, 0.5, 0.9, 1.0, 1.3, -0.7]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRANGE = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 6e-8, 6.5e4, 3.3e38, 1.0])
SIZES = [0, 1, 31, 1023, BLOCK, BLOCK + 1, 3 * BLOCK + 517]


@pytest.fixture(params=["through the caches", "past the caches"], autouse=True)
def written(request, monkeypatch):
    monkeypatch.setattr(interpolate, "STREAM_FROM", 0 if request.param == "past the caches" else 1 << 60)


def ends(numel: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """Two tensors; where there is room, every pair of strange numbers too."""
    pairs = [STRANGE.repeat(len(STRANGE)), STRANGE.repeat_interleave(len(STRANGE))]
    made = [torch.cat([pair, draw(numel, seed=i)])[:numel] for i, pair in enumerate(pairs)]
    return [x.to(dtype) for x, dtype in zip(made, dtypes, strict=True)]


def with_guards(numel: int, dtype: torch.dtype, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A view into a poisoned tensor, and that tensor."""
    whole = torch.full((before + numel + 40,), torch.nan, dtype=dtype)
    return whole[before : before + numel], whole


def canonical(x: torch.Tensor) -> torch.Tensor:
    """Patterns, with one for every NaN: which one torch writes depends on the processor."""
    return x.masked_fill(x.isnan(), torch.nan).view(PATTERNS[x.element_size()])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_points_equal_eager_ones(base_dtype, tuned_dtype, out_dtype):
    for numel in SIZES:
        base, tuned = ends(numel, base_dtype, tuned_dtype)
        for before in (0, 1, 32):
            made, wholes = zip(*(with_guards(numel, out_dtype, before) for _ in RATIOS), strict=True)
            functional.interpolate([base], [tuned], RATIOS, [made], impl="compiled")
            expected = [torch.empty(numel, dtype=out_dtype) for _ in RATIOS]
            functional.interpolate([base], [tuned], RATIOS, [expected], impl="eager")
            assert_same_bits([canonical(x) for x in made], [canonical(x) for x in expected], f"{numel} {before}")
            assert all(torch.cat([x[:before], x[before + numel :]]).isnan().all() for x in wholes)


def test_many_tensors_with_ratios_of_their_own():
    sizes = [5, 0, 2 * BLOCK, 1, BLOCK + 3, 40_000]
    bases = [draw(n, seed=n).to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    tuneds = [draw(n, seed=n + 1).to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    ratios = [[0.1 * i, 1.0 - 0.01 * i] for i in range(len(sizes))]
    made, expected = (functional.interpolate(bases, tuneds, ratios, impl=impl) for impl in ("compiled", "eager"))
    assert_same_bits(made, expected)
    assert functional.interpolate([], [], RATIOS, impl="compiled") == []


def test_neither_threads_nor_runs_change_bits():
    base, tuned = draw(300_001), draw(300_001, seed=1)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made += functional.interpolate([base], [tuned], RATIOS, impl="compiled")
    finally:
        torch.set_num_threads(before)
    assert_same_bits(made, functional.interpolate([base], [tuned], RATIOS, impl="eager") * 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 1.0])
def test_an_output_in_the_place_of_an_end(ratio, dtype):
    pair = [draw(BLOCK + 77, seed=i, dtype=dtype) for i in range(2)]
    ((expected,),) = functional.interpolate(pair[:1], pair[1:], [ratio], impl="eager")
    for place in (0, 1):
        own = [x.clone() for x in pair]
        functional.interpolate(own[:1], own[1:], [ratio], [[own[place]]], impl="compiled")
        assert same_bits(own[place], expected)
        assert same_bits(own[1 - place], pair[1 - place])


def test_a_sweep_may_be_compiled_and_comes_back():
    shapes = ((33, 65), (17, 29), (1001,), (1,), (0, 4))
    base, tuned, model = (
        torch.nn.ParameterDict({str(s): draw(s, seed=i, dtype=torch.bfloat16) for s in shapes}) for i in range(3)
    )
    before = {name: p.detach().clone() for name, p in model.items()}
    expected = fm.interpolate(dict(base), dict(tuned), [0.3], impl="eager")[0]
    with fm.RatioSweep(model, dict(base), dict(tuned), impl="compiled").at(0.3):
        assert_same_bits({name: p.detach() for name, p in model.items()}, expected)
    assert_same_bits({name: p.detach() for name, p in model.items()}, before)


def test_what_is_not_served_goes_to_the_eager_code_or_is_refused(monkeypatch):
    strided, fp64 = draw((30, 20)).t(), draw(50, dtype=torch.float64)
    for end, why in ((strided, "tensors that are not contiguous"), (fp64, "torch.float64 tensors")):
        with pytest.raises(
            RuntimeError, match=f"impl='compiled' cannot serve tensor 0: there is no compiled code for {why}"
        ):
            functional.interpolate([end], [2 * end], [0.3], impl="compiled")
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 10)
    for end in (strided, fp64):
        made, expected = (functional.interpolate([end], [2 * end], RATIOS, impl=impl) for impl in ("auto", "eager"))
        assert_same_bits(made, expected)
