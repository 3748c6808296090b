"""What only a GPU can tell, in one command and within nine minutes: `python bench/gpu_suite.py`.

Steps, each in a process of its own with a share of the time, so that one that fails or hangs stops no other:

    bits      the kernels against the eager code, on the GPU and on the CPU, bit for bit
    graph     a captured and replayed step against steps that are not captured
    large     every operation at 0.5 B parameters, turn by turn with torch's own AdamW
    small     optimizers at 28 M parameters in 194 tensors, where the host shows, and the same as CUDA graphs
    lines     eight points of a line at once against eight lerps
    memory    every row at odd sizes and addresses under compute-sanitizer
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
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import roofline

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
# What a step may cost, in seconds of a whole budget; what one leaves goes to those after it.
SHARES = {"bits": 95, "graph": 40, "large": 110, "small": 40, "lines": 20, "memory": 75, "tests": 140}
TINY_TESTS = ("test_names.py", "test_progress.py")


class Row(NamedTuple):
    """A check that passed or did not, or a time."""

    step: str
    name: str
    ok: bool = True
    detail: str = ""
    size: str = ""
    parameters: int = 0
    bytes_per_parameter: float | None = None
    ms: float | None = None  # median
    spread: float | None = None  # of the middle half, as a share of the median
    host_ms: float | None = None  # until the call returned
    gigabytes_per_second: float | None = None
    baseline: str = ""
    ratio: float | None = None  # to the baseline, median over rounds
    target: float | None = None
    met: bool | None = None


@dataclass
class Run:
    """What a step is told."""

    kind: str  # "cuda" or "cpu"
    tiny: bool
    deadline: float

    @property
    def gpu(self) -> bool:
        """Whether the kernels run on a GPU."""
        return self.kind == "cuda"

    def size(self, size: str) -> str:
        """Return what rows call a size."""
        return f"{size}, tiny" if self.tiny else size

    def left(self) -> float:
        """Return the seconds left, less what leaving takes."""
        return self.deadline - time.monotonic() - 5


# --- The machine -----------------------------------------------------------------------------------------------------


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


# --- Checks ----------------------------------------------------------------------------------------------------------


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
        for _ in range(3):
            for stepper in (kernel, *eager.values()):
                stepper.step()
        found = []
        for what, stepper in eager.items():
            for (part, one), (_, other) in zip(kernel.written(), stepper.written(), strict=True):
                if count := differences(one, other):
                    found.append(f"{count} of {one.numel()} {part} differ from {what}")
        moved = any(differences(x, y) for x, (_, y) in zip(start, kernel.written(), strict=True))
        yield Row("bits", name, moved and not found, "; ".join(found[:6]) or ("equal" if moved else "nothing moved"))


class Captured:
    """A step as a CUDA graph, captured after steps that warm up; without a GPU the step itself."""

    def __init__(self, step: Callable[[], Any], gpu: bool, warm_up: int = 3) -> None:
        """Warm up and capture; `step` is kept, since the graph uses what it owns."""
        import torch

        self._step = self._run = step
        if not gpu:
            for _ in range(warm_up):
                step()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self._run = graph.replay

    def __call__(self) -> None:
        """Take the step."""
        self._run()


def optimizers() -> dict[str, Callable[..., Any]]:
    """Return the optimizers that are captured, by name."""
    import fused_merge as fm

    return {
        "ondare, p = 0.01": partial(fm.OnDAREAdamW, reserve_rate=0.01),
        "onties, p = 0.01": partial(fm.OnTIESAdamW, reserve_rate=0.01),
        "onproj, tensor": fm.OnProjAdamW,
        "ondare, K = 3, clipped": partial(fm.OnDAREAdamW, reserve_rate=0.3, merge_every=3, max_grad_norm=1e-2),
    }


def model(shape: Any, device: Any) -> tuple[dict[str, Any], Any]:
    """Return named parameters with gradients and a reference delta for them."""
    import torch
    from gpu_cases import GRADIENT

    import fused_merge as fm

    torch.manual_seed(0)
    base = {f"layers.{i}.weight": 0.02 * torch.randn(size) for i, size in enumerate(shape.tensors())}
    tuned = {name: x + 1e-3 * torch.randn(x.shape) for name, x in base.items()}
    params = {name: torch.nn.Parameter(x.to(device)) for name, x in tuned.items()}
    for param in params.values():
        param.grad = GRADIENT * torch.randn_like(param)
    return params, fm.ReferenceDelta.from_models(base, tuned)


def check_graph(run: Run) -> Iterator[Row]:
    """Replay captured steps under a moving learning rate and new gradients; compare with steps not captured."""
    import torch
    from gpu_cases import FEW, TINY, differences

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
            for _ in range(3 if run.tiny else 6):
                rate.mul_(0.7)
                for param in params.values():
                    param.grad.copy_(1e-3 * torch.randn(param.shape, generator=generator))
                step()
            states = [x for state in optimizer.state.values() for x in state.values()]
            sides.append([*params.values(), *states])
        wrong = sum(differences(one.detach(), other.detach()) for one, other in zip(*sides, strict=True))
        yield Row("graph", name, not wrong, f"{wrong} elements differ" if wrong else "equal")


def touch_memory(run: Run) -> Iterator[Row]:
    """Take one step of every row, at odd sizes, on whole tensors and on unaligned shards of columns."""
    import torch
    from gpu_cases import CASES, MORE_CASES, SHARDED, Pool, Stepper

    from fused_merge import functional
    from fused_merge.functional import ShardIndex

    device = torch.device(run.kind)
    shapes = [(5, 7), (3,)] if run.tiny else [(17, 1031), (3, 1024), (1,), (2049,), ()]
    inner = [torch.Size(shape[1:]).numel() for shape in shapes]
    columns = [ShardIndex(run_length, run_length, 2 * run_length) for run_length in inner]
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
    here = [sys.executable, __file__, "--step", "touch", "--device", run.kind, *["--tiny"] * run.tiny]
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
        files = sorted(set((ROOT / "tests").glob("test_*.py")) - {ROOT / "tests" / "test_gpu_suite.py"}, key=rank)
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


# --- Times -----------------------------------------------------------------------------------------------------------


def nothing() -> None:
    """Prepare nothing."""


class Provider(NamedTuple):
    """Something that is timed, and what has to happen before each time."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


