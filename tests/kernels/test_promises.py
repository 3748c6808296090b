"""What a GPU traps on and the interpreter forgives: addresses outside every tensor, false promises to the compiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device import DEVICE
from kernel_cases import CASES, FORMS, Case, complete
from test_kernels import Tensors

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="watches Triton's interpreter")

WATCHED = {
    name: case
    for name, case in CASES.items()
    # Others are stepped as copies, whose addresses are not known here.
    if case.layout == "contiguous" and (case._asdict() in map(complete, FORMS) or case.project_over == "rows")
}
# Where an access has its addresses and its mask.
ACCESSES = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3)}


class Watch:
    """Notes the kernels' accesses outside these tensors and their own arguments, and promises that do not hold."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.tensors = []
        self.seen = self.wrong = frozenset()
        self._arguments = []
        for name, places in ACCESSES.items():
            access = getattr(interpreter.InterpreterBuilder, name)
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, self._checked(access, *places))
        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", lambda *promise: self._check_promise(*promise))
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", self._listened(interpreter.GridExecutor.__call__))

    def _note(self, what, right):
        self.seen |= {what}
        if not right:
            self.wrong |= {what}

    def _listened(self, launch):
        def listened(executor, *args, **kwargs):
            self._arguments = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            return launch(executor, *args, **kwargs)

        return listened

    def _checked(self, access, pointers_at, mask_at):
        def checked(builder, *args, **kwargs):
            pointers, mask = np.asarray(args[pointers_at].data), np.asarray(args[mask_at].data).astype(bool)
            addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
            size = max(1, args[pointers_at].get_element_ty().primitive_bitwidth // 8)
            inside = np.zeros(addresses.shape, dtype=bool)
            for x in (*self.tensors, *self._arguments):
                end = x.data_ptr() + x.numel() * x.element_size()
                inside |= (addresses >= x.data_ptr()) & (addresses + size <= end)
            self._note(access.__name__, inside.all() and not (addresses % size).any())
            return access(builder, *args, **kwargs)

        return checked

    def _check_promise(self, handle, key, values):
        data = np.asarray(handle.data).astype(np.int64)
        (value,) = {getattr(value, "value", value) for value in np.atleast_1d(np.array(values, dtype=object))}
        if key == "tt.divisibility":
            self._note(key, not (data % value).any())
        elif key == "tt.constancy":
            self._note(key, data.size == 1 or not np.ptp(data.reshape(-1, value), axis=1).any())
        handle.attr[key] = values


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def step(case, watch):
    tensors = Tensors(case)
    watch.tensors = [x for part in (tensors.read(), tensors.written()) for x in part.values()]
    for index in range(2):
        tensors.step("triton", index)


@pytest.mark.parametrize("case", WATCHED.values(), ids=WATCHED)
def test_every_access_lies_in_a_tensor_and_every_promise_holds(case, watch):
    step(case, watch)
    assert {"create_masked_load", "create_masked_store"} <= watch.seen
    assert not watch.wrong


def test_a_false_promise_and_a_foreign_address_are_noticed(watch, monkeypatch):
    from fused_merge.kernels import tables

    # Every buffer one element too far, and said to be aligned.
    monkeypatch.setattr(tables, "is_aligned", lambda tensors: True)
    step(Case(**complete({"row": "onties", "tau": "sparse-bf16", "alignment": "shifted"})), watch)
    assert "tt.divisibility" in watch.wrong
    watch.wrong = frozenset()
    tensors = Tensors(Case(**complete({"row": "ondare"})))
    watch.tensors = list(tensors.read().values())
    tensors.step("triton", 0)
    assert "create_masked_store" in watch.wrong
