"""What compiled code does not serve is said in a sentence, before anything has changed, and left to eager code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bits import assert_same_bits
from tensors import Tensors

from fused_merge import functional
from fused_merge.eager.sparsify import SPARSIFY
from fused_merge.methods import METHODS, Method


def transposed(tensors, field):
    setattr(tensors, field, [x.t().contiguous().t() for x in getattr(tensors, field)])
    return tensors


FP64 = torch.float64
REFUSED = {
    "torch.float64 weights": partial(Tensors, (20, 30), dtype=FP64),
    "torch.float64 gradients": partial(Tensors, (20, 30), grad_dtype=FP64),
    "torch.float64 reference deltas": partial(Tensors, (20, 30), tau=FP64),
    "weights that are not contiguous": lambda: transposed(Tensors((20, 30)), "params"),
    "first moments that are not contiguous": lambda: transposed(Tensors((20, 30)), "exp_avgs"),
    "second moments that are not contiguous": lambda: transposed(Tensors((20, 30)), "exp_avg_sqs"),
    "reference deltas that are not contiguous": lambda: transposed(Tensors((20, 30)), "taus"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_served_is_said_and_steps_by_eager_code(what, monkeypatch):
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 1)
    tensors, before = REFUSED[what](), REFUSED[what]()
    with pytest.raises(
        RuntimeError,
        match=f"^impl='compiled' cannot serve tensor 0: there is no compiled code for {what}; use impl='auto'$",
    ):
        tensors.step("compiled")
    assert_same_bits(tensors.outputs(), before.outputs())
    tensors.step("auto")
    before.step("eager")
    assert_same_bits(tensors.outputs(), before.outputs())


def test_a_projection_onto_a_delta_that_is_not_contiguous_is_refused():
    tensors = Tensors((20, 30))
    dense = [torch.ones(30, 20).t()]
    with pytest.raises(RuntimeError, match="no compiled code for dense reference deltas that are not contiguous"):
        tensors.step("compiled", {"dense_taus": dense}, project="onto")


def test_an_anchor_that_is_not_contiguous_is_refused():
    anchor = functional.Anchor(torch.ones(30, 20).t(), torch.ones(()))
    with pytest.raises(RuntimeError, match="no compiled code for anchors that are not contiguous"):
        Tensors((20, 30)).step("compiled", anchors=[anchor], merge_every=2)


def test_a_method_from_outside_is_left_to_eager_code(monkeypatch):
    monkeypatch.setitem(SPARSIFY, "halves", lambda x, rate, key: torch.where(x > x.median(), x, 0.0))
    monkeypatch.setitem(METHODS, "halved", Method("halves", "none", "linear", "nowhere"))
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 1)
    tensors = Tensors((300,))
    other = tensors.clone()
    with pytest.raises(RuntimeError, match="no compiled code for F 'halves' of the update; use impl='auto'"):
        tensors.step("compiled", method="halved")
    tensors.step("auto", method="halved")
    other.step("eager", method="halved")
    assert_same_bits(tensors.outputs(), other.outputs())


def test_gradients_need_not_be_contiguous():
    """Processes that share a tensor must choose the same backend, and layouts of gradients may differ."""
    tensors = transposed(Tensors((20, 30), (30, 7)), "grads")
    other = tensors.clone()
    for _ in range(3):
        tensors.step("compiled", method="onties")
        other.step("eager", method="onties")
    assert_same_bits(tensors.outputs(), other.outputs())
    one_number = Tensors((20, 30))
    one_number.grads = [torch.full((), 0.1).expand(20, 30)]
    other = one_number.clone()
    one_number.step("compiled")
    other.step("eager")
    assert_same_bits(one_number.outputs(), other.outputs())


def test_a_few_are_left_to_eager_code_and_the_rest_is_compiled(monkeypatch):
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 1)
    tensors = Tensors((20, 30), (300,), (7, 11))
    tensors.params[0] = tensors.params[0].t().contiguous().t()
    other = tensors.clone()
    for method in ("onties", "ondare"):
        tensors.step("auto", method=method)
        other.step("eager", method=method)
    assert_same_bits(tensors.outputs(), other.outputs())
