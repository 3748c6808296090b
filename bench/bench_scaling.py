"""Whether time per parameter or memory grow with the size, on a CPU: a part of `make bench`.

    python bench/bench_scaling.py --out out/scaling.json

One fp32 tensor of 1 M to 300 M elements, in a process of its own for each size and optimizer. The time is that of a
step, turn by turn with torch's fused AdamW on the same weights. The memory is the highest resident memory of some
steps, less that of the process after a step of 1 M, less weights, gradients, moments and tau. Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

from paired import Row, Turns, row_of
from step_cases import CONTENDERS, FUSED, RATE, Tensors
from tables import SCALING

from fused_merge.eager.sparse import packed_nbytes

MILLIONS = (1, 4, 16, 64, 288)
PROVIDERS = ("ondare, p = 0.01", "onties, p = 0.01")
SECONDS = 2.0
STEPS = 3
# As few elements as compiled code serves.
SMALL = (1024, 1024)


def status() -> dict[str, int]:
    """Return the memory of this process, in bytes, by the names of /proc."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[-1] == "kB"}


def held(memory: dict[str, int], which: str) -> int:
    """Return memory that belongs to no file: libraries come and go as they are used."""
    return memory[which] - memory["RssFile"]


def settle() -> None:
    """Give back what is free, and let the highest resident memory count from now on."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(provider: str, elements: int) -> Row:
    """Return the row of one optimizer at one size; in a process that has done nothing else."""
    contender = CONTENDERS[provider]
    # What is compiled, loaded or started on first use is no matter of size.
    small = Tensors([SMALL])
    contender.make(small)()
    small.fused()
    settle()
    idle = held(status(), "VmRSS") - bytes_of(small, provider, optimizers=2)
    tensors = Tensors([(elements // 1024, 1024)])
    step = contender.make(tensors)
    for _ in range(2):
        step()
    settle()
    for _ in range(STEPS):
        tensors.refresh()
        step()
    after = status()
    both = bytes_of(small, provider, optimizers=2) + bytes_of(tensors, provider, optimizers=1)
    above = held(after, "VmHWM") - idle - both
    turns = Turns(step, tensors.fused, tensors.refresh)
    for _ in range(turns.that_fit(SECONDS)):
        turns.before()
        turns.run()
        turns.after()
    return row_of(
        turns,
        provider=provider,
        case=SCALING,
        dtype="float32",
        parameters=tensors.numel,
        bytes_per_parameter=contender.bytes,
        baseline=FUSED,
        memory=above / 1e6,
    )


def bytes_of(tensors: Tensors, provider: str, optimizers: int) -> int:
    """Return what the tensors of a list take when so many optimizers, the first of them ours, step it."""
    moments = 2 * 4 * tensors.numel
    total = 2 * 4 * tensors.numel + moments + optimizers * moments
    if provider != FUSED:
        total += tensors.delta.nbytes + packed_nbytes(tensors.numel, int(RATE * tensors.numel), 2)
    return total


def main() -> None:
    """Measure every optimizer at every size, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="where rows go, as JSON")
    parser.add_argument("--millions", type=int, nargs="+", default=MILLIONS, metavar="N", help="of 2**20 elements")
    parser.add_argument("--child", nargs=2, metavar=("PROVIDER", "ELEMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        provider, elements = arguments.child
        print(json.dumps(measure(provider, int(elements))._asdict()))
        return
    rows = []
    for millions in arguments.millions:
        for provider in PROVIDERS:
            command = [sys.executable, __file__, "--child", provider, str(millions * 2**20)]
            row = Row(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
            print(
                f"{provider}, {row.parameters / 1e6:.3g} M: {1e6 * row.ms / row.parameters:.2f} ns per parameter, "
                f"{row.ratio:.2f} of {row.baseline}, {row.memory:.0f} MB above the tensors",
                flush=True,
            )
            rows.append(row._asdict())
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