class Time(NamedTuple):
    """What one call took, in ms: on the device, and until it returned."""

    ms: float
    host_ms: float


def time_call(provider: Provider, gpu: bool, hidden_ms: float | None) -> Time:
    """Time one call.

    Args:
        provider: what to call.
        gpu: whether it runs on a GPU.
        hidden_ms: for how long the device is kept busy first, so that the host is ahead of it; None times from an idle
            device to an idle device, the host included.
    """
    if not gpu:
        provider.prepare()
        begin = time.perf_counter()
        provider.run()
        taken = 1e3 * (time.perf_counter() - begin)
        return Time(taken, taken)
    import torch

    provider.prepare()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hidden_ms is not None:
        # In cycles; no clock is above 2.5 GHz.
        torch.cuda._sleep(int(2.5e6 * hidden_ms))
    begin = time.perf_counter()
    start.record()
    provider.run()
    end.record()
    host_ms = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - begin)
    return Time(wall_ms if hidden_ms is None else start.elapsed_time(end), host_ms)


Makers = dict[str, Callable[[], Provider]]


def measure(
    run: Run, step: str, makers: Makers, refresh: Callable[[], Any], *, hide_host: bool = True
) -> Iterator[Row | dict[str, list[Time]]]:
    """Make and warm up providers, then time them turn by turn; yield rows for those that fail, and last all times."""
    providers: dict[str, Provider] = {}
    hidden: dict[str, float | None] = {}
    setup = time.monotonic() + 0.6 * run.left()
    for name, make in makers.items():
        if time.monotonic() > setup:
            yield Row(step, name, detail="skipped: no time was left to set it up")
            continue
        try:
            provider = make()
            for _ in range(1 if run.tiny else 4):
                refresh()
                warm = time_call(provider, run.gpu, None)
        except Exception as error:
            traceback.print_exc()
            yield Row(step, name, False, f"{type(error).__name__}: {error}"[:700])
            continue
        providers[name] = provider
        hidden[name] = 2 * warm.host_ms + 1 if hide_host else None
    times: dict[str, list[Time]] = {name: [] for name in providers}
    rounds, longest = 0, 0.0
    while rounds < (2 if run.tiny else 40) and run.left() > 1.5 * longest:
        began = time.monotonic()
        refresh()
        for name, provider in providers.items():
            times[name].append(time_call(provider, run.gpu, hidden[name]))
        rounds, longest = rounds + 1, max(longest, time.monotonic() - began)
    yield times


