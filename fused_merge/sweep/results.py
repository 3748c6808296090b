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

# Slicing a volume takes n^(d - 1) steps for d scores.
MOST_SCORES_OF_A_VOLUME = 4


@dataclass(frozen=True)
class ScoredRatio:
    """One ratio and its scores by name."""

    label: str
    ratio: PerTensor
    scores: dict[str, float]


@dataclass(frozen=True)
class Results:
    """The finished ratios of a sweep, in the order of its ratios, each with the same scores.

    Attributes:
        sweep: what they belong to: checkpoints, ratios by label, names of scorers, dtype of the model if it is known.
        minimize, lower_is_better: the scores for which less is better, as the caller and as the scorers said.
    """

    sweep: Mapping[str, Any]
    finished: Sequence[ScoredRatio] = ()
    minimize: Collection[str] = ()
    lower_is_better: Collection[str] = ()

    @property
    def scores(self) -> list[str]:
        """The names of the scores; none before a ratio is finished."""
        return list(self.finished[0].scores) if self.finished else []

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
        content |= {"minimize": sorted(self.minimize), "lower_is_better": sorted(self.lower_is_better)}
        content["rows"] = [asdict(scored) for scored in self.finished]
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
        finished = []
        for entry in content["rows"]:
            scores = {name: float(score) for name, score in entry["scores"].items()}
            finished.append(ScoredRatio(str(entry["label"]), entry["ratio"], scores))
        results = Results(dict(content["sweep"]), finished, list(content["minimize"]), list(content["lower_is_better"]))
        # Raises for scores that are not finite, or not the same for all ratios.
        pareto_front(results.points)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results of a sweep ({said}); give another file, or delete it") from error
    return results


def resume(path: Path, sweep: Mapping[str, Any]) -> Results:
    """Return what a killed sweep left in `results.json`, or raise ValueError if that is of another sweep."""
    found = read_results(path) if path.exists() else None
    if found is None or not found.finished:
        return Results(sweep)
    # As it would be read back.
    same = json.loads(json.dumps(sweep))
    if other := " and ".join(part for part in same if found.sweep.get(part) != same[part]):
        what = f"{path} holds the results of a sweep with other {other}"
        raise ValueError(f"{what}; choose another folder, or delete it to begin anew")
    return replace(found, sweep=sweep)
