"""What a sweep of a resident model costs beside its evaluations, against copies of the model, in one command.

    python bench/bench_sweep.py --size 0.1 0.5 --dtype bfloat16 float32

For each SIZE and dtype a module shaped like a Llama of so many billion parameters is made in memory, with two ends.
Then, turn by turn:

    deepcopy             the floor: `copy.deepcopy` of the model, once for each ratio
    copy in place        `copy_` into the model's weights from another model's, once for each ratio
    sweep, eager         `RatioSweep(impl="eager")`: entered, moved to every ratio and left; the ends are state dicts
    sweep, in memory     the same by default; what the first turn compiles is not timed
    sweep, in files      the same; the ends are safetensors files in the page cache
    each entered         the same as in files, entered and left once for each ratio

A first turn is not timed. The model is at neither end, so that a sweep keeps a copy of it; after every sweep it must be
as before.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from checkpoint_pair import DELTA, SIGMA, llama, shapes
from checkpoint_rows import machine, print_table
from safetensors.torch import save_file
from torch import Tensor, nn

import fused_merge as fm

RESULTS = Path(__file__).resolve().parent / "results" / "sweep.json"
DEEPCOPY, IN_PLACE = "deepcopy", "copy in place"


class Row(NamedTuple):
    """What one provider took for all ratios."""

    provider: str
    dtype: str
    parameters: int
    ratios: int
    seconds: float  # median
    seconds_min: float
    seconds_max: float
    against_deepcopy: float
    against_copy_in_place: float


def build(sizes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> nn.Module:
    """Return a module with these weights, near those of seed 0."""
    root = nn.Module()
    start, change = (torch.Generator().manual_seed(seed) for seed in (0, seed))
    for name, shape in sizes.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        weight = SIGMA * torch.randn(shape, generator=start)
        if seed:
            weight += DELTA * torch.randn(shape, generator=change)
        module.register_parameter(leaf, nn.Parameter(weight.to(dtype)))
    return root


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def along(sweep: fm.RatioSweep[nn.Module], ratios: list[float]) -> None:
    """Go to every ratio and come back."""
    first, *others = ratios
    with sweep.at(first):
        for ratio in others:
            sweep.move_to(ratio)


def each_entered(sweep: fm.RatioSweep[nn.Module], ratios: list[float]) -> None:
    for ratio in ratios:
        with sweep.at(ratio):
            pass


def copies(model: nn.Module, count: int) -> None:
    for _ in range(count):
        copy.deepcopy(model)


def copies_in_place(weights: dict[str, Tensor], sources: dict[str, Tensor], count: int) -> None:
    for _ in range(count):
        for name, weight in weights.items():
            weight.copy_(sources[name])


def measure(arguments: argparse.Namespace, size: float, dtype: torch.dtype, folder: Path) -> list[Row]:
    """Time every provider turn by turn."""
    sizes = shapes(llama(size * 1e9))
    base, tuned, model = (build(sizes, dtype, seed) for seed in range(3))
    ratios = [i / (arguments.ratios - 1) for i in range(arguments.ratios)]
    files = [folder / f"{dtype}-{name}.safetensors".removeprefix("torch.") for name in ("base", "tuned")]
    for file, end in zip(files, (base, tuned), strict=True):
        save_file(weights_of(end), file)
    eager = fm.RatioSweep(model, weights_of(base), weights_of(tuned), impl="eager")
    in_memory = fm.RatioSweep(model, weights_of(base), weights_of(tuned))
    in_files = fm.RatioSweep(model, *files)
    scratch, before = copy.deepcopy(model), copy.deepcopy(weights_of(model))
    providers: dict[str, Callable[[], None]] = {
        DEEPCOPY: lambda: copies(model, len(ratios)),
        IN_PLACE: lambda: copies_in_place(weights_of(scratch), weights_of(model), len(ratios)),
        "sweep, eager": lambda: along(eager, ratios),
        "sweep, in memory": lambda: along(in_memory, ratios),
        "sweep, in files": lambda: along(in_files, ratios),
        "each entered": lambda: each_entered(in_files, ratios),
    }
    turns: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(arguments.rounds + 1):
        for name, run in providers.items():
            start = perf_counter()
            run()
            if turn:
                turns[name].append(perf_counter() - start)
            if any(not torch.equal(weight, before[key]) for key, weight in weights_of(model).items()):
                sys.exit(f"{name}: the model is not what it was before")
    floor = {name: median(turns[name]) for name in (DEEPCOPY, IN_PLACE)}
    parameters = sum(weight.numel() for weight in before.values())
    return [
        Row(
            name,
            str(dtype).removeprefix("torch."),
            parameters,
            len(ratios),
            median(seconds),
            min(seconds),
            max(seconds),
            median(seconds) / floor[DEEPCOPY],
            median(seconds) / floor[IN_PLACE],
        )
        for name, seconds in turns.items()
    ]


def print_rows(rows: list[Row]) -> None:
    print_table(
        ("provider", "dtype", "parameters", "s", "min", "max", "/ deepcopy", "/ copy in place"),
        [
            (
                row.provider,
                row.dtype,
                f"{row.parameters / 1e9:.3g} B",
                *(f"{x:.3f}" for x in (row.seconds, row.seconds_min, row.seconds_max)),
                *(f"{x:.2f}" for x in (row.against_deepcopy, row.against_copy_in_place)),
            )
            for row in rows
        ],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", type=float, nargs="+", default=[0.2], metavar="BILLIONS", help="parameters of the models"
    )
    parser.add_argument("--ratios", type=int, default=11, metavar="R", help="how many, from 0 to 1")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3, help="timed turns")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for the files of the ends")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in bench/results/{RESULTS.name}")
    arguments = parser.parse_args()
    if not min(arguments.size) > 0 or arguments.ratios < 2 or arguments.rounds < 1:
        parser.error("--size must be above 0, --ratios at least 2, --rounds at least 1")
    return arguments


def main() -> None:
    """Measure what the arguments say."""
    arguments = parse()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for size, dtype in product(arguments.size, arguments.dtype):
            rows += measure(arguments, size, getattr(torch, dtype), Path(folder))
        where: dict[str, Any] = machine(Path(folder).resolve(), None)
    del where["mergekit"]
    where["threads"] = torch.get_num_threads()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{arguments.ratios} ratios:")
    print_rows(rows)
    if arguments.write:
        RESULTS.write_text(json.dumps([{**where, **row._asdict()} for row in rows], indent=1) + "\n")
        print(f"rows: {RESULTS}")


if __name__ == "__main__":
    main()
