"""Which code runs an operation: the Triton kernels or the eager equations."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "compiled", "eager")

# Elements from which on a CPU the compiled step pays for its compilation.
COMPILE_FROM = 50_000_000

logger = logging.getLogger("fused_merge")


def why_not_triton(device: torch.device) -> str | None:
    """Return in one sentence why the kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install a torch build that brings it, or use impl='eager'"
    from fused_merge.kernels import why_unusable

    reason: str | None = why_unusable(device)
    return reason


def why_not_compiled(device: torch.device) -> str | None:
    """Return in one sentence why the compiled step cannot run on `device`, or None where it can."""
    if device.type != "cpu":
        return "it is for the CPU, where compilers keep IEEE arithmetic; use impl='triton' or 'eager'"
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name):
        return "torch.compile needs a C++ compiler and finds none; install one, or use impl='eager'"
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

    `"auto"` is Triton on a GPU that it can drive; on a CPU eager below 50 M elements and compiled above, where there
    is a C++ compiler; elsewhere eager. The interpreter, which is there to verify and not to be fast, runs only when
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


class Share(NamedTuple):
    """Tensors that one backend serves on one device."""

    backend: str
    device: torch.device
    members: list[int]  # their indices


def choose(impl: str, tensors: Sequence[Tensor], *, worth_compiling: bool = False) -> dict[torch.device, str]:
    """Return the backend for each device of the tensors; "auto" may only compile what will run often enough."""
    numels = Counter[torch.device]()
    for tensor in tensors:
        numels[tensor.device] += tensor.numel()
    return {device: resolve(impl, device, numel if worth_compiling else 0) for device, numel in numels.items()}


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
