"""Functions that `torch.compile` calls as they are: it would unroll their loops anew for every size of data."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")


def custom_op(
    schema: str, shape: Callable[Arguments, Tensor]
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Register a function as an operator of its own, and call it as such while compiling.

    Args:
        schema: arguments and result in torch's notation, such as `"(Tensor x) -> Tensor"`.
        shape: returns an empty tensor like the result, from the same arguments.
    """

    def register(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
        name = f"fused_merge::{function.__name__.lstrip('_')}"
        operator: Any = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        operator.register_fake(shape)

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
            result: Tensor = (operator if torch.compiler.is_compiling() else function)(*args, **kwargs)
            return result

        return call

    return register
