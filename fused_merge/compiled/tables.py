"""What compiled code is told of a tensor, or why it does not serve it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fused_merge.compiled import layout
from fused_merge.compiled.layout import TensorEntry
from fused_merge.compiled.memory import DTYPES
from fused_merge.compiled.scratch import LONGEST_ROW
from fused_merge.eager.operands import Operands
from fused_merge.eager.philox import keep_threshold
from fused_merge.eager.sparse import SparseTensor
from fused_merge.methods import MergeRule

# From this share of kept elements on, lines of weights that hold none are too rare to skip.
SKIPS_UP_TO = 0.1
_MASTER = {torch.float32: layout.FULL_MASTER, torch.int16: layout.SPLIT_MASTER}


def why_unsupported(o: Operands, rule: MergeRule) -> str | None:
    """Return in a few words why compiled code cannot step this tensor, or None.

    The layout of a gradient is no reason: it may differ between processes, which must run the same code.
    """
    tensors = {
        "weights": o.param,
        "gradients": o.grad,
        "first moments": o.exp_avg,
        "second moments": o.exp_avg_sq,
        "reference deltas": o.tau,
        "dense reference deltas": o.tau_dense,
        "anchors": o.anchor and o.anchor.weights,
        "masters": o.master,
    }
    for what, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"there is no compiled code for {tensor.dtype} {what}"
        if isinstance(tensor, Tensor) and tensor is not o.grad and not tensor.is_contiguous():
            return f"there is no compiled code for {what} that are not contiguous"
    if o.tau is not None and rule.update not in layout.SPARSIFY:
        return f"there is no compiled code for F {rule.update!r} of the update"
    return None


def projects_rows(o: Operands, rule: MergeRule) -> bool:
    """Return whether a tensor is projected over rows and has more than one."""
    return rule.project is not None and rule.project_over == "rows" and o.tau is not None and o.shard.has_rows


def finds_rows(o: Operands, rule: MergeRule) -> bool:
    """Return whether the products of a row are found where it is stepped: it is whole, and so is its gradient."""
    whole = projects_rows(o, rule) and not o.shard.row_groups and rule.project_on == "gradient"
    return whole and o.param.shape[1:].numel() <= LONGEST_ROW


def _skips(o: Operands, rule: MergeRule, stats: bool) -> bool:
    """Return whether weights to which nothing is added are left alone; fp32 ones, at most decayed."""
    few = isinstance(o.tau, SparseTensor) and rule.update != "none" and rule.reserve_rate <= SKIPS_UP_TO
    plain = o.anchor is None and o.master is None and not stats
    # What a ranked F has not found yet, it finds in moments that have advanced.
    moments = (o.exp_avg, o.exp_avg_sq) if rule.update != "random" else ()
    return few and plain and all(x is not None and x.dtype == torch.float32 for x in moments)


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies, or 0 for none."""
    # An empty tensor lies nowhere, and yet it is there: so do all processes know that there is an anchor.
    return 0 if tensor is None else tensor.data_ptr() or -1


def entry(o: Operands, rule: MergeRule, *, seed: int, stats: bool, decays: bool) -> TensorEntry:
    """Return the row of the table; `along` is set before each step."""

    def dtype(tensor: Tensor | None) -> int:
        return 0 if tensor is None else DTYPES[tensor.dtype]

    sparse = o.tau if isinstance(o.tau, SparseTensor) else None
    tau = o.tau.values if isinstance(o.tau, SparseTensor) else o.tau
    anchor = None if o.tau is None else o.anchor
    dense = None if rule.project is None else tau if o.tau_dense is None else o.tau_dense
    rows, numel = projects_rows(o, rule), o.param.numel()
    project = 0
    if rule.project is not None and o.tau is not None:
        flags = (True, rule.project == "onto", rule.project_on == "update", rows)
        bits = (layout.PROJECTS, layout.ONTO, layout.ON_UPDATE, layout.OVER_ROWS)
        project = sum(bit for bit, flag in zip(bits, flags, strict=True) if flag)
    strength, rest = (int(np.float32(x).view(np.uint32)) for x in (rule.project_strength, 1.0 - rule.project_strength))
    return TensorEntry(
        param=address(o.param),
        grad=address(o.grad),
        exp_avg=address(o.exp_avg),
        exp_avg_sq=address(o.exp_avg_sq),
        tau=address(tau),
        tau_dense=address(dense),
        anchor=address(anchor and anchor.weights),
        param_dtype=dtype(o.param),
        grad_dtype=dtype(o.grad),
        exp_avg_dtype=dtype(o.exp_avg),
        exp_avg_sq_dtype=dtype(o.exp_avg_sq),
        tau_dtype=dtype(tau),
        tau_dense_dtype=dtype(dense),
        anchor_dtype=dtype(anchor and anchor.weights),
        merges=o.tau is not None,
        tau_mask=0 if sparse is None else address(sparse.mask),
        tau_offsets=0 if sparse is None else address(sparse.offsets),
        wide_offsets=sparse is not None and sparse.offsets.dtype == torch.int64,
        master=address(o.master),
        master_kind=layout.NO_MASTER if o.master is None else _MASTER[o.master.dtype],
        anchor_decay=address(anchor and anchor.decay),
        keeps_anchor=anchor is not None and anchor.kept,
        step=address(o.step),
        along=0,
        numel=numel,
        row_length=o.param.shape[1:].numel() if rows and numel else numel,
        **o.shard.elements._asdict(),
        tensor_id=o.tensor_id,
        seed=(seed + 2**63) % 2**64 - 2**63,
        keep_threshold=keep_threshold(rule.reserve_rate),
        sparsify=layout.NONE if rule.reserve_rate == 1.0 else layout.SPARSIFY[rule.update],
        consensus=layout.CONSENSUS[rule.consensus],
        project=project,
        strength=strength,
        rest=rest,
        stochastic=rule.rounding == "stochastic",
        stats=stats and o.tau is not None,
        # 16-bit weights that decay are rounded once, after something was added.
        skips=_skips(o, rule, stats) and (o.param.dtype == torch.float32 or not decays),
    )
