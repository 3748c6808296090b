"""Scorers by name: functions of the caller's modules; and the random numbers that every scorer draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, TypeAlias

import numpy as np
import torch

from fused_merge.io.transformers import check_takes, import_function

# What measures a model: a number, or several by name.
Scorer: TypeAlias = "Callable[[Any], float | Mapping[str, float]]"


class ImportedScorer:
    """The scorer `"module:function"`; the module is looked for in the working directory first.

    The function is called with a model, or with a model and its tokenizer: if its second parameter is called
    `tokenizer` or has no default.

    Attributes:
        name: of the function.
        takes_tokenizer: whether it is called with `tokenizer`, which is to be set before the first call.

    Raises:
        ValueError: if the text is something else, or there is no such function.
        ImportError: if the module cannot be imported.
    """

    def __init__(self, text: str) -> None:
        self._function = import_function(text, what="scorer")
        self.name = text.partition(":")[2]
        self.tokenizer: Any = None
        parameters = signature(self._function).parameters.values()
        by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        second = [parameter for parameter in parameters if parameter.kind in by_position][1:2]
        self.takes_tokenizer = any(p.name == "tokenizer" or p.default is Parameter.empty for p in second)
        check_takes(self._function, 1 + self.takes_tokenizer, f"scorer {text!r}", "(model) or (model, tokenizer)")

    def __call__(self, model: Any) -> Any:
        """Return what the function returns."""
        return self._function(model, self.tokenizer) if self.takes_tokenizer else self._function(model)


@contextmanager
def same_draws() -> Iterator[None]:
    """Start all random generators at one state, and give the caller's back."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=list(devices)):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
