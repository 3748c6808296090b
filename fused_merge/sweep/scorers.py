"""Models, scorers and tasks by name: what Transformers, a module of the caller and the lm-evaluation-harness hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fused_merge.io.sources import FileSource

# What measures a model: a number, or several by name.
Scorer: TypeAlias = "Callable[[Any], float | Mapping[str, float]]"


class ImportedScorer:
    """The scorer `"module:function"`; the module is looked for in the working directory first.

    The function is called with a model, or with a model and its tokenizer: if its second parameter is called
    `tokenizer` or has no default.

    Attributes:
        name: of the function.
        takes_tokenizer: whether it is called with one.
        tokenizer: what it is called with; to be set before the first call.

    Raises:
        ValueError: if the text is something else, or there is no such function.
        ImportError: if the module cannot be imported.
    """

    def __init__(self, text: str) -> None:
        function = import_function(text, what="scorer")
        self.name = text.partition(":")[2]
        self._function = function
        accepted = signature(function)
        positional = [
            parameter
            for parameter in accepted.parameters.values()
            if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        ]
        self.tokenizer: Any = None
        self.takes_tokenizer = len(positional) > 1 and (
            positional[1].name == "tokenizer" or positional[1].default is Parameter.empty
        )
        try:
            accepted.bind(*[None] * (1 + self.takes_tokenizer))
        except TypeError as error:
            raise ValueError(f"scorer {text!r} takes {accepted}; let it take (model) or (model, tokenizer)") from error

    def __call__(self, model: Any) -> Any:
        """Return what the function does."""
        return self._function(model, self.tokenizer) if self.takes_tokenizer else self._function(model)


def import_function(text: str, *, what: str) -> Callable[..., Any]:
    """Return the function `"module:function"`; the module is looked for in the working directory first.

    Args:
        text: where it is.
        what: what messages call it, e.g. `"scorer"`.

    Raises:
        ValueError: if the text is something else, or there is no such function.
        ImportError: if the module cannot be imported.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"{text!r} is no {what}; write module:function, such as scores:reward")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ImportError(
            f"{what} {text!r} cannot be imported ({type(error).__name__}: {error}); correct its module"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = getattr(module, "__file__", "built in")
        raise ValueError(f"module {module_name!r} ({found}) has no function {name!r}; correct the {what} {text!r}")
    result: Callable[..., Any] = function
    return result


class Harness:
    """The lm-evaluation-harness.

    Raises:
        ImportError: if it is not installed; the sentence names the extra.
    """

    def __init__(self) -> None:
        try:
            self._evaluate = import_module("lm_eval").simple_evaluate
            self._wrapper = import_module("lm_eval.models.huggingface").HFLM
            self._task_manager = import_module("lm_eval.tasks").TaskManager
        except ImportError as error:
            raise ImportError(
                f"tasks need the lm-evaluation-harness ({error}): pip install 'fused_merge[evaluation]'"
            ) from error

    def scorers(self, tasks: Sequence[str], model: Any, tokenizer: Any, batch_size: int) -> dict[str, HarnessTask]:
        """Return a scorer for each task, of this model as it is when it is scored."""
        wrapped = self._wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        # Listing all tasks takes seconds, and is done again for every call without this.
        evaluate = partial(self._evaluate, model=wrapped, task_manager=self._task_manager())
        return {task: HarnessTask(task, evaluate) for task in tasks}


class HarnessTask:
    """The scorer that a task of the lm-evaluation-harness is, of the model that `evaluate` has.

    Attributes:
        lower_is_better: the metrics of which the harness says so; known after the first call.
    """

    def __init__(self, task: str, evaluate: Callable[..., Any]) -> None:
        self._task = task
        self._evaluate = evaluate
        self.lower_is_better: set[str] = set()

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics of the task, without standard errors, which are not calculated."""
        results = self._evaluate(tasks=[self._task], bootstrap_iters=0, log_samples=False)
        higher = results.get("higher_is_better", {}).get(self._task, {})
        scores = {}
        for key, value in results["results"][self._task].items():
            # "acc,none", "exact_match,strict-match"; what has no comma is a name or a count.
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else key
                scores[name] = value
                if higher.get(metric) is False:
                    self.lower_is_better.add(name)
        return scores


def check_transformers() -> Any:
    """Return the module `transformers`.

    Raises:
        ImportError: if it is not installed; the sentence names the extra.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError("models are loaded by Transformers: pip install 'fused_merge[evaluation]'") from error


def stored_dtype(source: FileSource) -> torch.dtype | None:
    """Return the dtype that all floating tensors of a checkpoint have, or None if they differ.

    That of the model must be the same, whatever the configuration beside it says.
    """
    stored = {source.dtype(name) for name in source if source.is_merged(name)}
    return stored.pop() if len(stored) == 1 else None


def load_model(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return the causal language model of a Hugging Face folder, ready to be scored.

    Args:
        folder: code that it holds is not run.
        device: to load it to.
        dtype: of its floating tensors; None is what the configuration says.

    Raises:
        ValueError: if Transformers cannot load it.
    """
    transformers = check_transformers()
    transformers.utils.logging.disable_progress_bar()
    model = _pretrained(transformers.AutoModelForCausalLM, folder, dtype=dtype or "auto").to(device)
    # It comes in evaluation mode, and scores need no gradients.
    return model.requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder.

    Raises:
        ValueError: if Transformers cannot load it.
    """
    return _pretrained(check_transformers().AutoTokenizer, folder)


def _pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        raise ValueError(
            f"{kind.__name__} of Transformers cannot load {folder} ({type(error).__name__}: {error}); "
            "give the folder of a whole model"
        ) from error
