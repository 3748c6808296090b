"""Compiled points of a path against eager ones, bit for bit. CPU only: that is where they run."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits, same_bits
from one_tensor import draw
from safetensors.torch import save_file
from torch import nn

import fused_merge as fm
from fused_merge import functional
from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.functional import backend, compiled


def parameters(dtype: torch.dtype, seed: int) -> nn.ParameterDict:
    shapes = {"matrix": (33, 65), "other": (17, 29), "vector": (1001,), "one": (1,), "empty": (0, 4)}
    return nn.ParameterDict({name: draw(shape, seed=seed, dtype=dtype) for name, shape in shapes.items()})


@pytest.fixture
def strict_point(monkeypatch):
    """A point that cannot be compiled whole fails."""
    torch.compiler.reset()
    strict = torch.compile(compiled.write_point, dynamic=True, fullgraph=True)
    monkeypatch.setattr(compiled, "_compiled_point", lambda: strict)


def ends(numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    base = draw(numel, dtype=torch.float64)
    return base.to(dtype), (base + draw(numel, 1e-3, 1, torch.float64)).to(dtype)


@pytest.mark.usefixtures("strict_point")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_compiled_points_equal_eager_ones(dtype):
    ratios = [0.0, 0.25, 0.3, 0.5, 0.9, 1.0, 1.3, -0.7]
    for numel in (31, 0, 1, 2, 4097, 2**17 + 5):
        pairs = [ends(numel, dtype)]
        # What is no number, and what overflows, has its bits too.
        pairs.append((pairs[0][0] * float("inf"), pairs[0][1]))
        for base, tuned in pairs:
            # One form serves all sizes and ratios.
            with torch.compiler.set_stance("default" if numel == 31 else "fail_on_recompile"):
                (made,) = functional.interpolate([base], [tuned], ratios, impl="compiled")
            (expected,) = functional.interpolate([base], [tuned], ratios, impl="eager")
            assert_same_bits(made, expected)


@pytest.mark.usefixtures("strict_point")
def test_compiled_outputs_of_other_dtypes_and_in_the_place_of_an_end():
    base, tuned = ends(1001, torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        made, expected = ([torch.empty(1001, dtype=dtype) for _ in range(2)] for _ in range(2))
        functional.interpolate([base], [tuned], [0.3, 0.8], [made], impl="compiled")
        functional.interpolate([base], [tuned], [0.3, 0.8], [expected], impl="eager")
        assert_same_bits(made, expected)
    for place in (0, 1):
        pair = [base.clone(), tuned.clone()]
        ((expected,),) = functional.interpolate([base], [tuned], [0.3], impl="eager")
        functional.interpolate(pair[:1], pair[1:], [0.3], [[pair[place]]], impl="compiled")
        assert same_bits(pair[place], expected)


def test_a_sweep_may_be_compiled_and_comes_back():
    base, tuned, model = (parameters(torch.bfloat16, seed) for seed in range(3))
    before = [p.detach().clone() for p in model.values()]
    with fm.RatioSweep(model, dict(base), dict(tuned), impl="compiled").at(0.3):
        for ours, theirs in zip(model.values(), zip(base.values(), tuned.values(), strict=True), strict=True):
            assert same_bits(ours.detach(), eager_interpolate(*(end.detach() for end in theirs), 0.3))
    assert_same_bits([p.detach() for p in model.values()], before)


def test_neither_auto_nor_a_stream_compiles_points(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled_point", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(backend, "COMPILE_FROM", 10)
    base, tuned = ends(1001, torch.bfloat16)
    functional.interpolate([base], [tuned], [0.3], impl="auto")
    for name, end in (("base", base), ("tuned", tuned)):
        save_file({"weight": end}, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    fm.interpolate_checkpoints(*files, [0.3], tmp_path / "named", impl="compiled", progress=False)
    monkeypatch.setenv("FUSED_MERGE_IMPL", "compiled")
    fm.interpolate_checkpoints(*files, [0.3], tmp_path / "overridden", progress=False)
