"""Functions that `torch.compile` calls as they are instead of looking into them.

Loops whose length depends on the data's size would be unrolled anew for every size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")

_LIBRARY: Any = torch.library.Library("fused_merge", "DEF")  # type: ignore[no-untyped-call]


def custom_op(
    schema: str, shape: Callable[Arguments, Tensor]
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Register a function as an operator of its own, and call it as such while compiling.

    Args:
        schema: arguments and result in torch's notation, such as `"(Tensor x) -> Tensor"`.
        shape: returns an empty tensor like the result, from the same arguments.
    """

    def register(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
        name = function.__name__.lstrip("_")
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_merge::{name}", shape, lib=_LIBRARY)

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
            if torch.compiler.is_compiling():
                result: Tensor = getattr(torch.ops.fused_merge, name)(*args, **kwargs)
                return result
            return function(*args, **kwargs)

        return call

    return register