def time_rows(
    step: str, size: str, parameters: int, times: dict[str, list[Time]], ops: dict[str, roofline.Op]
) -> Iterator[Row]:
    """Yield a row for each operation and baseline."""
    for name, own in times.items():
        if not own:
            yield Row(step, name, False, "no time was left to measure it", size)
            continue
        op = ops[name]
        series = [each.ms for each in own]
        ms = statistics.median(series)
        low, _, high = statistics.quantiles(series, n=4) if len(series) > 1 else (ms, ms, ms)
        # Targets are for devices that are busy, not for hosts.
        targets = op.targets if size == "large" else dict.fromkeys(op.targets)
        for baseline, target in targets.items():
            ratio = None
            if times.get(baseline):
                ratio = statistics.median(x.ms / y.ms for x, y in zip(own, times[baseline], strict=True))
            yield Row(
                step,
                name,
                detail=f"{len(own)} rounds",
                size=size,
                parameters=parameters,
                bytes_per_parameter=op.bytes,
                ms=ms,
                spread=(high - low) / ms,
                host_ms=statistics.median(each.host_ms for each in own),
                gigabytes_per_second=op.bytes * parameters / ms / 1e6,
                baseline=baseline,
                ratio=ratio,
                target=target,
                met=roofline.meets(ratio, target),
            )


def measured_rows(
    run: Run, step: str, size: str, parameters: int, makers: Makers, refresh: Callable[[], Any], **options: bool
) -> Iterator[Row]:
    """Measure providers and yield all rows that come of it."""
    for found in measure(run, step, makers, refresh, **options):
        if isinstance(found, Row):
            yield found
        else:
            yield from time_rows(step, size, parameters, found, roofline.ops())


