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
    grads = [grad for param in params if (grad := param.grad) is not None]
    own = [states.get(param, {}) for param in params]
    tensors = [*params, *(x for state in own for x in state.values())]
    types = {*map(type, tensors), *map(type, grads)}
    if not types <= _PLAIN or {x.layout for x in (*tensors, *grads)} != {torch.strided}:
        return None
    return [
        check_impl(impl),
        rules,
        [(id(group), len(group["params"]), *(group[option] for option in FIXED)) for group in groups],
        [list(group.get("param_names", ())) for group in groups],
        [*map(id, params)],
        [param.device for param in params],
        [param.requires_grad for param in params],
        [param.grad is None for param in params],
        [tuple(state) for state in own],
        [x.data_ptr() for x in tensors],
        *_forms(tensors),
        *_forms(grads),
    ]


def _forms(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Return how tensors are to be read."""
    return [x.dtype for x in tensors], [x.shape for x in tensors], [x.is_contiguous() for x in tensors]
