"""Which code runs an operation: the Triton kernels, compiled code for the CPU, or the eager equations."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "compiled", "eager")

# Parameters from which on "auto" on a CPU is compiled. The first step of a process takes 0.7 s more, for numba to be
# imported and code to be read from its cache, and some seconds on a machine that has compiled nothing yet. What each
# step gains pays for the 0.7 s after so many; in ms, eager and compiled (two cores, tensors of 10^4, bench_auto.py):
#
#     parameters                    10^4                10^5               10^6
#     ondare, p = 1             0.5  0.3  3000      2.7  0.6  330       28  2.1  27
#     ondare, p = 0.01          2.2  0.6   460     13.7  1.0   55       99  2.4   7
#     onties, p = 0.01          1.6  0.9  1100      6.9  1.3  130       59  2.8  12
#     onproj                    1.0  0.4  1200      6.7  1.0  120       59  2.7  12
COMPILE_FROM = 1_000_000
# As how many parameters a tensor counts besides its own: eager code takes 0.8 ms for each, however small.
PER_TENSOR = 20_000

logger = logging.getLogger("fused_merge")


def why_not_triton(device: torch.device) -> str | None:
    """Return in one sentence why the kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install a torch build that brings it, or use impl='eager'"
    from fused_merge.kernels import why_unusable

    reason: str | None = why_unusable(device)
    return reason


def why_not_compiled(device: torch.device) -> str | None:
    """Return in one sentence why compiled code cannot run on `device`, or None where it can; this imports numba."""
    if device.type != "cpu":
        return "it is for the CPU; use impl='triton' or 'eager'"
    try:
        import numba  # noqa: F401
    except ImportError as error:
        # numba refuses versions of numpy that it does not know.
        problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        return f"numba {problem}; install fused_merge[cpu], or use impl='eager'"
    return None


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that can compute here, or raise ValueError."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from error
    if where.type not in ("cpu", "cuda") or (where.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {str(device)!r} cannot compute here; use 'cpu'")
    return where


def check_impl(impl: str) -> str:
    """Return the implementation asked for, after `FUSED_MERGE_IMPL` had its say; ValueError if there is none such."""
    override = os.environ.get("FUSED_MERGE_IMPL")
    asked, source = (override, "FUSED_MERGE_IMPL") if override else (impl, "impl")
    if asked not in IMPLS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLS))}, got {asked!r}")
    return asked


def resolve(impl: str, device: torch.device, numel: int = 0) -> str:
    """Return `"triton"`, `"compiled"` or `"eager"` for tensors of `numel` elements in all on `device`.

    `"auto"` is Triton on a GPU that it can drive; on a CPU compiled from a million elements, or 50 tensors, on, where
    numba is installed; elsewhere eager. The interpreter, which is there to verify and not to be fast, runs only when
    asked for by name. RuntimeError says why what was asked for by name cannot run.
    """
    asked = check_impl(impl)
    chosen = asked
    if asked == "auto":
        on_cpu = "compiled" if numel >= COMPILE_FROM else "eager"
        chosen = on_cpu if device.type == "cpu" else "triton"
    if chosen == "eager":
        return chosen
    reason = why_not_triton(device) if chosen == "triton" else why_not_compiled(device)
    if reason is None:
        return chosen
    if asked == chosen:
        raise RuntimeError(f"impl={chosen!r} cannot run on {device}: {reason}")
    _warn_once(f"fused_merge runs eager code on {device}: {reason}")
    return "eager"


def work(numels: Collection[int]) -> int:
    """Return how much "auto" takes it for to work on tensors of so many elements each."""
    return sum(numels) + PER_TENSOR * len(numels)


class Share(NamedTuple):
    """Tensors that one backend serves on one device."""

    backend: str
    device: torch.device
    members: list[int]  # their indices


def choose(impl: str, tensors: Sequence[Tensor], numels: Sequence[int] | None = None) -> dict[torch.device, str]:
    """Return the backend for each device of the tensors.

    Backends differ in how many collectives they take, so all processes that share tensors must choose the same one.

    Args:
        impl: one of `IMPLS`.
        tensors: those that this process holds.
        numels: elements of the unsharded tensors, by which "auto" decides what is worth compiling; None for what will
            not run often enough.
    """
    totals = Counter[torch.device]()
    for tensor, numel in zip(tensors, numels or [0] * len(tensors), strict=True):
        totals[tensor.device] += work([numel]) if numels else 0
    return {device: resolve(impl, device, total) for device, total in totals.items()}


def group(
    impl: str,
    chosen: Mapping[torch.device, str],
    tensors: Sequence[Tensor],
    names: Sequence[str],
    reasons: Sequence[str | None],
) -> list[Share]:
    """Decide what runs which tensors, before anything is changed.

    Args:
        impl, tensors: as for `choose`, which returned `chosen`.
        names: tensor names, used in error messages.
        reasons: why what was chosen cannot take each tensor, or None; a RuntimeError if `impl` names it.
    """
    explicit = check_impl(impl) in ("triton", "compiled")
    shares: dict[tuple[str, torch.device], Share] = {}
    for index, (tensor, name, reason) in enumerate(zip(tensors, names, reasons, strict=True)):
        runs = chosen[tensor.device]
        if runs != "eager" and reason:
            if explicit:
                raise RuntimeError(f"impl={runs!r} cannot serve {name}: {reason}; use impl='auto'")
            runs = "eager"
        shares.setdefault((runs, tensor.device), Share(runs, tensor.device, [])).members.append(index)
    return list(shares.values())


@cache
def _warn_once(sentence: str) -> None:
    logger.warning(sentence)