def fitting(shape: Any, run: Run, bytes_per_parameter: float) -> Any:
    """Return a shape, with fewer layers and words if it would not fit in the memory of the GPU."""
    import torch

    if run.gpu:
        free = 0.8 * torch.cuda.mem_get_info()[0]
        while shape.layers > 1 and bytes_per_parameter * shape.parameters > free:
            shape = shape._replace(layers=shape.layers // 2, vocabulary=shape.vocabulary // 2)
    return shape


def copy_of(elements: int, bytes_per_element: int, device: Any) -> Provider:
    """Return a plain copy that reads and writes so many bytes together."""
    import torch

    # Not zeros: some devices move them faster.
    source = torch.randint(256, (elements * bytes_per_element // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Provider(lambda: target.copy_(source))


def torch_adamw(pool: Any, **options: bool) -> Provider:
    """Return torch's AdamW on the weights, gradients and moments of a pool."""
    import torch
    from gpu_cases import LR, STEP

    params = pool.params(torch.float32)
    for param, grad in zip(params, pool.grads(torch.float32), strict=True):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **options)
    for param, exp_avg, exp_avg_sq in zip(params, *pool.moments(""), strict=True):
        step = torch.tensor(STEP, device=param.device if options.get("fused") else "cpu")
        optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return Provider(optimizer.step)


def compiled_adamw(pool: Any, gpu: bool) -> Provider:
    """Return AdamW and alpha*tau in plain PyTorch, compiled, tensor by tensor."""
    import torch
    from gpu_cases import ALPHA, BETAS, EPS, LR

    def step(param, grad, exp_avg, exp_avg_sq, tau, step_size, inv_sqrt_bias2):
        exp_avg.mul_(BETAS[0]).add_((1 - BETAS[0]) * grad)
        exp_avg_sq.mul_(BETAS[1]).add_((1 - BETAS[1]) * grad * grad)
        u = -step_size * exp_avg / (exp_avg_sq.sqrt() * inv_sqrt_bias2 + EPS)
        param.add_((1 - ALPHA) * u + ALPHA * tau.float())

    compiled = torch.compile(step, dynamic=True, backend="inductor" if gpu else "eager")
    columns = (
        pool.params(torch.float32), pool.grads(torch.float32), *pool.moments(""), pool.taus("dense", None)
    )  # fmt: skip
    flat = [[x.detach().view(-1) for x in row] for row in zip(*columns, strict=True)]
    scalars = [torch.tensor(value, device=pool.device) for value in (LR, 1.0)]

    def every() -> None:
        for row in flat:
            compiled(*row, *scalars)

    return Provider(every)


def time_large(run: Run) -> Iterator[Row]:
    """Time every operation on a model whose states no cache holds; the device alone, the host being ahead of it."""
    import torch
    from gpu_cases import CASES, LARGE, TINY, Pool, Stepper

    device = torch.device(run.kind)
    shape = TINY if run.tiny else fitting(LARGE, run, 90)
    pool = Pool(shape.tensors(), device)

    def ours(name: str) -> Provider:
        # Ranked updates keep moments of their own, of one step a round: their distribution then stays as it is.
        stepper = Stepper.of(CASES[name], pool, owner=name if "onties" in name else "")
        prepare = {
            "onties, p = 0.01, first step": stepper.lose_threshold,
            "ondare, K = 4, between merges": partial(stepper.set_steps, 1000),
            "ondare, K = 4, at a merge": partial(stepper.set_steps, 1003),
        }
        return Provider(stepper.step, prepare.get(name, nothing))

    makers: Makers = {
        roofline.FUSED: partial(torch_adamw, pool, fused=True),
        roofline.COPY: partial(copy_of, shape.parameters, 28, device),
        **{name: partial(ours, name) for name in CASES},
        "torch foreach": partial(torch_adamw, pool, foreach=True),
        roofline.COMPILED: partial(compiled_adamw, pool, run.gpu),
    }
    yield from measured_rows(run, "large", run.size("large"), shape.parameters, makers, pool.refresh)


def time_small(run: Run) -> Iterator[Row]:
    """Time optimizers where the host shows, from an idle device to an idle device, and as CUDA graphs."""
    import torch
    from gpu_cases import GRADIENT, LR, SMALL, TINY

    device = torch.device(run.kind)
    shape = TINY if run.tiny else SMALL
    params, delta = model(shape, device)

    def torch_step(**options: bool) -> Any:
        return torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.0, **options)

    def merging_step(name: str) -> Any:
        return optimizers()[name](params.items(), reference_delta=delta, lr=LR, impl="triton")

    builds: dict[str, Callable[[], Any]] = {
        roofline.FUSED: partial(torch_step, fused=True, capturable=run.gpu),
        "torch foreach": partial(torch_step, foreach=True, capturable=run.gpu),
        **{name: partial(merging_step, name) for name in ("ondare, p = 0.01", "onties, p = 0.01", "onproj, tensor")},
    }

    @cache
    def optimizer(name: str) -> Any:
        return builds[name]()

    def provider(name: str, graph: bool) -> Provider:
        step = optimizer(name).step
        return Provider(Captured(step, run.gpu) if graph else step)

    def refresh() -> None:
        for param in params.values():
            param.grad.normal_(std=GRADIENT)

    for size, graph in (("small", False), ("small, CUDA graph", True)):
        makers: Makers = {name: partial(provider, name, graph) for name in builds}
        yield from measured_rows(run, "small", run.size(size), shape.parameters, makers, refresh, hide_host=False)


def time_lines(run: Run) -> Iterator[Row]:
    """Time eight points of a line, of bf16 weights."""
    import torch
    from gpu_cases import LARGE, TINY

    from fused_merge import functional

    device = torch.device(run.kind)
    elements = (TINY if run.tiny else fitting(LARGE, run, 50)).parameters // 4 // 8 * 8
    ratios = [k / 9 for k in range(1, 9)]
    base, tuned = ([torch.randn(elements, device=device).bfloat16() for _ in range(4)] for _ in range(2))
    outs = [[torch.empty_like(x) for _ in ratios] for x in base]

    def lerps() -> None:
        for a, b, points in zip(base, tuned, outs, strict=True):
            for ratio, out in zip(ratios, points, strict=True):
                torch.lerp(a, b, ratio, out=out)

    makers: Makers = {
        roofline.LERPS: lambda: Provider(lerps),
        roofline.LINE_COPY: partial(copy_of, 4 * elements, 20, device),
        "interpolation, R = 8": lambda: Provider(
            partial(functional.interpolate, base, tuned, ratios, outs, impl="triton")
        ),
    }
    yield from measured_rows(run, "lines", run.size("large"), 4 * elements, makers, nothing)


# --- The suite -------------------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "bits": check_bits,
    "graph": check_graph,
    "large": time_large,
    "small": time_small,
    "lines": time_lines,
    "memory": check_memory,
    "tests": run_tests,
    "touch": touch_memory,
}


