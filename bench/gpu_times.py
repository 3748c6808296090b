"""The measurements of `bench/gpu_suite.py`: providers timed turn by turn, each against its baseline."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import roofline
from gpu_rows import Row, Run


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
    while rounds < (1 if run.tiny else 40) and run.left() > 1.5 * longest:
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
    from gpu_cases import GRADIENT, LR, SMALL, TINY, Captured, model, optimizers

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
