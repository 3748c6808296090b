"""Tasks of the lm-evaluation-harness as scorers: found and built before a model is loaded.

The harness is Gao et al., https://github.com/EleutherAI/lm-evaluation-harness, from version 0.4.13 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import chain
from typing import Any

from fused_merge.io.files import expanded
from fused_merge.io.transformers import text_tokenizer
from fused_merge.names import some
from fused_merge.sweep.scorers import same_draws


class HarnessTask:
    """The scorer that a task or a group of the harness is, always of the model that it was last given.

    Its scores are called `metric`, or `metric,filter` where the filter has a name; those of the members of a group
    `member/metric`.

    Attributes:
        name: of the task or group.
        lower_is_better: the scores of which the harness says so; known after the first call.
        details: the scores of the members of a group that has scores of its own; known after the first call.
    """

    def __init__(self, name: str, built: Any, evaluate: Callable[..., Any]) -> None:
        self.name = name
        self.tasks = list(built.get_all_tasks()) if hasattr(built, "get_all_tasks") else [built]
        self.wrapped: Any = None
        self.lower_is_better: set[str] = set()
        self.details: set[str] = set()
        self._built, self._evaluate = built, evaluate

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics, without standard errors, which are not calculated."""
        found = self._evaluate(model=self.wrapped, tasks=[self._built])
        metrics = {name: dict(_metrics(entries)) for name, entries in found["results"].items()}
        members, higher = found.get("group_subtasks") or {}, found.get("higher_is_better") or {}

        def counting(name: str) -> list[str]:
            """Return the topmost names that have metrics."""
            if metrics.get(name):
                return [name]
            return [each for member in members.get(name, ()) for each in counting(member)]

        def directions(name: str, metric: str) -> set[bool | None]:
            """Return what the tasks of a name say of a metric; groups of groups know less of it than their tasks."""
            if name in members:
                return set().union(*(directions(member, metric) for member in members[name]))
            return {(higher.get(name) or {}).get(metric)}

        scores, top = {}, counting(self.name)
        for name, by_key in metrics.items():
            for key, value in by_key.items():
                score = key if name == self.name else f"{name}/{key}"
                scores[score] = value
                if name not in top:
                    self.details.add(score)
                if directions(name, key.partition(",")[0]) - {None} == {False}:
                    self.lower_is_better.add(score)
        return scores


def _metrics(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the metrics of a task by the names that scores have."""
    for key, value in entries.items():
        # "acc,none", "exact_match,strict-match"; a key without a comma is a name or a count.
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield (metric if filtered == "none" else key), value


class Harness:
    """The tasks of the harness by name, from its own folder and `include_path`.

    Args:
        include_path: folders of further tasks.
        options: what every evaluation gets beside: the other options of `TaskOptions`.

    Raises ImportError if the harness is missing.
    """

    def __init__(self, include_path: Sequence[str], **options: Any) -> None:
        try:
            evaluate = import_module("lm_eval").simple_evaluate
            self._wrapper = import_module("lm_eval.models.huggingface").HFLM
            manager = import_module("lm_eval.tasks").TaskManager
        except ImportError as error:
            message = f"tasks need the lm-evaluation-harness ({error}): pip install 'fused_merge[evaluation]'"
            raise ImportError(message) from error
        self._manager = manager(include_path=list(include_path) or None)
        # As on its command line, examples are turns of a conversation where there is a template for one.
        self._options = options | {"fewshot_as_multiturn": options["apply_chat_template"]}
        self._options |= {"task_manager": self._manager, "bootstrap_iters": 0, "log_samples": False}
        self._evaluate = evaluate

    def find(self, wanted: Sequence[str]) -> dict[str, HarnessTask]:
        """Return scorers by what identifies them: the name of a task or group, or the path of the file that defines it.

        Building the tasks reads their files and fetches their data sets.

        Args:
            wanted: names of tasks, groups or tags, patterns such as `"mmlu_*"`, or paths of YAML files. A group is one
                scorer, a tag or pattern one for each of its tasks.

        Raises:
            ValueError: if there is no such task, it cannot be built, or it cannot be run here.
        """
        return {key: task for each in wanted for key, task in self._build(each)}

    def use(self, tasks: Sequence[HarnessTask], model: Any, tokenizer: Any, batch_size: int) -> None:
        """Give the tasks a model and its tokenizer, or processor; ValueError if the harness cannot work with them."""
        tokenizer = text_tokenizer(tokenizer)
        if self._options["apply_chat_template"] and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave out apply_chat_template, or give it one")
        try:
            wrapped = self._wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            what = f"the lm-evaluation-harness cannot use a {type(model).__name__} with a {type(tokenizer).__name__}"
            raise ValueError(f"{what} ({said}); score it with functions of your own") from error
        for task in tasks:
            task.wrapped = wrapped

    def _build(self, wanted: str) -> Iterator[tuple[str, HarnessTask]]:
        known, path = self._manager.all_tasks, expanded(wanted).absolute()
        of_file = wanted not in known and path.is_file()
        names = [str(path)] if of_file else self._manager.match_tasks([wanted])
        if not names:
            near = get_close_matches(wanted, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists all"
            raise ValueError(f"the lm-evaluation-harness has no task {wanted!r}, nor is it a file; {hint}")
        for name in names:
            try:
                # Some tasks shuffle their data as they read it.
                with same_draws():
                    loaded = self._manager.load([name])
            except Exception as error:
                what = f"the lm-evaluation-harness cannot build task {name!r} ({type(error).__name__}: {error})"
                raise ValueError(f"{what}; correct it, or give the folder of tasks it needs as include_path") from error
            inner = set(chain(*(loaded.get("group_map") or {}).values()))
            tops = {title: group for title, group in (loaded.get("groups") or {}).items() if title not in inner}
            for title, built in (tops or loaded["tasks"]).items():
                task = HarnessTask(title, built, self._run)
                self._check(task)
                yield name if of_file else title, task

    def _check(self, task: HarnessTask) -> None:
        """Raise ValueError for what the harness would refuse only when the model is there."""
        if images := [each.task_name for each in task.tasks if getattr(each, "MULTIMODAL", False)]:
            raise ValueError(f"task {some(map(repr, images))} asks about images or sounds; take a scorer of your own")
        unsafe = [each.task_name for each in task.tasks if getattr(each, "UNSAFE_CODE", False)]
        if unsafe and not self._options["confirm_run_unsafe_code"]:
            what = f"task {some(map(repr, unsafe))} runs code that the model writes"
            raise ValueError(f"{what}; pass confirm_run_unsafe_code=True where that can do no harm")

    def _run(self, **what: Any) -> Any:
        return self._evaluate(**what, **self._options)
