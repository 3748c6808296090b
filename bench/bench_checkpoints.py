"""Whole checkpoints at many ratios, against the disk and against what others do, in one command.

    python bench/bench_checkpoints.py --size 0.5 --ratios 11 --work DIR             times, memory and bits
    python bench/bench_checkpoints.py --size 0.2 --ratios 11 --work DIR --memory    how memory grows: it must not
    python bench/bench_checkpoints.py --size 0.5 --ratios 11 --work DIR --settings  what threads and pages are worth

Two folders shaped like a Llama of SIZE billion bf16 parameters are made in DIR, once. Then, turn by turn:

    dd                       one `dd oflag=direct` per output file: the floor
    fused_merge call         `interpolate_checkpoints` in a fresh process, without its imports
    fused_merge command      `fused-merge interpolate`, with them
    fused_merge per ratio    the same command once for each ratio, which reads the inputs as often
    naive torch              load_file both, torch.lerp in fp32, save_file, in a fresh process
    mergekit-yaml            linear, dtype bfloat16, where installed; one ratio is timed, and multiplied
    mergekit-multi           the same, all ratios in one command

With --settings dd and the call, and the call with 3, 4 or 6 threads, and with its buffers in pages of 4 KiB.

A first turn is not timed: in it memory is watched, which takes time itself, and every output of fused_merge is held
against float64 rounded once. Before each measurement the inputs are in the page cache and nothing waits to be written
or freed. "on disk" is the time until the files are also there: others leave them in the page cache.

Memory is anonymous (private, or shared without a file) above an idle `import torch`; resident memory also counts the
mapped pages of the inputs, which the system takes back when it needs them. Linux, Python 3.11 or later.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoint_pair import Bits, Failure, Pair, compare, make_pair, pair_at, sentence
from checkpoint_rows import Growth, draw, filesystem, machine, print_growth, print_rows, row_of, write
from checkpoint_runs import CALL, CHILDREN, DD, OURS, YAML, Measurement, measure, providers, ratios_of, settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "checkpoints"
# Below --work; removed after each measurement.
OUT = "bench_checkpoints.out"


def require_room(work: Path, missing: Sequence[Pair], written: int, limit: float) -> None:
    """Leave with a sentence if the disk or the limit is too small for the inputs and the largest output."""
    shutil.rmtree(work / OUT, ignore_errors=True)
    needed = 2 * sum(pair.bytes for pair in missing) + written
    total = needed + sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    advice = "or choose a smaller --size or fewer --ratios"
    if total > limit * 1e9:
        sys.exit(f"{work} would hold {total / 1e9:.3g} GB: raise --disk-limit above {limit:g} GB, {advice}")
    free = shutil.disk_usage(work).free
    if 1.02 * needed > free:
        sys.exit(f"{work} needs {1.02 * needed / 1e9:.3g} GB more of {free / 1e9:.3g} GB free: make room, {advice}")


@contextlib.contextmanager
def cleared(out: Path) -> Iterator[Path]:
    """Have a folder that is not there, and is not there afterwards."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)


def time_all(arguments: argparse.Namespace) -> int:
    """Time every provider turn by turn; return 1 if one of them failed."""
    pair, config, there = pair_at(arguments.work, arguments.size)
    ratios = ratios_of(arguments.ratios)
    require_room(arguments.work, [] if there else [pair], len(ratios) * pair.bytes, arguments.disk_limit)
    if not there:
        make_pair(pair, config)
    running = providers(pair, ratios, arguments.work, arguments.mergekit)
    if arguments.settings:
        running = [*(provider for provider in running if provider.name in (DD, CALL)), *settings(pair, ratios)]
    names = [provider.name for provider in running]
    if arguments.only:
        running = [provider for provider in running if provider.name.startswith(tuple(arguments.only.split(",")))]
    if not running:
        sys.exit(f"there is no {arguments.only}; choose from {', '.join(names)}")
    turns: dict[str, list[Measurement]] = {provider.name: [] for provider in running}
    bits: dict[str, Bits] = {}
    failed: list[str] = []
    for turn in range(arguments.rounds + 1):
        print(f"turn {turn} of {arguments.rounds}" if turn else "first turn: memory and bits", flush=True)
        for provider in running:
            if provider.name in failed:
                continue
            try:
                with cleared(arguments.work / OUT) as out:
                    measured = measure(provider, pair, out, watch=turn == 0)
                    print(f"  {provider.name}: {measured.seconds:.2f} s", flush=True)
                    if turn == 0 and provider.name in OURS:
                        bits[provider.name] = compare(pair, ratios, out)
                turns[provider.name].append(measured)
            except Failure as failure:
                failed.append(provider.name)
                print(f"  FAILED: {failure}", flush=True)
    rows = [
        row_of(provider, pair, len(ratios), turns[provider.name], bits.get(provider.name))
        for provider in running
        if provider.name not in failed
    ]
    floor = next((row.seconds for row in rows if row.provider == DD), None)
    if floor is not None:
        rows = [row._replace(against_dd=row.all_ratios / floor) for row in rows]
    where = machine(arguments.work, arguments.mergekit)
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    print_rows(rows, len(ratios))
    for name, found in bits.items():
        print(f"{name}: copies at r = 0 and r = 1; between them, {sentence(found)}")
    if arguments.write and rows:
        name = f"{arguments.size:g}B-{len(ratios)}" + ("-settings" if arguments.settings else "")
        path = write(arguments.write, name, rows, where, rounds=arguments.rounds)
        if any(row.provider != DD for row in rows) and not arguments.settings:
            draw(path.with_suffix(".png"), rows, len(ratios), where)
        print(f"rows: {path}")
    return 1 if failed else 0


