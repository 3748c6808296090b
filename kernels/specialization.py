"""Which compiled form of the step serves a tensor, or why none does."""

from __future__ import annotations

from math import prod

import torch

from fused_merge.eager.operands import Operands
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import RANKED
from fused_merge.kernels import layout
from fused_merge.kernels.layout import Specialization
from fused_merge.kernels.projection import ROW_BLOCKS
from fused_merge.methods import MergeRule

# From this share of kept elements on, groups of neighbors that hold none are too rare to skip.
SKIPS_UP_TO = 0.1
MASTER = {torch.float32: "fp32", torch.int16: "split"}


def why_unsupported(o: Operands, rule: MergeRule) -> str | None:
    """Return in a few words why the kernels cannot step this tensor, or None."""
    floats = {
        "weights": o.param,
        "gradients": o.grad,
        "first moments": o.exp_avg,
        "second moments": o.exp_avg_sq,
        "reference deltas": o.tau,
        "dense reference deltas": o.tau_dense,
        "anchors": o.anchor and o.anchor.weights,
    }
    for what, tensor in floats.items():
        if tensor is not None and tensor.dtype not in layout.TL_DTYPE:
            return f"{tensor.dtype} {what} have no kernel"
    if o.tau is not None and rule.update not in ("none", "random", *RANKED):
        return f"F {rule.update!r} of the update has no kernel"
    if isinstance(o.tau, SparseTensor) and o.tau.offsets.dtype != torch.int32:
        return "a sparse delta with 2^31 kept values has no kernel"
    if projects_rows(o, rule) and prod(o.shard.shape[1:]) > layout.DEFAULT_BLOCK * ROW_BLOCKS.value:
        return f"rows of {prod(o.shard.shape[1:])} elements are too long to project; use project_over='tensor'"
    return None


def projects_rows(o: Operands, rule: MergeRule) -> bool:
    """Return whether a tensor is projected over rows and has more than one."""
    return rule.project is not None and rule.project_over == "rows" and o.tau is not None and o.shard.has_rows


def specialization(o: Operands, rule: MergeRule, stats: bool, block: int) -> Specialization:
    """Return which compiled form steps a tensor."""
    numel, row_length, index = o.param.numel(), o.param.shape[1:].numel(), o.shard.elements
    dtypes = (x if x is None else layout.TL_DTYPE[x.dtype] for x in (o.param, o.grad, o.exp_avg, o.exp_avg_sq))
    common = {
        "MASTER": "none" if o.master is None else MASTER[o.master.dtype],
        "STOCHASTIC": rule.rounding == "stochastic",
        "STRIDED": index.local_inner < numel,
        "BLOCK": block,
    }
    dense = [o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.master]
    runs = index.offset % 4 == 0 and (
        index.local_inner >= numel or index.local_inner % 4 == index.global_inner % 4 == 0
    )
    if o.tau is None:
        return Specialization(*dtypes, **common, ALIGNED=layout.is_aligned(dense), QUADS=runs)
    sparse = isinstance(o.tau, SparseTensor)
    f_of_u = "none" if rule.reserve_rate == 1.0 else rule.update
    ranked = f_of_u in RANKED
    rows = projects_rows(o, rule)
    row_programs = rows and not ranked and not stats and not o.shard.row_groups
    plain = o.anchor is None and not stats
    wide = all(x is not None and x.dtype == torch.float32 for x in (o.exp_avg, o.exp_avg_sq))
    dense += [None if sparse else o.tau, o.tau_dense if rule.project else None, o.anchor and o.anchor.weights]
    return Specialization(
        *dtypes,
        **common,
        TAU=layout.TL_DTYPE[o.tau.dtype],
        SPARSE=sparse,
        SPARSIFY=f_of_u,
        CONSENSUS=rule.consensus,
        PROJECT=rule.project,
        PROJECT_ON=rule.project_on,
        PROJECT_ROWS=rows,
        TAU_DENSE=layout.TL_DTYPE[o.tau_dense.dtype] if rule.project and o.tau_dense is not None else None,
        ANCHOR=o.anchor and layout.TL_DTYPE[o.anchor.weights.dtype],
        KEEPS_ANCHOR=o.anchor is None or o.anchor.kept,
        STATS=stats,
        RANKED=ranked,
        RESUMES=ranked and wide and plain,
        ROW_PROGRAMS=row_programs,
        SKIPS=sparse and plain and f_of_u != "none" and rule.reserve_rate <= SKIPS_UP_TO and o.master is None,
        # Rows must begin as aligned as the tensor does.
        ALIGNED=layout.is_aligned(dense) and (not rows or row_length % 8 == 0),
        QUADS=runs and (not row_programs or row_length % 4 == 0),
    )
