"""From the fp32 result of a step to what is stored: nearest, stochastic, or with a master copy.

Sources: stochastic rounding of weights: Gupta et al. 2015 (arXiv 1502.02551); the exact error of a sum: Knuth, The Art
of Computer Programming, vol. 2, section 4.2.2, theorem B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_ROUNDING, MaskKey, random_words

_PATTERN = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return s = a + b rounded, and the exact error a + b - s."""
    s = a + b
    shadow = s - a
    return s, (a - (s - shadow)) + (b - shadow)


def stochastic(x: Tensor, error: Tensor, dtype: torch.dtype, key: MaskKey) -> Tensor:
    """Round x + error to `dtype`, up or down with the probability of its distance from either neighbor.

    The random number is the low 16 bits of the element's own Philox word in the domain of rounding.

    - bf16: added to the low half of the pattern of `x`, which is then cut off; `error` lies below those bits.
    - fp16: the nearest fp16 number moves to its neighbor on the side of x iff the random number is below 65536
      times the distance to x over the distance to that neighbor.
    - fp32 and fp64, where `dtype` is that of `x`: the same with `error`, what the sum x itself has lost.

    Args:
        x: fp32 or fp64.
        error: what is missing in x, of the same shape and dtype.
        dtype: of the result; NaN and infinities are rounded to nearest.
        key: of the tensor at this step.
    """
    random = random_words(x.numel(), key._replace(domain=DOMAIN_ROUNDING), device=x.device).view(x.shape) & 0xFFFF
    if dtype == torch.bfloat16:
        rounded = ((x.view(torch.int32) + random.int()) >> 16).to(torch.int16).view(torch.bfloat16)
        return torch.where(x.isfinite(), rounded, x.to(dtype))
    nearest = x.to(dtype)
    if dtype != x.dtype:
        error = x - nearest.to(x.dtype)
    pattern = nearest.view(_PATTERN[dtype])
    # One pattern up is one step away from zero; from zero itself the step has the sign of the error.
    away = ((error > 0) == (nearest > 0)).to(pattern.dtype)
    smallest = torch.ones_like(pattern).view(dtype).copysign(error.to(dtype))
    neighbor = torch.where(nearest == 0, smallest, (pattern + 2 * away - 1).view(dtype))
    gap = (neighbor.to(x.dtype) - nearest.to(x.dtype)).abs()
    moves = (random < 65536 * (error / gap).abs()) & (error != 0) & x.isfinite()
    return torch.where(moves, neighbor, nearest)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an fp32 tensor as a bf16 weight and the int16 that restores it.

    high = (bits + 0x8000) >> 16 is the pattern of the weight, low = bits - (high << 16). NaN becomes the quiet NaN.
    """
    bits = torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 tensor that `split` took apart, exactly.

    A weight that was changed from outside since stays within half a unit of its last place.
    """
    whole = ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
    # Below the patterns of zero, and above those of infinity, lie the NaNs: such a low half is of an earlier weight.
    return torch.where(whole.isnan(), weight.float(), whole)
