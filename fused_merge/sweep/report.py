"""The report of a sweep: a table, and a picture of two scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fused_merge.io.files import expanded
from fused_merge.io.sources import PathLike
from fused_merge.io.writer import write_text
from fused_merge.names import some
from fused_merge.plots.style import picture_path, write_picture
from fused_merge.sweep.plots import draw_fronts
from fused_merge.sweep.results import MOST_SCORES_OF_A_VOLUME, RESULTS, Results, read_results

TABLE = "results.md"
PICTURE = "pareto.png"


def write_report(out: PathLike, compare: Sequence[PathLike] = ()) -> list[Path]:
    """Write `results.md` and, for two scores or more, `pareto.png` beside a finished `results.json`.

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
    folder = expanded(out)
    sweeps = _compared([folder / RESULTS, *map(expanded, compare)])
    files = [folder / RESULTS, folder / TABLE]
    write_text(files[1], _markdown(sweeps))
    if len(next(iter(sweeps.values())).scores) > 1:
        files.append(picture_path(folder / PICTURE))
        write_picture(draw_fronts(sweeps), files[2])
    return files


def check_places(out: Path) -> None:
    """Raise IsADirectoryError if a folder is where a sweep will write a file, ImportError if it cannot draw one."""
    picture_path(out / PICTURE)
    for path in (out / RESULTS, out / TABLE, out / PICTURE):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder and should become a file; remove it, or choose another place")


def read_finished(path: PathLike) -> Results:
    """Read a `results.json` as `read_results`; ValueError also if it has no finished ratio."""
    results = read_results(path)
    if not results.finished:
        raise ValueError(f"{path} has no finished ratio yet; run that sweep first")
    return results


def _compared(paths: Sequence[Path]) -> dict[str, Results]:
    """Return the sweeps under names that tell them apart, with the scores and directions of the first."""
    found = [read_finished(path) for path in paths]
    main = found[0]
    names = [path.absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    sweeps: dict[str, Results] = {}
    for name, path, results in zip(names, paths, found, strict=True):
        if set(results.scores) != set(main.scores):
            here, there = (some(map(repr, each.scores)) for each in (results, main))
            what = f"{path} has the scores {here} and {paths[0]} has {there}"
            raise ValueError(f"{what}; compare sweeps with the same scores")
        first = dict.fromkeys(main.scores)
        finished = [
            replace(one, scores={key: one.scores[key] for key in first | one.scores}) for one in results.finished
        ]
        sweeps[name] = replace(main, sweep=results.sweep, finished=finished, details=results.details)
    return sweeps


def _markdown(sweeps: Mapping[str, Results]) -> str:
    main_name, main = next(iter(sweeps.items()))
    everything = replace(main, finished=[ratio for results in sweeps.values() for ratio in results.finished])
    worst = everything.worst()
    best_of_all = {id(ratio) for ratio in everything.front}
    arrows = [f"{name} {'↑' if more else '↓'}" for name, more in zip(main.scores, main.maximize, strict=True)]
    measured_from = ", ".join(f"{name} {value:.6g}" for name, value in zip(main.scores, worst, strict=True))
    sections = [
        f"# Ratios of {main_name}",
        "↑ more is better, ↓ less is better. On the *front* are the ratios that no other one of the same sweep "
        "dominates; at the *knee* it bends most, each score scaled to [0, 1] over the front. "
        f"The *hypervolume* is measured from the worst of each score ({measured_from}).",
    ]
    if len(sweeps) > 1:
        lines = [["sweep", "hypervolume", "knee", "front", "of these on the front of all sweeps"]]
        for name, results in sweeps.items():
            best = ", ".join(ratio.label for ratio in results.finished if id(ratio) in best_of_all)
            front = ", ".join(ratio.label for ratio in results.front)
            lines.append([name, _volume(results, worst), results.knee.label, front, best])
        sections.append(_table(lines))
    else:
        sections.append(f"Hypervolume {_volume(main, worst)}, knee at {main.knee.label}.")
    for name, results in sweeps.items():
        if len(sweeps) > 1:
            sections.append(f"## {name}")
        places = dict.fromkeys((ratio.label for ratio in results.front), "front") | {results.knee.label: "knee"}
        lines = [["ratio", *arrows, ""]]
        for ratio in results.finished:
            values = [f"{ratio.scores[score]:.6g}" for score in results.scores]
            lines.append([ratio.label, *values, places.get(ratio.label, "")])
        sections.append(_table(lines))
        if details := [score for score in results.finished[0].scores if score not in results.scores]:
            lines = [["in detail", *(ratio.label for ratio in results.finished)]]
            lines += [[score, *(f"{ratio.scores[score]:.6g}" for ratio in results.finished)] for score in details]
            sections.append(_table(lines))
    return "\n\n".join(sections) + "\n"


def _volume(results: Results, reference: Sequence[float]) -> str:
    volume = results.volume(reference)
    return f"not computed (more than {MOST_SCORES_OF_A_VOLUME} scores)" if volume is None else f"{volume:.6g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
