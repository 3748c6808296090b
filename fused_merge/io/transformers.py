"""Models, tokenizers and functions by name: what Transformers and a module of the caller hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.plain import read_plain
from fused_merge.io.sources import FileSource
from fused_merge.names import some


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
    check_mergeable(source)
    stored = {source.dtype(name) for name in source if source.is_merged(name)}
    return stored.pop() if len(stored) == 1 else None


class ModelLoader:
    """Loads the model of a folder with Transformers, or with a function of the caller; whether it can is known at once.

    Without a function: with `AutoModelForCausalLM` or `AutoModelForImageTextToText`, whichever loads the class that
    `architectures` in config.json names. A name that Transformers does not have counts as none.

    A function, `"module:function"`, is called with the folder (`Path`), the device (`torch.device`) and the dtype that
    the model should have (`torch.dtype`, None if the files hold several). It returns the model, on that device, or the
    model and what scorers get as its tokenizer, such as a processor.

    Raises:
        ImportError: if Transformers, or the module of the function, is missing.
        ValueError: if neither class loads the model, it needs code of its own that is not trusted, or the function does
            not take three arguments.
        FileNotFoundError: if there is neither a config.json nor a function.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, loader: str | None = None) -> None:
        self._folder, self._trusted, self._text = folder, trust_remote_code, loader
        if loader is not None:
            self._load = import_function(loader, what="loader")
            check_takes(self._load, 3, f"loader {loader!r}", "(folder, device, dtype)")
        else:
            self._kind = self._automatic()

    def load(self, device: torch.device, dtype: torch.dtype | None, *, tokenizer: bool = True) -> tuple[Any, Any]:
        """Return the model, in evaluation mode and without gradients, and its tokenizer if that is asked for.

        With `dtype` None the model has its own. Where the function returns no tokenizer, Transformers loads it: for a
        vision-language model with images the processor. Raises ValueError if something cannot be loaded, RuntimeError
        if the function raises.
        """
        if self._text is None:
            # Before the model, which takes longer.
            found = self._tokenizer() if tokenizer else None
            check_transformers().utils.logging.disable_progress_bar()
            model = self._pretrained(self._kind, dtype=dtype or "auto").to(device)
        else:
            try:
                made = self._load(self._folder, device, dtype)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise RuntimeError(f"loader {self._text!r} raised {why} for {self._folder}; correct it") from error
            model, found = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
            if not isinstance(model, torch.nn.Module):
                what = f"loader {self._text!r} returned a {type(model).__name__}"
                raise ValueError(f"{what}; let it return a model, or (model, tokenizer)")
            if found is None and tokenizer:
                found = self._tokenizer()
        return model.eval().requires_grad_(False), found

    def _tokenizer(self) -> Any:
        transformers = check_transformers()
        files = (self._folder / name for name in ("processor_config.json", "preprocessor_config.json"))
        of_images = self._text is None and self._kind is transformers.AutoModelForImageTextToText
        with_images = of_images and any(file.is_file() for file in files)
        return self._pretrained(transformers.AutoProcessor if with_images else transformers.AutoTokenizer)

    def _automatic(self) -> Any:
        """Return the class of Transformers that loads the folder."""
        transformers, path = check_transformers(), self._folder / "config.json"
        if not path.is_file():
            what = f"{self._folder} has no config.json, so nothing says what model it is"
            raise FileNotFoundError(f"{what}; give a model folder, or pass loader='module:function'")
        if not isinstance(config := read_plain(path), dict):
            raise ValueError(f"{path} holds no configuration of a model; correct it")
        kind_of, named = config.get("model_type"), config.get("architectures") or ()
        own = config.get("auto_map") or {}
        automatic = import_module("transformers.models.auto.modeling_auto")
        names_of = {
            "AutoModelForCausalLM": automatic.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForImageTextToText": automatic.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        }
        known = {kind: names[kind_of] for kind, names in names_of.items() if kind_of in names}
        if self._trusted:
            known |= {kind: own[kind].rpartition(".")[2] for kind in names_of if kind in own}
        chosen = next((kind for kind, name in known.items() if name in named), None)
        # Another class that Transformers has is another model, not an old name of this one.
        if chosen is None and not any(hasattr(transformers, name) for name in named):
            chosen = next(iter(known), None)
        if chosen is not None:
            return getattr(transformers, chosen)
        if own and not self._trusted:
            what = f"{self._folder} needs code of its own (auto_map in config.json), which is not run"
            raise ValueError(f"{what}; pass trust_remote_code=True if you trust it, or loader='module:function'")
        what = f"{self._folder} holds a {some(named) or kind_of or 'model without a type'}"
        neither = "which neither AutoModelForCausalLM nor AutoModelForImageTextToText of Transformers loads"
        raise ValueError(f"{what}, {neither}; pass loader='module:function' with a function that does")

    def _pretrained(self, kind: Any, **options: Any) -> Any:
        """Return what a class loads from the folder, whose code is only run if it is trusted."""
        try:
            return kind.from_pretrained(self._folder, local_files_only=True, trust_remote_code=self._trusted, **options)
        except Exception as error:
            failed = f"{kind.__name__} of Transformers cannot load {self._folder} ({type(error).__name__}: {error})"
            raise ValueError(f"{failed}; give the folder of a whole model, or pass loader='module:function'") from error


def text_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer of a processor, any other tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def check_takes(function: Callable[..., Any], count: int, what: str, parameters: str) -> None:
    """Raise ValueError unless a function can be called with so many arguments by position."""
    accepted = signature(function)
    try:
        accepted.bind(*[None] * count)
    except TypeError as error:
        raise ValueError(f"{what} takes {accepted}; let it take {parameters}") from error
