"""Projection onto the SFT delta, or out of conflict with it; twin of `fused_merge/eager/projection.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager import projection as eager

RESIDUE = tl.constexpr(eager.RESIDUE)


@triton.jit
def project(x, tau, dot, norm, rest_share, onto_share, HOW: tl.constexpr, ASCENT: tl.constexpr):
    """`eager.projection.project` with dot = <x, tau> and norm = <tau, tau> given, one for all elements or one each."""
    direction = norm > 0
    component = tl.where(direction, tl.div_rn(dot, tl.where(direction, norm, 1.0)), 0.0) * tau
    if HOW == "onto":
        return tl.where(direction, rest_share * x + onto_share * component, x)
    else:
        tl.static_assert(HOW == "conflict")
        rest = x - component
        rest = tl.where(tl.abs(rest) < (tl.abs(x) + tl.abs(component)) * RESIDUE, 0.0, rest)
        if ASCENT:
            against = dot > 0
        else:
            against = dot < 0
        return tl.where(direction & against, rest, x)
