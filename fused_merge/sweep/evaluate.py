"""A model scored at many ratios of the path between two models, in one process: results survive a kill.

`results.json` is written anew after every ratio and says what it belongs to, so that only the same sweep goes on from
it. The random generators of Python, numpy and torch start every scorer at the same state: ratios are compared on the
same draws, and a sweep that was killed ends with the numbers of one that was not.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch

from fused_merge.distributed import Processes
from fused_merge.functional.backend import check_device
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.files import expanded, stamp_of
from fused_merge.io.sources import PathLike, open_files
from fused_merge.io.transformers import check_transformers, load_model, load_tokenizer, stored_dtype
from fused_merge.io.writer import write_text
from fused_merge.names import some
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import PerTensor, dtype_name, finite, plain
from fused_merge.progress import progress_bar
from fused_merge.sweep.options import EvaluateOptions, SweepOptions
from fused_merge.sweep.plots import check_matplotlib
from fused_merge.sweep.report import write_report
from fused_merge.sweep.results import RESULTS, Results, ScoredRatio, read_results, resume
from fused_merge.sweep.scorers import ImportedScorer, Scorer, harness_tasks, import_harness

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
    """Score a model at many ratios; go on where a killed sweep of the same kind ended.

    For a model under DDP or FSDP2 every process has to call this, with the same arguments: all of them score; the
    scores of the first one are returned by all, and written by it alone. A scorer that returns no finite number stops
    them together; one that raises stops its own process, as in training.

    Args:
        sweep: holds the model, which has its weights back at the end, also when a scorer fails.
        ratios: distinct numbers, or {label: number, or what else `sweep.at` takes by name of tensor}.
        scorers: name -> function of the model; it returns a number, which becomes the score of that name, or
            {key: number}, which become the scores `name/key`. One that knows of keys for which less is better lists
            them in an attribute `lower_is_better`.
        out: folder of `results.json`; made if need be.
        checkpoints: the files or folders that the sweep is between, by what they are, such as `"base"`. Finished
            ratios are only taken for the same ratios and scorers on files of the same path, size and time of change;
            without this, on any.
        {options}

    Returns:
        The scores of each ratio, in their order; `results.json` holds the same.

    Raises:
        ValueError: if ratios, scorers or `minimize` do not fit, or `out` holds the results of another sweep.
        RuntimeError: if a scorer raises, or returns what is no finite number; the sentence names scorer and ratio.
            Finished ratios are kept. Also if another process has raised one of these.
        OSError: if `out` cannot be written to, or a checkpoint cannot be read.
        TypeError: for a ratio that is no number.
    """
    o = resolve(options, EvaluateOptions)
    processes = Processes.of(sweep.model) if isinstance(sweep, RatioSweep) else _ALONE
    state = _Sweep(ratios, list(scorers), out, checkpoints or {}, o["minimize"], processes)
    return state.finish(sweep, scorers, progress=o["progress"])


@documented(SweepOptions)
def sweep_checkpoints(
    base: PathLike, tuned: PathLike, ratios: Ratios, out: PathLike, **options: Unpack[SweepOptions]
) -> list[Path]:
    """Load a causal language model, score it at many ratios, and report; see `evaluate_ratios` and `write_report`.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: a Hugging Face folder, from which Transformers loads the model. Its code is never run.
        ratios: as for `evaluate_ratios`.
        out: folder of `results.json`, `results.md` and `pareto.png`.
        {options}

    Returns:
        The files written.

    Raises:
        ImportError: if Transformers, matplotlib, the harness or the module of a scorer cannot be imported.
        ValueError: if anything does not fit; as `evaluate_ratios`, `write_report` and `RatioSweep`.
        RuntimeError: if a scorer fails.
        OSError: if a file cannot be read or written.
    """
    o = resolve(options, SweepOptions)
    source = open_files(tuned, role="tuned")
    if not (source.path / "config.json").is_file():
        raise FileNotFoundError(f"{tuned} has no config.json, so nothing says what model it is; give a model folder")
    device, dtype = check_device(o["device"]), o["dtype"] or stored_dtype(source)
    check_matplotlib()
    check_transformers()
    for path in o["compare"]:
        read_results(path)
    imported = [ImportedScorer(text) for text in o["scorers"]]
    harness = import_harness() if o["tasks"] else None
    names = [*(scorer.name for scorer in imported), *o["tasks"]]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"two scorers are called {twice[0]!r}; rename one")
    also = {"scorers": [*o["scorers"], *o["tasks"]], "dtype": dtype and dtype_name(dtype)}
    state = _Sweep(ratios, names, out, {"base": base, "tuned": tuned}, o["minimize"], _ALONE, also)
    if state.missing:
        model = load_model(source.path, device, dtype)
        functions: dict[str, Scorer] = {scorer.name: scorer for scorer in imported}
        if harness or any(scorer.takes_tokenizer for scorer in imported):
            tokenizer = load_tokenizer(source.path)
            for scorer in imported:
                scorer.tokenizer = tokenizer
            if harness:
                functions |= harness_tasks(harness, o["tasks"], model, tokenizer, o["batch_size"])
        state.finish(RatioSweep(model, base, tuned), functions, progress=o["progress"])
    return write_report(out, o["compare"])


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
        for score in minimize:
            if not any(f"{score}/".startswith(f"{name}/") for name in names):
                raise ValueError(f"minimize names {score!r}, which is no score of {some(map(repr, names))}; correct it")
        self._path, self._processes = expanded(out) / RESULTS, processes
        with processes.raising_together():
            described = {}
            for role, path in checkpoints.items():
                files = {file.name: list(stamp_of(file)) for file in open_files(path).files()}
                described[role] = {"path": str(expanded(path).absolute()), "files": files}
            belongs_to = {"checkpoints": described, "ratios": self._ratios, "scorers": list(names), **(also or {})}
            found = resume(self._path, belongs_to) if processes.is_first else Results(belongs_to)
        finished, lower = processes.from_first((found.finished, found.lower_is_better))
        self._results = Results(belongs_to, self._in_order(finished), minimize, lower)
        if finished:
            self._check_minimize()
        # At once, so that a folder that cannot be written to is no surprise after the first ratio.
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
                scored = ScoredRatio(label, ratio, self._score(scorers, model, label))
                lower = {f"{name}/{key}" for name in scorers for key in getattr(scorers[name], "lower_is_better", ())}
                scored, lower = self._processes.from_first((scored, lower))
                finished = self._in_order([*self._results.finished, scored])
                lower = {*self._results.lower_is_better, *lower}
                self._results = replace(self._results, finished=finished, lower_is_better=lower)
                self._save()
                self._check_minimize()
                advance(1)
        return list(self._results.finished)

    def _in_order(self, finished: Iterable[ScoredRatio]) -> list[ScoredRatio]:
        return sorted(finished, key=lambda scored: list(self._ratios).index(scored.label))

    def _save(self) -> None:
        with self._processes.raising_together():
            if self._processes.is_first:
                write_text(self._path, json.dumps(self._results.document(), indent=1) + "\n")

    def _check_minimize(self) -> None:
        names = self._results.scores
        if unknown := sorted({*self._results.minimize} - {*names}):
            what = f"minimize names {some(map(repr, unknown))}, but the scores are {some(map(repr, names), 10)}"
            raise ValueError(f"{what}; correct it and run the same again, finished ratios are kept")

    def _score(self, scorers: Mapping[str, Scorer], model: Any, label: str) -> dict[str, float]:
        """Return the scores of a model, or say which scorer failed at the ratio called `label`, and what is kept."""
        expected, done = self._results.scores, len(self._results.finished)
        kept = f"{done} of {len(self._ratios)} ratios are finished and kept in {self._path}"
        way_out = f"correct it and run the same again ({kept})"
        scores: dict[str, float] = {}
        for name, scorer in scorers.items():
            at = f"scorer {name!r} at ratio {label}"
            try:
                with _same_draws():
                    found = scorer(model)
            except Exception as error:
                said = ": ".join(filter(None, (type(error).__name__, str(error))))
                raise RuntimeError(f"{at} raised {said}; {way_out}") from error
            # Before the next scorer, in which a process could wait for one that has failed.
            with self._processes.raising_together():
                by_key = found if isinstance(found, Mapping) else {None: found}
                if not by_key:
                    raise RuntimeError(f"{at} returned no score; {way_out}")
                for key, value in by_key.items():
                    score, of = (name, "") if key is None else (f"{name}/{key}", f" for {key!r}")
                    if score in scores:
                        raise RuntimeError(f"{at} returned {score!r} as another scorer does; rename one ({kept})")
                    scores[score] = _number(value)
                    if not math.isfinite(scores[score]):
                        raise RuntimeError(f"{at} returned {value!r}{of}, which is no finite number; {way_out}")
        with self._processes.raising_together():
            if expected and set(scores) != set(expected):
                change = f"are {some(map(repr, scores))} and were {some(map(repr, expected))} before"
                raise RuntimeError(f"the scores at ratio {label} {change}; return the same at every ratio ({kept})")
        return {name: scores[name] for name in expected or scores}


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


@contextmanager
def _same_draws() -> Iterator[None]:
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
