"""Models, tokenizers and functions by name: what Transformers and a module of the caller hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fused_merge.io.sources import FileSource


def import_function(text: str, *, what: str) -> Callable[..., Any]:
    """Return the function `"module:function"`, which messages call `what`; the working directory is searched first."""
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"{text!r} is no {what}; write module:function, such as scores:reward")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ImportError(f"{what} {text!r} cannot be imported ({why}); correct its module") from error
    if callable(function := getattr(module, name, None)):
        return function  # type: ignore[no-any-return]
    found = getattr(module, "__file__", "built in")
    raise ValueError(f"module {module_name!r} ({found}) has no function {name!r}; correct the {what} {text!r}")


def check_transformers() -> Any:
    """Return the module `transformers`, or raise ImportError with the extra that brings it."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError("models are loaded by Transformers: pip install 'fused_merge[evaluation]'") from error


def stored_dtype(source: FileSource) -> torch.dtype | None:
    """Return the dtype that all floating tensors of a checkpoint have, or None if they differ: what the model gets."""
    stored = {source.dtype(name) for name in source if source.is_merged(name)}
    return stored.pop() if len(stored) == 1 else None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the language model of a folder, in evaluation mode and without gradients; None is its own dtype."""
    transformers = check_transformers()
    transformers.utils.logging.disable_progress_bar()
    model = _pretrained(transformers.AutoModelForCausalLM, folder, dtype=dtype or "auto")
    return model.to(device).requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder, or raise ValueError if Transformers cannot load it."""
    return _pretrained(check_transformers().AutoTokenizer, folder)


def _pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Return what `kind` loads from a folder, whose code is not run."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        failed = f"{kind.__name__} of Transformers cannot load {folder} ({type(error).__name__}: {error})"
        raise ValueError(f"{failed}; give the folder of a whole model") from error
