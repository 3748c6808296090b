"""What a GPU traps on and Triton's interpreter forgives: addresses outside every tensor, false promises."""

from __future__ import annotations

import numpy as np
import torch
from triton.runtime import interpreter

from fused_merge.eager.sparse import SparseTensor

# Where an access has its addresses and its mask.
ACCESSES = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3)}


def tensors_in(part):
    """Return the tensors among operands, and those that sparse ones and tuples hold."""
    if isinstance(part, torch.Tensor):
        return [part]
    inner = vars(part).values() if isinstance(part, SparseTensor) else part if isinstance(part, tuple) else ()
    return [x for each in inner for x in tensors_in(each)]


class Watch:
    """Notes accesses outside the tensors of a step and its kernels' arguments, and promises that do not hold."""

    def __init__(self, monkeypatch):
        from fused_merge.kernels import launch

        self.seen = self.wrong = frozenset()
        self.tensors = []
        for name, places in ACCESSES.items():
            access = getattr(interpreter.InterpreterBuilder, name)
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, self._checked(access, *places))
        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", lambda *promise: self._check_promise(*promise))
        run, entry = interpreter.GridExecutor.__call__, launch._entry

        def watched_run(executor, *args, **kwargs):
            known = [*self.tensors, *(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))]
            self._starts, ends = np.array(sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in known)).T
            self._ends = np.maximum.accumulate(ends)
            return run(executor, *args, **kwargs)

        def watched_entry(operands, *args):
            self.tensors += tensors_in(operands)
            return entry(operands, *args)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        monkeypatch.setattr(launch, "_entry", watched_entry)

    def _note(self, what, right):
        self.seen |= {what}
        if not right:
            self.wrong |= {what}

    def _checked(self, access, pointers_at, mask_at):
        def checked(builder, *args, **kwargs):
            pointers, mask = np.asarray(args[pointers_at].data), np.asarray(args[mask_at].data).astype(bool)
            addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
            size = max(1, args[pointers_at].get_element_ty().primitive_bitwidth // 8)
            found = np.searchsorted(self._starts, addresses, side="right") - 1
            inside = (found >= 0).all() and (addresses + size <= self._ends[found]).all()
            self._note(access.__name__, inside and not (addresses % size).any())
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
