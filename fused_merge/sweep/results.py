"""The results of a sweep, and `results.json`, which holds them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fused_merge._version import __version__
from fused_merge.io.files import expanded
from fused_merge.io.headers import load_json
from fused_merge.io.sources import PathLike
from fused_merge.per_tensor import PerTensor
from fused_merge.sweep.pareto import hypervolume, knee, pareto_front

RESULTS = "results.json"
# What a file lists of names of scores.
_NAMES = ("minimize", "lower_is_better", "details")

# Slicing a volume takes n^(d - 1) steps for d scores.
MOST_SCORES_OF_A_VOLUME = 4


@dataclass(frozen=True)
class ScoredRatio:
    """One ratio and its scores by name."""

    label: str
    ratio: PerTensor
    scores: dict[str, float]

    def of(self, scorer: str) -> dict[str, float]:
        """Return the scores that a scorer gave: the one of its name, or those called `name/key`; none if it did not."""
        return {name: score for name, score in self.scores.items() if f"{name}/".startswith(f"{scorer}/")}


@dataclass(frozen=True)
class Results:
    """The finished ratios of a sweep, in the order of its ratios, each with the same scores.

    Attributes:
        sweep: what they belong to: checkpoints, ratios by label, names of scorers, and what else decides the scores.
        minimize, lower_is_better: the scores for which less is better, as the caller and as the scorers said.
        details: the scores that are kept, but count for no front, such as those of the subtasks of a group.
        partial: the ratios that only some scorers have scored; they count for nothing, and a sweep goes on from them.
    """

    sweep: Mapping[str, Any]
    finished: Sequence[ScoredRatio] = ()
    minimize: Collection[str] = ()
    lower_is_better: Collection[str] = ()
    details: Collection[str] = ()
    partial: Sequence[ScoredRatio] = ()

    @property
    def all(self) -> list[ScoredRatio]:
        """The finished ratios and the partial ones."""
        return [*self.finished, *self.partial]

    @property
    def scores(self) -> list[str]:
        """The names of the scores that count; none before a ratio is finished."""
        return [name for name in self.finished[0].scores if name not in self.details] if self.finished else []

    @property
    def maximize(self) -> list[bool]:
        """Whether more is better, for each score."""
        return [name not in self.minimize and name not in self.lower_is_better for name in self.scores]

    @property
    def points(self) -> list[list[float]]:
        """The scores of each finished ratio."""
        return [[scored.scores[name] for name in self.scores] for scored in self.finished]

    @property
    def front(self) -> list[ScoredRatio]:
        """The ratios that no other one dominates."""
        return [self.finished[i] for i in pareto_front(self.points, maximize=self.maximize)]

    @property
    def knee(self) -> ScoredRatio:
        """The ratio where the front bends; see `fused_merge.sweep.pareto.knee`."""
        return self.finished[knee(self.points, maximize=self.maximize)]

    def worst(self) -> list[float]:
        """Return the worst of each score: what volumes are measured from."""
        columns = zip(*self.points, strict=True)
        return [min(column) if more else max(column) for column, more in zip(columns, self.maximize, strict=True)]

    def volume(self, reference: Sequence[float]) -> float | None:
        """Return the hypervolume of the front; None for more than four scores, which would take too long."""
        if len(self.scores) > MOST_SCORES_OF_A_VOLUME:
            return None
        return hypervolume(self.points, reference, maximize=self.maximize)

    def document(self) -> dict[str, Any]:
        """Return what `results.json` holds; front, knee and volume once every ratio is finished."""
        content: dict[str, Any] = {"fused_merge": __version__, "sweep": self.sweep}
        for name in _NAMES:
            content[name] = sorted(getattr(self, name))
        content["rows"] = [asdict(scored) for scored in self.finished]
        if self.partial:
            content["partial"] = [asdict(scored) for scored in self.partial]
        if len(self.finished) == len(self.sweep["ratios"]):
            worst = self.worst()
            content |= {"front": [scored.label for scored in self.front], "knee": self.knee.label}
            content |= {"hypervolume": self.volume(worst), "reference": dict(zip(self.scores, worst, strict=True))}
        return content


def read_results(path: PathLike) -> Results:
    """Read a `results.json`.

    Raises:
        ValueError: if it is something else; the sentence names it.
        OSError: if it cannot be read.
    """
    try:
        content = load_json(expanded(path).read_bytes())
        rows = [_scored(entry) for entry in content["rows"]]
        if any(set(row.scores) != set(rows[0].scores) for row in rows):
            raise ValueError("the ratios have different scores")
        # Older files have neither details nor partial ratios.
        names = {name: list(content.get(name, ())) for name in _NAMES}
        partial = [_scored(entry) for entry in content.get("partial", ())]
        results = Results(dict(content["sweep"]), rows, **names, partial=partial)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results of a sweep ({said}); give another file, or delete it") from error
    return results


def _scored(entry: Mapping[str, Any]) -> ScoredRatio:
    scores = {name: float(score) for name, score in entry["scores"].items()}
    return ScoredRatio(str(entry["label"]), entry["ratio"], scores)


def resume(path: Path, sweep: Mapping[str, Any]) -> Results:
    """Return what a killed sweep left in `results.json`, or raise ValueError if that is of another sweep."""
    found = read_results(path) if path.exists() else None
    if found is None or not (found.finished or found.partial):
        return Results(sweep)
    # As it would be read back.
    same = json.loads(json.dumps(sweep))
    if other := " and ".join(part for part in same | found.sweep if found.sweep.get(part) != same.get(part)):
        what = f"{path} holds the results of a sweep with other {other}"
        raise ValueError(f"{what}; choose another folder, or delete it to begin anew")
    return replace(found, sweep=sweep)
