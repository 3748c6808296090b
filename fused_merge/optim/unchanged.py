"""What a step can be taken again by: all that its preparation depended on, seen once more and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_merge.functional.backend import check_impl
from fused_merge.methods import MergeRule
from fused_merge.optim.options import FIXED

# A DTensor says otherwise where it lies.
_PLAIN = {Tensor, nn.Parameter}


def fingerprint(
    groups: Sequence[dict[str, Any]], rules: Sequence[MergeRule], states: Mapping[Tensor, Mapping[str, Any]], impl: str
) -> list[Any] | None:
    """Return what the preparation of a step depends on, to be compared; None where more decides than is seen here.

    That is everything but what each step looks at anyway: the elements of tensors, where gradients lie, and options
    that scale something. It keeps no tensor alive.
    """
    params = [param for group in groups for param in group["params"]]
    given = [param.grad for param in params]
    grads = [grad for grad in given if grad is not None]
    own = [states.get(param, {}) for param in params]
    held = [x for state in own for x in state.values()]
    types = {*map(type, params), *map(type, grads), *map(type, held)}
    if not types <= _PLAIN or any(grad.layout is not torch.strided for grad in grads):
        return None
    return [
        check_impl(impl),
        rules,
        [(id(group), len(group["params"]), *(group[option] for option in FIXED)) for group in groups],
        [list(group.get("param_names", ())) for group in groups],
        [*map(id, params)],
        [(i, params[i].requires_grad) for i, grad in enumerate(given) if grad is None],
        [*map(tuple, own)],
        [x.shape for x in (*params, *grads)],
        [x.numel() for x in held],
        [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, held)],
        [x.dtype for x in (*params, *grads, *held)],
        [x.is_contiguous() for x in (*params, *grads, *held)],
    ]
