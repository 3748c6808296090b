"""What has to be done, and where its results lie: every job writes one file, and a job whose file exists is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from afterwards import averages, merged
from evaluate import Weights, along
from plan import ADAMW, CONTENDERS, Point, Size, Training
from safetensors.torch import save_file
from training import Trained, train
from worlds import Start, World, is_first, wait_for_all

import fused_merge as fm

Settings = Mapping[str, tuple[float, ...]]  # of the contenders after AdamW


@dataclass(frozen=True)
class Job:
    """A training with everything that is measured after it, or, without one, the start of a seed."""

    world: World
    out: Path
    seed: int
    training: Training | None = None
    afterwards: Settings | None = None  # of AdamW: what is made of its run, and by which settings
    averaged: bool = False  # whether the averages of start and AdamW are measured too

    @property
    def file(self) -> Path:
        """Where the measured points are written."""
        path = f"seed{self.seed}/start" if self.training is None else self.training.path
        return self.out / "runs" / f"{path}.json"

    @property
    def done(self) -> bool:
        """Whether it has been run."""
        return self.file.exists()

    def points(self) -> list[Point]:
        """Read what was measured."""
        return [Point(**{**entry, "ratios": tuple(entry["ratios"])}) for entry in json.loads(self.file.read_text())]

    def run(self) -> None:
        """Do it, and write its file last; of several processes the first measures and writes."""
        points = self._start_points() if self.training is None else self._training_points(self.training)
        if is_first():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            staging = self.file.with_suffix(".part")
            staging.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
            staging.rename(self.file)
        wait_for_all()

    def _start_points(self) -> list[Point]:
        self.world.prepare(self.seed)
        start = self.world.start(self.seed)
        names = ("base", "sft") if is_first() else ()
        return [_measured(start, None, name, None, getattr(start, name)) for name in names]

    def _training_points(self, training: Training) -> list[Point]:
        start = self.world.start(self.seed)
        work = self.file.with_suffix(".work")
        if is_first():
            shutil.rmtree(work, ignore_errors=True)
        settings = dict(self.afterwards or {})
        trained = train(training, start, work, settings)
        if not is_first():
            return []
        points = [_measured(start, training, training.contender, training.setting, trained.weights)]
        if training.contender == ADAMW:
            folder = self._keep(start, trained)
            for name, values in settings.items():
                for value in values:
                    weights = trained.on_the_way.get((name, value)) or merged(name, value, start, folder, work)
                    points.append(_measured(start, training, name, value, weights))
            if self.averaged:
                points += self._averages(start, training, folder)
        shutil.rmtree(work, ignore_errors=True)
        return points

    def _keep(self, start: Start, trained: Trained) -> Path:
        """Write what AdamW has trained as a checkpoint, with all that a model folder has."""
        folder = self.file.with_suffix("")
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(start.folder / "sft", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(trained.weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def _averages(self, start: Start, training: Training, folder: Path) -> list[Point]:
        # The search writes to its model, so all ratios are found before any is measured.
        planned = list(averages(start, folder, seed=1000 + training.seed))
        model = start.model()
        sweep = fm.RatioSweep(model, start.folder / "sft", folder)
        points = []
        with sweep.at(1.0):
            for family, ratio, ratios in planned:
                sweep.move_to(ratios)
                weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
                scores, (content, cosine) = start.examine(model), along(start.sft, weights, start.tau)
                place = (training.seed, training.order, training.algorithm, family, ratio)
                points.append(Point(*place, *astuple(scores), content, cosine, ratios.ratios))
        return points


def _measured(start: Start, training: Training | None, family: str, setting: float | None, weights: Weights) -> Point:
    scores = start.examine(start.model(weights))
    order, algorithm = (None, None) if training is None else (training.order, training.algorithm)
    return Point(start.seed, order, algorithm, family, setting, *astuple(scores), *along(start.sft, weights, start.tau))


def choose(points: list[Point], size: Size) -> dict[tuple[str, str], float]:
    """For every algorithm and contender the setting whose model dominates the largest area of reward and exact match.

    The area is counted from the base's reward, and from no task at all.
    """
    [worst] = [point.reward for point in points if point.family == "base"]
    chosen: dict[tuple[str, str], float] = {}
    for algorithm in size.algorithms:
        for contender in CONTENDERS.values():
            own = [p for p in points if (p.algorithm, p.family) == (algorithm, contender.name)]
            if own:
                best = max(own, key=lambda point: max(point.reward - worst, 0.0) * point.exact_match)
                assert best.setting is not None
                chosen[algorithm, contender.name] = best.setting
    for algorithm, name in list(chosen):
        for contender in CONTENDERS.values():
            if contender.chosen_with == name:
                chosen[algorithm, contender.name] = chosen[algorithm, name]
    return chosen