def run_step(arguments: argparse.Namespace) -> int:
    """Take one step in this process, writing each row as soon as it is there; return the exit code."""
    run = Run(arguments.device, arguments.tiny, time.monotonic() + arguments.budget)
    ok = True
    with open(arguments.rows or os.devnull, "a") as file:
        for row in STEPS[arguments.step](run):
            file.write(json.dumps(row._asdict()) + "\n")
            file.flush()
            print(sentence(row), flush=True)
            ok = ok and row.ok
    return 0 if ok else 1


def sentence(row: Row) -> str:
    """Return a row as a line of a log."""
    if row.ms is None:
        return f"  {row.name}: {'' if row.ok else 'FAILED: '}{row.detail}"
    ratio = "" if row.ratio is None else f", {row.ratio:.2f} of {row.baseline}"
    return f"  {row.name} ({row.size}): {row.ms:.3f} ms, {row.gigabytes_per_second:.0f} GB/s{ratio}"


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


def print_table(rows: Sequence[Row], machine: dict[str, str]) -> None:
    """Print what was checked and what was measured."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    if machine["gpu"] == "cpu":
        print("Triton's interpreter: the times below mean nothing.")
    for row in rows:
        if row.ms is None and (row.name == "step" or not row.ok or row.step in ("tests", "memory")):
            print(f"{row.step:8} {row.name}: {'' if row.ok else 'FAILED: '}{row.detail}")
    header = ("operation", "size", "ms", "spread", "host ms", "GB/s", "against", "ratio", "target", "met")
    lines = [header] + [
        (
            row.name,
            row.size,
            roofline.number(row.ms, 3),
            roofline.number(row.spread, 3),
            roofline.number(row.host_ms, 2),
            roofline.number(row.gigabytes_per_second, 0),
            row.baseline,
            roofline.number(row.ratio, 2),
            roofline.number(row.target, 2),
            roofline.word(row.met),
        )
        for row in rows
        if row.ms is not None
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write(rows: Iterable[Row], machine: dict[str, str], folder: Path) -> Path:
    """Write all rows, each with the machine, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9.]+", "_", machine["gpu"])
    path = folder / f"{name}-{machine['commit']}.json"
    path.write_text(json.dumps([machine | row._asdict() for row in rows], indent=1) + "\n")
    return path


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
