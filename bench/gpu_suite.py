"""What only a GPU can tell, in one command and within nine minutes: `python bench/gpu_suite.py`.

Steps, each in a process of its own with a share of the time, so that one that fails or hangs stops no other:

    bits      the kernels against the eager code, on the GPU and on the CPU, bit for bit
    graph     a captured and replayed step against steps that are not captured
    large     every operation at 0.5 B parameters, turn by turn with torch's own AdamW
    small     optimizers at 28 M parameters in 194 tensors, where the host shows, and the same as CUDA graphs
    lines     eight points of a line at once against eight lerps
    files     eleven points of a pair of files, through the GPU and on the CPU, byte for byte
    memory    every method at odd sizes and addresses under compute-sanitizer
    tests     the test suite, what touches kernels first

Rows go to `bench/results/gpu/<gpu>-<commit>.json`, with the machine in each. It needs no network: if fused_merge is not
installed, the checkout is, with `pip install --no-build-isolation --no-deps -e .`. Python 3.11 or later.

`--device cpu` runs all of it without a GPU, tiny and in Triton's interpreter: that tests this file, and its times mean
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import roofline
from gpu_checks import check_bits, check_files, check_graph, check_memory, run_tests, touch_memory
from gpu_rows import Row, Run, print_table, sentence, write
from gpu_times import time_large, time_lines, time_small

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
# What a step may cost, in seconds of a whole budget; what one leaves goes to those after it.
SHARES = {"bits": 95, "graph": 40, "large": 110, "small": 40, "lines": 20, "files": 25, "memory": 75, "tests": 140}


def first_line(*command: str) -> str:
    """Return the first line that a command prints, or "unknown"."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return lines[0].strip() if lines else "unknown"


def environment(kind: str, commit: str | None) -> dict[str, str]:
    """Return the machine and the versions that every row names."""
    import torch
    import triton

    driver = "none"
    if kind == "cuda" and torch.version.hip:
        driver = f"ROCm {torch.version.hip}"
    elif kind == "cuda":
        driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or first_line("git", "describe", "--always", "--dirty", "--exclude", "*"),
    }


def ensure_installed() -> None:
    """Install the checkout where fused_merge is not, and refuse another one."""
    if importlib.util.find_spec("fused_merge") is None:
        print("fused_merge is not installed; installing this checkout", flush=True)
        install = ["install", "--quiet", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e"]
        subprocess.run([sys.executable, "-m", "pip", *install, ROOT], check=True)
    found = subprocess.check_output(
        [sys.executable, "-P", "-c", "import fused_merge; print(fused_merge.__file__)"], text=True
    )
    if ROOT not in Path(found.strip()).parents:
        sys.exit(f"fused_merge comes from {found.strip()} and not from {ROOT}; install this checkout with pip -e")


STEPS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "bits": check_bits,
    "graph": check_graph,
    "large": time_large,
    "small": time_small,
    "lines": time_lines,
    "files": check_files,
    "memory": check_memory,
    "tests": run_tests,
    "touch": touch_memory,
}


def run_step(arguments: argparse.Namespace) -> int:
    """Take one step in this process, writing each row as soon as it is there; return the exit code."""
    run = Run(arguments.device, arguments.tiny, time.monotonic() + arguments.budget)
    if not run.gpu:
        sys.path.append(str(ROOT / "tests" / "helpers"))
        from interpreter import patch_once

        patch_once()
    ok = True
    with open(arguments.rows or os.devnull, "a") as file:
        for row in STEPS[arguments.step](run):
            file.write(json.dumps(row._asdict()) + "\n")
            file.flush()
            print(sentence(row), flush=True)
            ok = ok and row.ok
    return 0 if ok else 1


def in_process(name: str, limit: float, arguments: argparse.Namespace) -> list[Row]:
    """Take a step in a process of its own; return its rows and one that says how it ended."""
    print(f"{name}: at most {limit:.0f} s", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        command = [sys.executable, __file__, "--step", name, "--rows", file, "--device", arguments.device]
        command += ["--budget", f"{limit:.0f}", *["--tiny"] * arguments.tiny]
        # In a session of its own, which ends as a whole.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(limit)
            ending = "done" if process.returncode == 0 else f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = "stopped at its time limit"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    end = Row(name, "step", process.returncode == 0, f"{ending} after {time.monotonic() - began:.0f} s")
    print(sentence(end), flush=True)
    return [*rows, end]


def parse() -> argparse.Namespace:
    """Return the arguments, with a device chosen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--only", default=",".join(SHARES), help="steps, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few rounds, as always on a CPU")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", type=Path, help="folder of the rows; on a CPU nothing is written without it")
    parser.add_argument("--commit", help="what rows name as the commit, where git cannot tell")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - SHARES.keys():
        parser.error(f"there is no step {', '.join(sorted(unknown))}; choose from {', '.join(SHARES)}")
    if arguments.device == "auto":
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cpu":
        # Triton reads it once, when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
        arguments.tiny = True
    return arguments


def main() -> int:
    """Take all steps, write the rows, print the table; return 1 if anything failed."""
    arguments = parse()
    if arguments.step:
        return run_step(arguments)
    deadline = time.monotonic() + arguments.budget
    ensure_installed()
    machine = environment(arguments.device, arguments.commit)
    names = [name for name in SHARES if name in arguments.only.split(",")]
    rows: list[Row] = []
    for i, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[i:])
        rows += in_process(name, share * (deadline - time.monotonic()), arguments)
    folder = arguments.out or (roofline.RESULTS if arguments.device == "cuda" else None)
    if folder:
        print(f"\nrows: {write(rows, machine, folder)}")
    print_table(rows, machine)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
