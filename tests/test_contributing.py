"""The worked example of CONTRIBUTING.md, executed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from models import Model, run, trained

import fused_merge as fm
from fused_merge.eager.sparsify import SPARSIFY
from fused_merge.methods import METHODS

RATE, ALPHA, LR = 0.25, 0.125, 1e-2


@pytest.fixture(autouse=True)
def _example(monkeypatch):
    """Execute the example; what it adds to the tables is gone afterwards."""
    for table in (METHODS, SPARSIFY):
        for key in ("oncrumbs", "without_outliers"):
            # Set and deleted, so that it is deleted again in the end.
            monkeypatch.setitem(table, key, None)
            del table[key]
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(block, {})


def optimizer_of(model, **options):
    delta = fm.ReferenceDelta.from_models(Model(0), trained())
    return fm.MergingAdamW(
        model.named_parameters(),
        reference_delta=delta,
        method="oncrumbs",
        reserve_rate=RATE,
        alpha=ALPHA,
        lr=LR,
        **options,
    )


def without_largest(x: np.ndarray) -> np.ndarray:
    largest = np.sort(np.abs(x).ravel())[::-1][max(1, int(RATE * x.size)) - 1]
    return np.where(np.abs(x) >= largest, 0.0, x)


def test_a_method_in_ten_lines_trains():
    model = Model(0)
    optimizer = optimizer_of(model, betas=(0.5, 0.75))
    run(optimizer, model, 2)
    before = {name: p.detach().double().numpy().copy() for name, p in model.cpu().named_parameters()}
    run(optimizer, model, 1, first=2)
    for name, p in model.named_parameters():
        m, v = (optimizer.state[p][key].double().numpy() for key in ("exp_avg", "exp_avg_sq"))
        u = -LR * (m / (1 - 0.5**3)) / (np.sqrt(v / (1 - 0.75**3)) + 1e-8)
        tau = optimizer.reference_delta.tensor(name).double().numpy()
        merged = (1 - ALPHA) * without_largest(u) + ALPHA * without_largest(tau)
        assert np.abs(p.detach().double().numpy() - before[name] - merged).max() < 1e-7
        assert (without_largest(u) == 0).any()


def test_the_kernels_leave_it_to_the_eager_code():
    model = trained()
    with pytest.raises(RuntimeError, match="F 'without_outliers' of the update has no kernel"):
        run(optimizer_of(model, impl="triton"), model, 1)