def watch_memory(arguments: argparse.Namespace) -> int:
    """Show the memory of the call for a larger pair and for more ratios."""
    pairs = {size: pair_at(arguments.work, size) for size in (arguments.size, 4 * arguments.size)}
    counts = dict.fromkeys((3, arguments.ratios, 3 * arguments.ratios))
    cases = [(arguments.size, count) for count in counts] + [(4 * arguments.size, arguments.ratios)]
    require_room(
        arguments.work,
        [pair for pair, _, there in pairs.values() if not there],
        max(count * pairs[size][0].bytes for size, count in cases),
        arguments.disk_limit,
    )
    rows = []
    for size, count in cases:
        pair, config, _ = pairs[size]
        if not pair_at(arguments.work, size)[2]:
            make_pair(pair, config)
        provider = next(x for x in providers(pair, ratios_of(count), arguments.work, None) if x.name == CALL)
        try:
            with cleared(arguments.work / OUT) as out:
                measured = measure(provider, pair, out, watch=True)
        except Failure as failure:
            sys.exit(str(failure))
        rows.append(Growth(pair.parameters, count, measured.bytes, measured.seconds, *measured.memory))
        print(f"  {pair.parameters / 1e9:.3g} B, {count} ratios: {measured.seconds:.2f} s", flush=True)
    where = machine(arguments.work, None)
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    print_growth(rows)
    if arguments.write:
        print(f"rows: {write(arguments.write, f'memory-{arguments.size:g}B', rows, where)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, required=True, metavar="BILLIONS", help="parameters of a checkpoint")
    parser.add_argument("--ratios", type=int, default=11, metavar="R", help="how many, from 0 to 1")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for inputs and outputs")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns")
    parser.add_argument("--only", help="beginnings of names of providers, separated by commas")
    parser.add_argument("--mergekit", type=Path, metavar="BIN", help="folder of its programs; else PATH is searched")
    parser.add_argument("--memory", action="store_true", help="the call's memory for a larger pair and for more ratios")
    parser.add_argument("--settings", action="store_true", help="dd, the call, and the call under other settings")
    parser.add_argument("--disk-limit", type=float, default=40.0, metavar="GB", help="of inputs and outputs together")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=RESULTS, metavar="DIR", help="write rows and a plot to bench/results"
    )
    arguments = parser.parse_args()
    if not arguments.size > 0 or arguments.ratios < 2 or arguments.rounds < 1:
        parser.error("--size must be above 0, --ratios at least 2, --rounds at least 1")
    if arguments.mergekit is None and (found := shutil.which(YAML)):
        arguments.mergekit = Path(found).parent
    if arguments.mergekit:
        # Not resolved: what a virtual environment links to is outside it.
        arguments.mergekit = arguments.mergekit.absolute()
    if arguments.mergekit and not (arguments.mergekit / YAML).is_file():
        parser.error(f"there is no {YAML} in {arguments.mergekit}; leave out --mergekit, or install mergekit there")
    return arguments


def main() -> int:
    """Measure what the arguments say; return 1 if anything failed."""
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
        return 0
    arguments = parse()
    found = importlib.util.find_spec("fused_merge")
    if found is None or ROOT not in Path(found.origin).parents:
        sys.exit(f"fused_merge does not come from {ROOT}; install this checkout with pip install -e '.[cli,plots]'")
    arguments.work = arguments.work.resolve()
    if filesystem(arguments.work) in ("tmpfs", "ramfs"):
        sys.exit(f"{arguments.work} is in memory, which tells nothing about a disk; choose a --work on one")
    arguments.work.mkdir(parents=True, exist_ok=True)
    return watch_memory(arguments) if arguments.memory else time_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
