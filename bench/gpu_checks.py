"""The checks of `bench/gpu_suite.py`: bits, captured steps, memory accesses, and the test suite."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_rows import Row, Run

ROOT = Path(__file__).resolve().parents[1]
TINY_TESTS = ("test_names.py", "test_progress.py")


def check_bits(run: Run) -> Iterator[Row]:
    """Step on the GPU by kernels and by eager code, and on the CPU by eager code, from one start."""
    import torch
    from gpu_cases import CASES, MORE_CASES, Pool, Stepper, differences

    device, cpu = torch.device(run.kind), torch.device("cpu")
    shapes = [(20, 33), (5,), ()] if run.tiny else [(2048, 1536), (1031, 1030), (777,), ()]
    for name, case in (CASES | MORE_CASES).items():
        if run.left() < 0:
            yield Row("bits", name, detail="skipped: no time was left")
            continue
        torch.manual_seed(0)
        kernel = Stepper.of(case, Pool(shapes, device, shifted="rows" in name))
        eager = {"eager on the CPU": kernel.copy(cpu, "eager")}
        if run.gpu:
            eager["eager on the GPU"] = kernel.copy(device, "eager")
        start = [x.clone() for _, x in kernel.written()]
        for _ in range(2 if run.tiny else 3):
            for stepper in (kernel, *eager.values()):
                stepper.step()
        found = []
        for what, stepper in eager.items():
            for (part, one), (_, other) in zip(kernel.written(), stepper.written(), strict=True):
                if count := differences(one, other):
                    found.append(f"{count} of {one.numel()} {part} differ from {what}")
        moved = any(differences(x, y) for x, (_, y) in zip(start, kernel.written(), strict=True))
        yield Row("bits", name, moved and not found, "; ".join(found[:6]) or ("equal" if moved else "nothing moved"))


def check_graph(run: Run) -> Iterator[Row]:
    """Replay captured steps under a moving learning rate and new gradients; compare with steps not captured."""
    import torch
    from gpu_cases import FEW, TINY, Captured, differences, model, optimizers

    device = torch.device(run.kind)
    shape = TINY if run.tiny else FEW
    for name, build in optimizers().items():
        if run.left() < 0:
            yield Row("graph", name, detail="skipped: no time was left")
            continue
        sides = []
        for graph in (True, False):
            params, delta = model(shape, device)
            rate = torch.tensor(1e-4, device=device)
            optimizer = build(params.items(), reference_delta=delta, lr=rate, alpha=1e-3, impl="triton")
            step = Captured(optimizer.step, run.gpu and graph)
            generator = torch.Generator().manual_seed(1)
            for _ in range(2 if run.tiny else 6):
                rate.mul_(0.7)
                for param in params.values():
                    param.grad.copy_(1e-3 * torch.randn(param.shape, generator=generator))
                step()
            states = [x for state in optimizer.state.values() for x in state.values()]
            sides.append([*params.values(), *states])
        wrong = sum(differences(one.detach(), other.detach()) for one, other in zip(*sides, strict=True))
        yield Row("graph", name, not wrong, f"{wrong} elements differ" if wrong else "equal")


def check_files(run: Run) -> Iterator[Row]:
    """Interpolate a pair of files through the GPU and on the CPU, and compare every byte."""
    import torch

    from fused_merge.checkpoints.interpolate import plan_interpolation
    from fused_merge.io.writer import SafetensorsWriter

    shapes = {"w": (50, 33), "b": (7,)} if run.tiny else {"w": (2**14, 2**13), "v": (2**13, 2**13 + 1), "b": (7,)}
    ratios = [k / 10 for k in range(11)]
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        ends = Path(folder, "base.safetensors"), Path(folder, "tuned.safetensors")
        torch.manual_seed(0)
        for end in ends:
            with SafetensorsWriter(end, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}) as writer:
                for name, shape in shapes.items():
                    writer.write(name, torch.randn(shape).bfloat16())
        seconds, made = {}, {}
        for device, impl in (("cpu", "eager"), (run.kind, "triton")):
            job = plan_interpolation(*ends, ratios, Path(folder, impl))
            begun = time.perf_counter()
            made[impl] = job.run(device=device, impl=impl, progress=False)
            seconds[impl] = time.perf_counter() - begun
        wrong = [
            one.name
            for one, other in zip(made["eager"], made["triton"], strict=True)
            if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
        ]
        rates = ", ".join(f"{impl} {job.bytes_written / taken / 1e9:.2f} GB/s" for impl, taken in seconds.items())
        yield Row(
            "files", "11 ratios of a pair", not wrong, f"{', '.join(wrong)} differ" if wrong else f"equal; {rates}"
        )


def touch_memory(run: Run) -> Iterator[Row]:
    """Take one step of every method, at odd sizes, on whole tensors and on unaligned shards of columns."""
    import torch
    from gpu_cases import CASES, MORE_CASES, SHARDED, Pool, Stepper

    from fused_merge import functional
    from fused_merge.functional import Shard, ShardIndex

    device = torch.device(run.kind)
    shapes = [(5, 7), (3,)] if run.tiny else [(17, 1031), (3, 1024), (1,), (2049,), ()]
    inner = [torch.Size(shape[1:]).numel() for shape in shapes]
    # Nobody holds the rest: thresholds and sums are those of what is here.
    columns = [
        Shard(ShardIndex(run_length, run_length, 2 * run_length), shape)
        for run_length, shape in zip(inner, shapes, strict=True)
    ]
    cases = CASES | MORE_CASES
    layouts = [(name, False) for name in cases] + [(name, True) for name in SHARDED]
    for name, sharded in layouts:
        stepper = Stepper.of(cases[name], Pool(shapes, device, shifted=sharded), shards=columns if sharded else None)
        stepper.set_steps(3.0)
        stepper.step()
        finite = all(bool(torch.isfinite(x).all()) for x in stepper.params)
        yield Row("touch", f"{name}{', unaligned shards' if sharded else ''}", finite, "stepped")
    for shifted in (False, True):
        pool = Pool(shapes, device, shifted=shifted)
        base, tuned = pool.params(torch.bfloat16), pool.grads(torch.bfloat16)
        outs = [[pool.place(torch.zeros_like(x)) for _ in range(3)] for x in base]
        functional.interpolate(base, tuned, [0.0, 0.3, 0.7], outs, impl="triton")
        finite = all(bool(torch.isfinite(x).all()) for row in outs for x in row)
        yield Row("touch", "interpolation", finite, "written")


def check_memory(run: Run) -> Iterator[Row]:
    """Run `touch_memory` as it is, and under the tools of compute-sanitizer."""
    here = [
        sys.executable,
        Path(__file__).with_name("gpu_suite.py"),
        "--step",
        "touch",
        "--device",
        run.kind,
        *["--tiny"] * run.tiny,
    ]
    # Each tensor is an allocation of its own: what lies beside it is nobody's.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    tools: dict[str, list[str]] = {"without a tool": []}
    if sanitizer and run.gpu:
        options = ["--target-processes", "all", "--report-api-errors", "no", "--error-exitcode", "9"]
        tools |= {tool: [sanitizer, "--tool", tool, *options] for tool in ("memcheck", "racecheck")}
    else:
        yield Row("memory", "compute-sanitizer", detail="skipped: it is not here, or nothing runs on a GPU")
    for tool, prefix in tools.items():
        began = time.monotonic()
        code, output = run_for(run.left(), [*prefix, *here], alone)
        taken = f"{time.monotonic() - began:.0f} s"
        if code is None:
            yield Row("memory", tool, detail=f"skipped: not done after {taken}")
            continue
        summary = re.findall(r"=+ *((?:ERROR|RACECHECK) SUMMARY.*|Invalid .*|Error: .*)", output)
        detail = "; ".join(summary[:4]) or ("no errors" if code == 0 else output[-500:].strip())
        yield Row("memory", tool, code == 0, f"{detail}, {taken}")


def run_for(seconds: float, command: Sequence[Any], environment: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; return its exit code, or None if it was not done in time, and all that it printed."""
    # Not a pipe: what a stopped command leaves running would keep it open.
    with tempfile.TemporaryFile("w+") as file:
        try:
            options = {"env": environment, "cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, timeout=max(seconds, 1), **options).returncode
        except subprocess.TimeoutExpired:
            code = None
        file.seek(0)
        return code, file.read()


def run_tests(run: Run) -> Iterator[Row]:
    """Run the test suite on the device; what touches kernels first."""
    missing = [name for name in ("pytest", "pytest_timeout", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        yield Row("tests", "pytest", detail=f"skipped: {', '.join(missing)} is not installed")
        return

    def rank(path: Path) -> tuple[bool, str]:
        text = path.read_text()
        return not ("triton" in text and "device" in text.lower()), path.name

    files = [ROOT / "tests" / name for name in TINY_TESTS]
    if not run.tiny:
        # Not the test of this file, which would run all of this again.
        own = ROOT / "tests" / "bench" / "test_gpu_suite.py"
        files = sorted(set((ROOT / "tests").rglob("test_*.py")) - {own}, key=rank)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        limit = max(run.left() - 20, 5)
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--session-timeout={limit:.0f}"]
        if importlib.util.find_spec("xdist") and not run.tiny:
            options += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
        # Safe from names in the working folder: it holds one called `kernels`.
        command = [sys.executable, "-P", "-m", "pytest", *options, *map(str, files)]
        _, output = run_for(run.left(), command, dict(os.environ))
        yield from read_report(report, output)


def read_report(report: Path, output: str) -> Iterator[Row]:
    """Return what a JUnit report holds: the counts, and the first failures with the ends of their texts."""
    if not report.exists():
        yield Row("tests", "pytest", False, output[-2000:])
        return
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(case, bad) for case in cases for bad in case if bad.tag in ("failure", "error")]
    skipped = sum(case.find("skipped") is not None for case in cases)
    stopped = ", stopped by the time limit" if "session-timeout" in output else ""
    passed = len(cases) - len({id(case) for case, _ in failed}) - skipped
    counts = f"{passed} passed, {len(failed)} failed, {skipped} skipped{stopped}"
    yield Row("tests", "pytest", passed > 0 and not failed, counts)
    for case, bad in failed[:8]:
        text = (bad.text or bad.get("message") or "").strip()
        yield Row("tests", f"{case.get('classname')}::{case.get('name')}", False, text[-700:])
