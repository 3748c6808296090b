"""F on loaded values, as in `fused_merge/eager/sparsify.py`; a new F is a function and a line of `step.sparsified`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_merge.eager.sparsify import NAN_PATTERN

NAN = tl.constexpr(NAN_PATTERN[torch.float32])


@triton.jit
def pattern(x):
    """Magnitudes as integers: finite values in their order, every NaN one above infinity."""
    return tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN)


@triton.jit
def random(x, bits, threshold):
    """`eager.sparsify.random`: keep what its random bits say."""
    return tl.where(bits < threshold, x, 0.0)


@triton.jit
def magnitude(x, kth):
    """`eager.sparsify.magnitude`: keep what is at least the k-th largest |x|, given as a pattern."""
    return tl.where(pattern(x) >= kth, x, 0.0)


@triton.jit
def soft_threshold(x, kth):
    """`eager.sparsify.soft_threshold`: shrink every |x| by the k-th largest, given as a pattern."""
    threshold = kth.to(tl.float32, bitcast=True)
    shrunk = tl.where(tl.abs(x) > threshold, x - tl.where(x < 0, -threshold, threshold), 0.0)
    return tl.where(x == x, shrunk, x)
