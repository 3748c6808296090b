"""A model scored at many ratios of the path between two models, in one process: results survive a kill.

`results.json` is written anew after every scorer and says what it belongs to, so that only the same sweep goes on from
it, with the first score that is missing. The random generators of Python, numpy and torch start every scorer at the
same state: ratios are compared on the same draws, and a sweep that was killed ends with the numbers of one that was
not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from fused_merge.distributed import Processes
from fused_merge.functional.backend import check_device
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.files import expanded, stamp_of
from fused_merge.io.match import match
from fused_merge.io.options import LoadingOptions, PathOptions
from fused_merge.io.sources import PathLike, open_files
from fused_merge.io.transformers import ModelLoader, stored_dtype
from fused_merge.io.writer import write_text
from fused_merge.names import some
from fused_merge.options import documented, resolve, select
from fused_merge.per_tensor import PerTensor, dtype_name, finite, plain
from fused_merge.progress import progress_bar
from fused_merge.sweep.harness import Harness, HarnessTask
from fused_merge.sweep.options import EvaluateOptions, SweepOptions, TaskOptions
from fused_merge.sweep.report import check_places, read_finished, write_report
from fused_merge.sweep.results import RESULTS, Results, ScoredRatio, resume
from fused_merge.sweep.scorers import ImportedScorer, Scorer, same_draws

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Ratios, or {label: ratio}.
Ratios: TypeAlias = "Sequence[float] | Mapping[str, PerTensor]"

_ALONE = Processes((), torch.device("cpu"))


class MovableModel(Protocol):
    """What a sweep needs of `RatioSweep`."""

    def at(self, ratio: Any) -> AbstractContextManager[Any]:
        """Hold a model at a ratio, and put it back."""

    def move_to(self, ratio: Any) -> None:
        """Hold it at another ratio, within `at`."""


@documented(EvaluateOptions)
def evaluate_ratios(
    sweep: MovableModel,
    ratios: Ratios,
    scorers: Mapping[str, Scorer],
    out: PathLike,
    *,
    checkpoints: Mapping[str, PathLike] | None = None,
    **options: Unpack[EvaluateOptions],
) -> list[ScoredRatio]:
    """Score a model at many ratios; go on with the first score that a killed sweep of the same kind left out.

    For a model under DDP or FSDP2 every process has to call this, with the same arguments: all of them score; the
    scores of the first one are returned by all, and written by it alone. A scorer that returns no finite number stops
    them together; one that raises stops its own process, as in training.

    Args:
        sweep: holds the model, which has its weights back at the end, also when a scorer fails.
        ratios: distinct numbers, or {label: number, or what else `sweep.at` takes by name of tensor}.
        scorers: name -> function of the model; it returns a number, which becomes the score of that name, or
            {key: number}, which become the scores `name/key`. Keys for which less is better it may list in an attribute
            `lower_is_better`, and keys that are kept but count for no front in an attribute `details`.
        out: folder of `results.json`; made if need be.
        checkpoints: the files or folders that the sweep is between, by what they are, such as `"base"`. Scores are
            only taken for the same ratios and scorers on files of the same path, size and time of change; without
            this, on any.
        {options}

    Returns:
        The scores of each ratio, in their order; `results.json` holds the same.

    Raises:
        ValueError: if ratios, scorers or `minimize` do not fit, or `out` holds the results of another sweep.
        RuntimeError: if a scorer raises, or returns what is no finite number; the sentence names scorer and ratio.
            Earlier scores are kept. Also if another process has raised one of these.
        OSError: if `out` cannot be written to, or a checkpoint cannot be read.
        TypeError: for a ratio that is no number.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> sweep = fm.RatioSweep(model, {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)})
        >>> scorers = {"reward": lambda model: model.weight.item()}
        >>> scored = fm.evaluate_ratios(sweep, [0.0, 0.5, 1.0], scorers, out="scores/")
        >>> [(each.label, each.scores) for each in scored]
        [('0', {'reward': 0.0}), ('0.5', {'reward': 0.5}), ('1', {'reward': 1.0})]
    """
    o = resolve(options, EvaluateOptions)
    processes = Processes.of(sweep.model) if isinstance(sweep, RatioSweep) else _ALONE
    state = _Sweep(ratios, list(scorers), out, checkpoints or {}, o["minimize"], processes)
    return state.finish(sweep, scorers, progress=o["progress"])


@documented(SweepOptions)
def sweep_checkpoints(
    base: PathLike, tuned: PathLike, ratios: Ratios, out: PathLike, **options: Unpack[SweepOptions]
) -> list[Path]:
    """Load a model, score it at many ratios, and report; see `evaluate_ratios` and `write_report`.

    Tasks, scorers and the places of all files are looked at before the model is loaded. What decides the scores belongs
    to a sweep: with other tasks or another way to load and to ask, `out` is refused.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: a Hugging Face folder, from which Transformers loads a causal or a vision-language model; with
            `loader` anything that the function loads. Its code is only run with `trust_remote_code`.
        ratios: as for `evaluate_ratios`.
        out: folder of `results.json`, `results.md` and `pareto.png`.
        {options}

    Returns:
        The files written: `results.json`, `results.md` and, for two scores or more, `pareto.png`.

    Raises:
        ImportError: if Transformers, matplotlib, the harness or the module of a function cannot be imported.
        ValueError: if anything does not fit; as `evaluate_ratios`, `write_report`, `RatioSweep`, `ModelLoader` and
            `Harness.find`.
        RuntimeError: if a scorer or the loader fails.
        OSError: if a file cannot be read or written.

    Example:
        >>> import fused_merge as fm
        >>> scorers = ["scores:reward", "scores:loss"]  # functions of scores.py
        >>> ratios = [0.0, 0.5, 1.0]
        >>> files = fm.sweep_checkpoints("sft/", "rlhf/", ratios, "sweep/", scorers=scorers, minimize=["loss"])
        >>> [file.name for file in files]
        ['results.json', 'results.md', 'pareto.png']
    """
    o = resolve(options, SweepOptions)
    source, folder = open_files(tuned, role="tuned"), expanded(out)
    device, dtype = check_device(o["device"]), o["dtype"] or stored_dtype(source)
    check_places(folder)
    for path in o["compare"]:
        read_finished(path)
    loader = ModelLoader(source.path, trust_remote_code=o["trust_remote_code"], loader=o["loader"])
    imported = [ImportedScorer(text) for text in o["scorers"]]
    # What decides the scores, where it is not as it always was: files of older sweeps say nothing of it.
    usual = resolve({}, TaskOptions, LoadingOptions, PathOptions)
    given = {name: o[name] for name, default in usual.items() if o[name] != default}
    of_tasks, pairing = select(o, TaskOptions), select(o, PathOptions)
    if not o["tasks"] and (idle := [name for name in of_tasks if name in given]):
        raise ValueError(f"{idle[0]} is for tasks of the lm-evaluation-harness; give tasks, or leave it out")
    match(open_files(base, role="base"), source, same_dtype=True, memory=True, **pairing)
    harness = Harness(**of_tasks) if o["tasks"] else None
    tasks = harness.find(o["tasks"]) if harness else {}
    named: list[ImportedScorer | HarnessTask] = [*imported, *tasks.values()]
    names = [scorer.name for scorer in named]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"two scorers are called {twice[0]!r}; rename one")
    also = {"scorers": [*o["scorers"], *tasks], "dtype": dtype and dtype_name(dtype), **given}
    state = _Sweep(ratios, names, folder, {"base": base, "tuned": tuned}, o["minimize"], _ALONE, also)
    if state.missing:
        for_text = harness is not None or any(scorer.takes_tokenizer for scorer in imported)
        model, tokenizer = loader.load(device, dtype, tokenizer=for_text)
        if harness:
            harness.use(list(tasks.values()), model, tokenizer, o["batch_size"])
        for scorer in imported:
            scorer.tokenizer = tokenizer
        scorers = dict(zip(names, named, strict=True))
        state.finish(RatioSweep(model, base, tuned, **pairing), scorers, progress=o["progress"])
    return write_report(folder, o["compare"])


class _Sweep:
    """One sweep and its results, whose file the first of several processes keeps; they belong to `also` besides."""

    def __init__(
        self,
        ratios: Ratios,
        names: Sequence[str],
        out: PathLike,
        checkpoints: Mapping[str, PathLike],
        minimize: Collection[str],
        processes: Processes,
        also: Mapping[str, Any] | None = None,
    ) -> None:
        self._ratios = _labeled(ratios)
        if not names:
            raise ValueError("there is no scorer; give at least one function of the model")
        for name in names:
            if whose := [other for other in names if name.startswith(f"{other}/")]:
                raise ValueError(f"scores of {name!r} could be taken for those of {whose[0]!r}; rename one scorer")
        for score in minimize:
            if not any(f"{score}/".startswith(f"{name}/") for name in names):
                raise ValueError(f"minimize names {score!r}, which is no score of {some(map(repr, names))}; correct it")
        self._names, self._path, self._processes = list(names), expanded(out) / RESULTS, processes
        with processes.raising_together():
            described = {}
            for role, path in checkpoints.items():
                files = {file.name: list(stamp_of(file)) for file in open_files(path).files()}
                described[role] = {"path": str(expanded(path).absolute()), "files": files}
            belongs_to = {"checkpoints": described, "ratios": self._ratios, "scorers": self._names, **(also or {})}
            found = resume(self._path, belongs_to) if processes.is_first else Results(belongs_to)
        self._results = replace(processes.from_first(found), minimize=minimize)
        self._results = replace(self._results, finished=self._in_order(self._results.finished))
        self._check_minimize()
        # At once, so that a folder that cannot be written to is no surprise after the first score.
        self._save()

    @property
    def missing(self) -> dict[str, PerTensor]:
        """The ratios that are not finished, by label."""
        finished = {scored.label for scored in self._results.finished}
        return {label: ratio for label, ratio in self._ratios.items() if label not in finished}

    def finish(self, sweep: MovableModel, scorers: Mapping[str, Scorer], *, progress: bool) -> list[ScoredRatio]:
        """Score what is missing, and return the scores of all ratios."""
        missing = self.missing
        shown = progress and self._processes.is_first and bool(missing)
        with ExitStack() as stack, progress_bar("sweeping", len(missing), unit="ratios", enabled=shown) as advance:
            for i, (label, ratio) in enumerate(missing.items()):
                with self._processes.raising_together():
                    # Entered once: the model's own weights are put aside once, and put back once.
                    if i == 0:
                        model = stack.enter_context(sweep.at(ratio))
                    else:
                        sweep.move_to(ratio)
                scored = next((one for one in self._results.partial if one.label == label), None)
                scored = scored or ScoredRatio(label, ratio, {})
                for name in self._names:
                    if not scored.of(name):
                        scores = self._score(name, scorers[name], model, scored)
                        scored = self._keep(scored, name, scorers[name], scores)
                advance(1)
        return list(self._results.finished)

    def _keep(self, scored: ScoredRatio, name: str, scorer: Scorer, scores: dict[str, float]) -> ScoredRatio:
        """Write down what a scorer found, and return the ratio with it; it is finished with its last scorer."""
        said = [{f"{name}/{key}" for key in getattr(scorer, what, ())} for what in ("lower_is_better", "details")]
        scores, (lower, details) = self._processes.from_first((scores, said))
        scored = replace(scored, scores=scored.scores | scores)
        found, whole = self._results, all(map(scored.of, self._names))
        self._results = replace(
            found,
            finished=self._in_order([*found.finished, scored]) if whole else found.finished,
            lower_is_better={*found.lower_is_better, *lower},
            details={*found.details, *details},
            partial=[*(one for one in found.partial if one.label != scored.label), *([] if whole else [scored])],
        )
        self._save()
        self._check_minimize()
        return scored

    def _in_order(self, finished: Iterable[ScoredRatio]) -> list[ScoredRatio]:
        return sorted(finished, key=lambda scored: list(self._ratios).index(scored.label))

    def _save(self) -> None:
        with self._processes.raising_together():
            if self._processes.is_first:
                write_text(self._path, json.dumps(self._results.document(), indent=1) + "\n")

    def _first(self, scorer: str) -> list[str]:
        """Return the names of the scores that a scorer gave at the first ratio, none if it has not been there."""
        return next(filter(None, (list(one.of(scorer)) for one in self._results.all)), [])

    def _check_minimize(self) -> None:
        for name in self._names:
            found = self._first(name)
            named = [score for score in self._results.minimize if f"{score}/".startswith(f"{name}/")]
            if found and (unknown := sorted({*named} - {*found})):
                what = f"minimize names {some(map(repr, unknown))}, but the scores are {some(map(repr, found), 10)}"
                raise ValueError(f"{what}; correct it and run the same again, all scores are kept")

    def _score(self, name: str, scorer: Scorer, model: Any, scored: ScoredRatio) -> dict[str, float]:
        """Return the scores that a scorer gives a model at a ratio, or say how it failed, and what is kept."""
        others = [other for other in self._names if scored.of(other)]
        kept = f"{len(self._results.finished)} of {len(self._ratios)} ratios"
        kept += f", and of this one {some(map(repr, others))}," if others else ""
        kept += f" are finished and kept in {self._path}"
        at, way_out = f"scorer {name!r} at ratio {scored.label}", f"correct it and run the same again ({kept})"
        try:
            with same_draws():
                found = scorer(model)
        except Exception as error:
            said = ": ".join(filter(None, (type(error).__name__, str(error))))
            raise RuntimeError(f"{at} raised {said}; {way_out}") from error
        # Before the next scorer, in which a process could wait for one that has failed.
        with self._processes.raising_together():
            by_key = found if isinstance(found, Mapping) else {None: found}
            if not by_key:
                raise RuntimeError(f"{at} returned no score; {way_out}")
            scores: dict[str, float] = {}
            for key, value in by_key.items():
                score, of = (name, "") if key is None else (f"{name}/{key}", f" for {key!r}")
                scores[score] = _number(value)
                if not math.isfinite(scores[score]):
                    raise RuntimeError(f"{at} returned {value!r}{of}, which is no finite number; {way_out}")
            expected = self._first(name) or list(scores)
            if set(scores) != set(expected):
                change = f"are {some(map(repr, scores))} and were {some(map(repr, expected))} before"
                raise RuntimeError(f"the scores at ratio {scored.label} {change}; return the same every time ({kept})")
        return {score: scores[score] for score in expected}


def _labeled(ratios: Ratios) -> dict[str, PerTensor]:
    if isinstance(ratios, (int, float)):
        raise TypeError(f"ratios must be a sequence, got {ratios}; write [{ratios}]")
    if not len(ratios):
        raise ValueError("ratios is empty; give at least one")
    if isinstance(ratios, Mapping):
        if odd := [label for label in ratios if not isinstance(label, str)]:
            raise TypeError(f"a label of a ratio must be text, got {odd[0]!r}; write {str(odd[0])!r}")
        return {label: plain(ratio, what="ratio") for label, ratio in ratios.items()}
    labeled: dict[str, PerTensor] = {}
    for ratio in ratios:
        # -0.0 is 0.
        number = finite(ratio, what="ratio") + 0.0
        label = f"{number:g}" if float(f"{number:g}") == number else repr(number)
        if label in labeled:
            raise ValueError(f"ratio {label} is given twice; leave one out")
        labeled[label] = number
    return labeled


def _number(value: Any) -> float:
    """Return a number, or the only one of a tensor or array, as a float; NaN for what is none."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
