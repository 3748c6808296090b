"""Scorers by name: functions of the caller's modules, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, TypeAlias

from fused_merge.io.transformers import import_function

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
        accepted = signature(self._function)
        by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        second = [parameter for parameter in accepted.parameters.values() if parameter.kind in by_position][1:2]
        self.takes_tokenizer = any(p.name == "tokenizer" or p.default is Parameter.empty for p in second)
        try:
            accepted.bind(*[None] * (1 + self.takes_tokenizer))
        except TypeError as error:
            raise ValueError(f"scorer {text!r} takes {accepted}; let it take (model) or (model, tokenizer)") from error

    def __call__(self, model: Any) -> Any:
        """Return what the function returns."""
        return self._function(model, self.tokenizer) if self.takes_tokenizer else self._function(model)


@dataclass
class HarnessTask:
    """The scorer that a task of the lm-evaluation-harness is, always of the model that the harness has.

    Attributes:
        lower_is_better: the metrics of which the harness says so; known after the first call.
    """

    task: str
    evaluate: Callable[..., Any]
    wrapped: Any
    task_manager: Any
    lower_is_better: set[str] = field(default_factory=set)

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics of the task, without standard errors, which are not calculated."""
        options = {"tasks": [self.task], "bootstrap_iters": 0, "log_samples": False}
        results = self.evaluate(model=self.wrapped, task_manager=self.task_manager, **options)
        higher = results.get("higher_is_better", {}).get(self.task, {})
        scores = {}
        for key, value in results["results"][self.task].items():
            # "acc,none", "exact_match,strict-match"; a key without a comma is a name or a count.
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else key
                scores[name] = value
                if higher.get(metric) is False:
                    self.lower_is_better.add(name)
        return scores


def import_harness() -> tuple[Any, Any, Any]:
    """Return `simple_evaluate`, `HFLM` and `TaskManager` of the harness, or raise ImportError with what brings them."""
    try:
        evaluate = import_module("lm_eval").simple_evaluate
        wrapper = import_module("lm_eval.models.huggingface").HFLM
        return evaluate, wrapper, import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        message = f"tasks need the lm-evaluation-harness ({error}): pip install 'fused_merge[evaluation]'"
        raise ImportError(message) from error


def harness_tasks(
    harness: tuple[Any, Any, Any], tasks: Sequence[str], model: Any, tokenizer: Any, batch_size: int
) -> dict[str, HarnessTask]:
    """Return a scorer for each task, of this model as it is when it is scored; `harness` is of `import_harness`."""
    evaluate, wrapper, task_manager = harness
    wrapped = wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # Listing all tasks takes seconds, and is done again for every call without this.
    listed = task_manager()
    return {task: HarnessTask(task, evaluate, wrapped, listed) for task in tasks}
