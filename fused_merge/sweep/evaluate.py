"""A line between two models, scored at many ratios in one process: rows that survive a kill, and a report of them.

`results.json` is written anew after every ratio, beside its place and then renamed. It says what it belongs to, so that
a sweep goes on where it was killed and no other one goes on with it. The random generators of Python, numpy and torch
start every scorer at the same state: ratios are compared on the same draws, and a sweep that was killed ends with the
numbers of one that was not.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from fused_merge._version import __version__
from fused_merge.distributed import Processes
from fused_merge.functional.backend import check_device
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.headers import load_json
from fused_merge.io.sources import PathLike, open_files
from fused_merge.io.writer import stamp_of, write_text, writing
from fused_merge.names import some
from fused_merge.optim.options import dtype_name
from fused_merge.per_tensor import Setting, finite, parse_dtype
from fused_merge.progress import progress_bar
from fused_merge.sweep.pareto import hypervolume, knee, pareto_front
from fused_merge.sweep.plots import Mark, check_matplotlib, draw_fronts
from fused_merge.sweep.scorers import (
    Harness,
    ImportedScorer,
    Scorer,
    check_transformers,
    load_model,
    load_tokenizer,
    stored_dtype,
)

RESULTS = "results.json"
TABLE = "results.md"
PICTURE = "pareto.png"

# Points of the line, or {label: point}.
Ratios: TypeAlias = "Sequence[float] | Mapping[str, Setting]"

_ALONE = Processes((), torch.device("cpu"))

# Slicing a volume takes n^(d - 1) steps for d scores.
_MOST_SCORES_OF_A_VOLUME = 4


class Line(Protocol):
    """What a sweep needs of `RatioSweep`."""

    def at(self, ratio: Any) -> AbstractContextManager[Any]:
        """Hold a model at a ratio, and put it back."""

    def move_to(self, ratio: Any) -> None:
        """Hold it at another ratio, within `at`."""


@dataclass(frozen=True)
class Row:
    """One ratio and its scores by name."""

    label: str
    ratio: Setting
    scores: dict[str, float]


@dataclass(frozen=True)
class Results:
    """The finished rows of a sweep.

    Attributes:
        sweep: what they belong to: checkpoints, ratios by label, names of scorers, dtype of the model if it is known.
        rows: in the order of the ratios, each with the same scores.
        minimise: the scores of which less is better, as the caller said.
        lower_is_better: the same, as the scorers said.
    """

    sweep: Mapping[str, Any]
    rows: Sequence[Row] = ()
    minimise: Collection[str] = ()
    lower_is_better: Collection[str] = ()

    @property
    def scores(self) -> list[str]:
        """The names of the scores; none before there is a row."""
        return list(self.rows[0].scores) if self.rows else []

    @property
    def maximise(self) -> list[bool]:
        """Whether more is better, for each score."""
        return [name not in self.minimise and name not in self.lower_is_better for name in self.scores]

    @property
    def points(self) -> list[list[float]]:
        """The scores of each row."""
        return [[row.scores[name] for name in self.scores] for row in self.rows]

    @property
    def front(self) -> list[Row]:
        """The rows that no other one dominates."""
        return [self.rows[i] for i in pareto_front(self.points, maximise=self.maximise)]

    @property
    def knee(self) -> Row:
        """The row where the front bends; see `fused_merge.sweep.pareto.knee`."""
        return self.rows[knee(self.points, maximise=self.maximise)]

    def worst(self) -> list[float]:
        """Return the worst of each score: what volumes are measured from."""
        columns = zip(*self.points, strict=True)
        return [min(column) if more else max(column) for column, more in zip(columns, self.maximise, strict=True)]

    def volume(self, reference: Sequence[float]) -> float | None:
        """Return the hypervolume of the front; None for more than four scores, which would take too long."""
        if len(self.scores) > _MOST_SCORES_OF_A_VOLUME:
            return None
        return hypervolume(self.points, reference, maximise=self.maximise)

    def document(self) -> dict[str, Any]:
        """Return everything in plain numbers and strings: what `results.json` holds; front and all only at the end."""
        content: dict[str, Any] = {
            "fused_merge": __version__,
            "sweep": self.sweep,
            "minimise": sorted(self.minimise),
            "lower_is_better": sorted(self.lower_is_better),
            "rows": [asdict(row) for row in self.rows],
        }
        if len(self.rows) == len(self.sweep["ratios"]):
            worst = self.worst()
            content |= {
                "front": [row.label for row in self.front],
                "knee": self.knee.label,
                "hypervolume": self.volume(worst),
                "reference": dict(zip(self.scores, worst, strict=True)),
            }
        return content


def evaluate_ratios(
    sweep: Line,
    ratios: Ratios,
    scorers: Mapping[str, Scorer],
    out: PathLike,
    *,
    checkpoints: Mapping[str, PathLike] | None = None,
    minimise: Collection[str] = (),
    progress: bool = True,
) -> list[Row]:
    """Score a model at many ratios; go on where a killed sweep of the same kind ended.

    Of a model under DDP or FSDP2 every process has to call this, with the same arguments: all of them score, and the
    scores of the first one are written, by it alone, and returned by all. A scorer that returns no finite number stops
    them together; one that raises stops its own process, as in training.

    Args:
        sweep: holds the model, which has its weights back at the end, also when a scorer fails.
        ratios: distinct numbers, or {label: number, or what else `sweep.at` takes by name of tensor}.
        scorers: name -> function of the model; it returns a number, which becomes the score of that name, or
            {key: number}, which become the scores `name/key`. One that knows of keys where less is better lists them
            in an attribute `lower_is_better`.
        out: folder of `results.json`; made if need be.
        checkpoints: the files or folders that the sweep is between, by what they are, such as `"base"`. Finished rows
            are only taken for the same ratios and scorers on files of the same path, size and time of change; without
            this, on any.
        minimise: the scores of which less is better.
        progress: show a progress bar where rich is installed and standard error is a terminal.

    Returns:
        A row for each ratio, in their order; `results.json` holds the same.

    Raises:
        ValueError: if ratios, scorers or `minimise` do not fit, or `out` holds the results of another sweep.
        RuntimeError: if a scorer raises, or returns what is no finite number; the sentence names scorer and ratio.
            Finished ratios are kept. Also if another process has raised one of these.
        OSError: if `out` cannot be written to, or a checkpoint cannot be read.
        TypeError: for a ratio that is no number.
    """
    return _evaluate(
        ratios,
        list(scorers),
        out,
        prepare=lambda: (sweep, scorers),
        checkpoints=checkpoints or {},
        minimise=minimise,
        progress=progress,
        processes=Processes.of(sweep.model) if isinstance(sweep, RatioSweep) else _ALONE,
    )


def sweep_checkpoints(
    base: PathLike,
    tuned: PathLike,
    ratios: Ratios,
    out: PathLike,
    *,
    scorers: Sequence[str] = (),
    tasks: Sequence[str] = (),
    minimise: Collection[str] = (),
    compare: Sequence[PathLike] = (),
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> list[Path]:
    """Load a causal language model, score it at many ratios, and report; see `evaluate_ratios` and `write_report`.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: a Hugging Face folder, from which Transformers loads the model. Its code is never run.
        ratios: as for `evaluate_ratios`.
        out: folder of `results.json`, `results.md` and `pareto.png`.
        scorers: `"module:function"`; see `fused_merge.sweep.scorers.ImportedScorer`.
        tasks: names of tasks of the lm-evaluation-harness. Their scores are called `task/metric`, or
            `task/metric,filter` where a filter has a name; the harness knows of which less is better.
        minimise: the scores of which less is better.
        compare: the `results.json` of other sweeps.
        device: `"cpu"` or `"cuda"`.
        dtype: of the model, e.g. `"bfloat16"`; None is that of the files of `tuned`.
        batch_size: of the tasks.
        progress: show a progress bar where rich is installed and standard error is a terminal.

    Returns:
        The files written.

    Raises:
        ImportError: if Transformers, matplotlib, the harness or the module of a scorer cannot be imported.
        ValueError: if anything does not fit; as `evaluate_ratios`, `write_report` and `RatioSweep`.
        RuntimeError: if a scorer fails.
        OSError: if a file cannot be read or written.
    """
    source = open_files(tuned, role="tuned")
    if not (source.path / "config.json").is_file():
        raise FileNotFoundError(f"{tuned} has no config.json, so nothing says what model it is; give a model folder")
    where, model_dtype = check_device(device), parse_dtype(dtype) or stored_dtype(source)
    check_matplotlib()
    check_transformers()
    for path in compare:
        read_results(path)
    imported = [ImportedScorer(text) for text in scorers]
    harness = Harness() if tasks else None
    names = [*(scorer.name for scorer in imported), *tasks]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"two scorers are called {twice[0]!r}; rename one")

    def prepare() -> tuple[Line, Mapping[str, Scorer]]:
        model = load_model(source.path, where, model_dtype)
        functions: dict[str, Scorer] = {scorer.name: scorer for scorer in imported}
        if harness is not None or any(scorer.takes_tokenizer for scorer in imported):
            tokenizer = load_tokenizer(source.path)
            for scorer in imported:
                scorer.tokenizer = tokenizer
            if harness is not None:
                functions |= harness.scorers(tasks, model, tokenizer, batch_size)
        return RatioSweep(model, base, tuned), functions

    _evaluate(
        ratios,
        names,
        out,
        prepare=prepare,
        checkpoints={"base": base, "tuned": tuned},
        minimise=minimise,
        progress=progress,
        also={"scorers": [*scorers, *tasks], "dtype": model_dtype and dtype_name(model_dtype)},
    )
    return write_report(out, compare)


def _evaluate(
    ratios: Ratios,
    names: Sequence[str],
    out: PathLike,
    *,
    prepare: Callable[[], tuple[Line, Mapping[str, Scorer]]],
    checkpoints: Mapping[str, PathLike],
    minimise: Collection[str],
    progress: bool,
    also: Mapping[str, Any] | None = None,
    processes: Processes = _ALONE,
) -> list[Row]:
    """Do what `evaluate_ratios` does, for scorers of these names.

    Model and scorers, which may take long to make ready, are asked of `prepare` when there is a ratio to score. `also`
    is what else the results belong to. Of `processes` the first reads and writes files.
    """
    wanted = _labelled(ratios)
    if not names:
        raise ValueError("there is no scorer; give at least one function of the model")
    for score in minimise:
        if not any(score == name or score.startswith(f"{name}/") for name in names):
            raise ValueError(f"minimise names {score!r}, which is no score of {some(map(repr, names))}; correct it")
    path = Path(out) / RESULTS
    with processes.raising_together():
        belongs_to = {
            "checkpoints": {role: _describe(checkpoint) for role, checkpoint in checkpoints.items()},
            "ratios": wanted,
            "scorers": list(names),
            **(also or {}),
        }
        found = _resumed(path, belongs_to) if processes.is_first else Results(belongs_to)
    known, lower = processes.from_first((found.rows, found.lower_is_better))
    rows = {row.label: row for row in known}

    def in_order() -> list[Row]:
        return [rows[label] for label in wanted if label in rows]

    def keep(results: Results) -> None:
        with processes.raising_together():
            if processes.is_first:
                _save(path, results)

    results = Results(belongs_to, in_order(), minimise, lower)
    if results.rows:
        _check_minimise(results)
    # At once, so that a folder that cannot be written to is no surprise after the first ratio.
    keep(results)
    missing = {label: ratio for label, ratio in wanted.items() if label not in rows}
    if missing:
        sweep, scorers = prepare()
        shown = progress and processes.is_first
        with ExitStack() as stack, progress_bar("sweeping", len(missing), unit="ratios", enabled=shown) as advance:
            for i, (label, ratio) in enumerate(missing.items()):
                with processes.raising_together():
                    # Entered once: the model's own weights are put aside once, and put back once.
                    if i == 0:
                        model = stack.enter_context(sweep.at(ratio))
                    else:
                        sweep.move_to(ratio)
                kept = f"{len(results.rows)} of {len(wanted)} ratios are finished and kept in {path}"
                scores = _score(scorers, model, label, results.scores, kept, processes)
                rows[label], lower = processes.from_first((Row(label, ratio, scores), _lower(scorers)))
                results = replace(results, rows=in_order(), lower_is_better={*results.lower_is_better, *lower})
                keep(results)
                _check_minimise(results)
                advance(1)
    return list(results.rows)


def _labelled(ratios: Ratios) -> dict[str, Setting]:
    if isinstance(ratios, (int, float)):
        raise TypeError(f"ratios must be a sequence, got {ratios}; write [{ratios}]")
    if not len(ratios):
        raise ValueError("ratios is empty; give at least one")
    if isinstance(ratios, Mapping):
        if odd := [label for label in ratios if not isinstance(label, str)]:
            raise TypeError(f"a label of a ratio must be text, got {odd[0]!r}; write {str(odd[0])!r}")
        return {
            label: {key: finite(value, what=f"ratio of {key!r}") for key, value in ratio.items()}
            if isinstance(ratio, Mapping)
            else finite(ratio, what="ratio")
            for label, ratio in ratios.items()
        }
    labelled: dict[str, Setting] = {}
    for ratio in ratios:
        # -0.0 is 0.
        number = finite(ratio, what="ratio") + 0.0
        label = f"{number:g}" if float(f"{number:g}") == number else repr(number)
        if label in labelled:
            raise ValueError(f"ratio {label} is given twice; leave one out")
        labelled[label] = number
    return labelled


def _describe(path: PathLike) -> dict[str, Any]:
    """Return where a checkpoint is, and the size and time of change of its files."""
    files = {file.name: list(stamp_of(file)) for file in open_files(path).files()}
    return {"path": str(Path(path).absolute()), "files": files}


def _score(
    scorers: Mapping[str, Scorer],
    model: Any,
    label: str,
    expected: Sequence[str],
    kept: str,
    processes: Processes,
) -> dict[str, float]:
    """Return the scores of a model, or say which scorer failed at the ratio called `label`, and what is `kept`."""
    scores: dict[str, float] = {}
    for name, scorer in scorers.items():
        at = f"scorer {name!r} at ratio {label}"
        way_out = f"correct it and run the same again ({kept})"
        try:
            with _same_draws():
                found = scorer(model)
        except Exception as error:
            said = ": ".join(filter(None, (type(error).__name__, str(error))))
            raise RuntimeError(f"{at} raised {said}; {way_out}") from error
        # Before the next scorer, in which a process could wait for one that has failed.
        with processes.raising_together():
            named = found if isinstance(found, Mapping) else {None: found}
            for key, value in named.items():
                score = name if key is None else f"{name}/{key}"
                number = _number(value)
                if not math.isfinite(number):
                    of = "" if key is None else f" for {key!r}"
                    raise RuntimeError(f"{at} returned {value!r}{of}, which is no finite number; {way_out}")
                if score in scores:
                    raise RuntimeError(f"{at} returned {score!r} as another scorer does; rename one ({kept})")
                scores[score] = number
            if not named:
                raise RuntimeError(f"{at} returned no score; {way_out}")
    with processes.raising_together():
        if expected and set(scores) != set(expected):
            raise RuntimeError(
                f"the scores at ratio {label} are {some(map(repr, scores))} and were {some(map(repr, expected))} "
                f"before; return the same ones at every ratio ({kept})"
            )
    return {name: scores[name] for name in expected or scores}


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


def _lower(scorers: Mapping[str, Scorer]) -> set[str]:
    return {f"{name}/{key}" for name, scorer in scorers.items() for key in getattr(scorer, "lower_is_better", ())}


def _check_minimise(results: Results) -> None:
    if unknown := sorted(set(results.minimise) - set(results.scores)):
        raise ValueError(
            f"minimise names {some(map(repr, unknown))}, but the scores are {some(map(repr, results.scores), 10)}; "
            "correct it and run the same again, finished ratios are kept"
        )


# ---------------------------------------------------------------- files


def _save(path: Path, results: Results) -> None:
    write_text(path, json.dumps(results.document(), indent=1) + "\n")


def _resumed(path: Path, belongs_to: Mapping[str, Any]) -> Results:
    """Return what a killed sweep left, or that there is nothing yet."""
    if not path.exists():
        return Results(belongs_to)
    found = read_results(path)
    if not found.rows:
        return Results(belongs_to)
    # As it would be read back.
    same = json.loads(json.dumps(belongs_to))
    other = [part for part in same if found.sweep.get(part) != same[part]]
    if other:
        raise ValueError(
            f"{path} holds the results of a sweep with other {' and '.join(other)}; choose another folder, "
            "or delete it to begin anew"
        )
    return replace(found, sweep=belongs_to)


def read_results(path: PathLike) -> Results:
    """Read a `results.json`.

    Raises:
        ValueError: if it is something else; the sentence names it.
        OSError: if it cannot be read.
    """
    try:
        content = load_json(Path(path).read_bytes())
        rows = [
            Row(str(row["label"]), row["ratio"], {name: float(value) for name, value in row["scores"].items()})
            for row in content["rows"]
        ]
        results = Results(dict(content["sweep"]), rows, list(content["minimise"]), list(content["lower_is_better"]))
        # Tells of scores that are not finite, or not the same in all rows.
        pareto_front(results.points)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no results of a sweep ({type(error).__name__}: {error}); give another file, or delete it"
        ) from error
    return results


# ---------------------------------------------------------------- report


def write_report(out: PathLike, compare: Sequence[PathLike] = ()) -> list[Path]:
    """Write `results.md` and, of two scores or more, `pareto.png` beside a finished `results.json`.

    The table marks the front and the knee and gives the hypervolume, measured from the worst of each score over all
    sweeps. The picture shows the first two scores; with further sweeps, the fronts of all.

    Args:
        out: the folder of `results.json`.
        compare: the `results.json` of other sweeps with the same scores.

    Returns:
        All files of the report, `results.json` first.

    Raises:
        ValueError: if a file holds no results, or other scores.
        ImportError: if there is a picture to draw and matplotlib is missing.
        OSError: if a file cannot be read or written.
    """
    folder = Path(out)
    sweeps = _compared(folder / RESULTS, [Path(path) for path in compare])
    main = next(iter(sweeps.values()))
    files = [folder / RESULTS, folder / TABLE]
    write_text(files[1], _markdown(sweeps))
    if len(main.scores) > 1:
        first, second = main.scores[:2]
        marks = {
            name: [Mark(row.label, row.scores[first], row.scores[second]) for row in results.rows]
            for name, results in sweeps.items()
        }
        files.append(folder / PICTURE)
        with writing(files[2]):
            draw_fronts(files[2], marks, (first, second), maximise=(main.maximise[0], main.maximise[1]))
    return files


def _compared(path: Path, others: Sequence[Path]) -> dict[str, Results]:
    """Return the sweeps under names that tell them apart, with the scores and directions of the first."""
    main = read_results(path)
    paths = [path, *others]
    names = [p.absolute().parent.name for p in paths]
    if len(set(names)) < len(names):
        names = [str(p) for p in paths]
    sweeps: dict[str, Results] = {}
    for name, p in zip(names, paths, strict=True):
        found = read_results(p)
        if not found.rows:
            raise ValueError(f"{p} has no finished ratio yet; run that sweep first")
        if set(found.scores) != set(main.scores):
            raise ValueError(
                f"{p} has the scores {some(map(repr, found.scores))} and {path} has {some(map(repr, main.scores))}; "
                "compare sweeps that were scored alike"
            )
        rows = [replace(row, scores={name: row.scores[name] for name in main.scores}) for row in found.rows]
        sweeps[name] = replace(found, rows=rows, minimise=main.minimise, lower_is_better=main.lower_is_better)
    return sweeps


def _markdown(sweeps: Mapping[str, Results]) -> str:
    main_name, main = next(iter(sweeps.items()))
    everything = replace(main, rows=[row for results in sweeps.values() for row in results.rows])
    worst = everything.worst()
    best_of_all = {id(row) for row in everything.front}
    arrows = [f"{name} {'↑' if more else '↓'}" for name, more in zip(main.scores, main.maximise, strict=True)]
    measured_from = ", ".join(f"{name} {value:.6g}" for name, value in zip(main.scores, worst, strict=True))
    parts = [
        f"# Ratios of {main_name}",
        "↑ more is better, ↓ less is better. On the *front* are the ratios that no other one of the same sweep "
        "dominates; at the *knee* it bends most, each score scaled to [0, 1] over the front. "
        f"The *hypervolume* is measured from the worst of each score ({measured_from}).",
    ]
    if len(sweeps) > 1:
        parts.append(
            _table(
                ["sweep", "hypervolume", "knee", "front", "of these on the front of all sweeps"],
                [
                    [
                        name,
                        _volume(results, worst),
                        results.knee.label,
                        ", ".join(row.label for row in results.front),
                        ", ".join(row.label for row in results.rows if id(row) in best_of_all),
                    ]
                    for name, results in sweeps.items()
                ],
            )
        )
    else:
        parts.append(f"Hypervolume {_volume(main, worst)}, knee at {main.knee.label}.")
    for name, results in sweeps.items():
        if len(sweeps) > 1:
            parts.append(f"## {name}")
        places = dict.fromkeys((row.label for row in results.front), "front") | {results.knee.label: "knee"}
        rows = [
            [row.label, *(f"{value:.6g}" for value in row.scores.values()), places.get(row.label, "")]
            for row in results.rows
        ]
        parts.append(_table(["ratio", *arrows, ""], rows))
    return "\n\n".join(parts) + "\n"


def _volume(results: Results, reference: Sequence[float]) -> str:
    volume = results.volume(reference)
    return f"not computed (more than {_MOST_SCORES_OF_A_VOLUME} scores)" if volume is None else f"{volume:.6g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
