"""Which code runs an operation: the Triton kernels or the eager equations."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

IMPLS = ("auto", "triton", "eager")

logger = logging.getLogger("fused_merge")


def why_not_triton(device: torch.device) -> str | None:
    """Return in one sentence why the kernels cannot run on `device`, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install a torch build that brings it, or use impl='eager'"
    from fused_merge.kernels import why_unusable

    reason: str | None = why_unusable(device)
    return reason


def check_impl(impl: str) -> str:
    """Return the implementation asked for, after `FUSED_MERGE_IMPL` had its say.

    Raises:
        ValueError: if it is not one of `IMPLS`.
    """
    override = os.environ.get("FUSED_MERGE_IMPL")
    asked, source = (override, "FUSED_MERGE_IMPL") if override else (impl, "impl")
    if asked not in IMPLS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLS))}, got {asked!r}")
    return asked


def resolve(impl: str, device: torch.device) -> str:
    """Return `"triton"` or `"eager"` for tensors on `device`.

    `"auto"` is Triton on a GPU that it can drive, and eager everywhere else; the interpreter, which is there
    to verify and not to be fast, runs only when asked for by name. The environment variable
    `FUSED_MERGE_IMPL` overrides `impl`.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if `"triton"` was asked for and cannot run; the sentence says why.
    """
    asked = check_impl(impl)
    if asked == "eager" or (asked == "auto" and device.type == "cpu"):
        return "eager"
    reason = why_not_triton(device)
    if reason is None:
        return "triton"
    if asked == "triton":
        raise RuntimeError(f"impl='triton' cannot run on {device}: {reason}")
    logger.warning("fused_merge runs eager code on %s: %s", device, reason)
    return "eager"
