"""theta += F(u) ⊕ F(tau) inside one AdamW step, for many tensors in one launch.

    g, m, v, theta, tau -> fp32
    m = b1*m + (1 - b1)*g;  v = b2*v + (1 - b2)*g^2
    u = -(lr/bc1)*m / (sqrt(v)/sqrt(bc2) + eps)
    theta = theta*(1 - lr*wd) + (1 - alpha)*F(u) + alpha*F(tau)     rounded once to theta's dtype

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1 and equation 4. Twin: `fused_merge/eager/merging_adamw.py`.

Bytes per element, all fp32: reads theta 4, g 4, m 4, v 4; writes theta 4, m 4, v 4: 28. tau adds 4 (fp32) or
2 (bf16, fp16) when dense; stored sparse 1/8 + 4/1024 and 2 or 4 for each kept value. The masks of u cost
arithmetic and no bytes.

Contract: theta, g, m, v and a dense tau are contiguous; theta and g are fp32, bf16 or fp16, the moments fp32.
The sparse layout is that of `fused_merge.sparse.SparseTensor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_UPDATE, keep_threshold
from fused_merge.eager.scalars import Scalars
from fused_merge.kernels import device, tables
from fused_merge.methods import MergeRule
from fused_merge.sharding import ShardIndex
from fused_merge.sparse import BLOCK, SparseTensor

Tau = Tensor | SparseTensor | None


class TensorRow(NamedTuple):
    """A row of the tensor table: what the kernel knows of one tensor, as int64."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    tau: int  # dense values, or the mask of a sparse tau
    tau_values: int
    tau_offsets: int
    numel: int
    offset: int
    local_inner: int
    global_inner: int
    tensor_id: int
    seed: int
    threshold: int


# Where the kernel finds a column of its two tables.
PARAM_AT, GRAD_AT, EXP_AVG_AT, EXP_AVG_SQ_AT, TAU_AT, TAU_VALUES_AT, TAU_OFFSETS_AT = map(tl.constexpr, range(7))
NUMEL_AT, OFFSET_AT, LOCAL_INNER_AT, GLOBAL_INNER_AT, ID_AT, SEED_AT, THRESHOLD_AT = map(tl.constexpr, range(7, 14))
STEP_AT, BETA1_AT, ONE_MINUS_BETA1_AT, BETA2_AT, ONE_MINUS_BETA2_AT, STEP_SIZE_AT = map(tl.constexpr, range(6))
INV_SQRT_BIAS2_AT, EPS_AT, DECAY_AT, UPDATE_WEIGHT_AT, TAU_WEIGHT_AT, MOVES_AT = map(tl.constexpr, range(6, 12))
GRAD_FACTOR_AT, ADVANCES_AT = map(tl.constexpr, range(12, 14))
TENSOR_COLUMNS = tl.constexpr(len(TensorRow._fields))
SCALAR_COLUMNS = tl.constexpr(len(Scalars._fields))
SPARSE_BLOCK = tl.constexpr(BLOCK)
DOMAIN = tl.constexpr(DOMAIN_UPDATE)


@triton.jit
def load_sparse(
    mask_address,
    values_address,
    offsets_address,
    base,
    left,
    dtype: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode BLOCK elements of a `SparseTensor` as fp32: a bit each, and the kept values packed in order.

    The mask is padded to whole blocks of 1024 elements: bounds are on blocks, and only unless FULL.
    """
    first = base // SPARSE_BLOCK
    row = tl.arange(0, BLOCK // SPARSE_BLOCK)
    lane = tl.arange(0, SPARSE_BLOCK)
    words = mask_address.to(tl.pointer_type(tl.int32)) + (first + row)[:, None] * (SPARSE_BLOCK // 32)
    words += (lane >> 5)[None, :]
    offsets = offsets_address.to(tl.pointer_type(tl.int32)) + first + row
    if FULL:
        word = tl.load(words)
        offset = tl.load(offsets)
    else:
        exists = row * SPARSE_BLOCK < left
        word = tl.load(words, mask=exists[:, None], other=0)
        offset = tl.load(offsets, mask=exists, other=0)
    bit = (word >> (lane & 31)[None, :]) & 1
    rank = tl.cumsum(bit, axis=1) - bit
    values = values_address.to(tl.pointer_type(dtype)) + (offset[:, None] + rank)
    return tl.reshape(tl.load(values, mask=bit == 1, other=0.0).to(tl.float32), (BLOCK,))


@triton.jit
def step_chunk(
    tensor,
    scalar,
    base,
    left,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TAU: tl.constexpr,
    SPARSE: tl.constexpr,
    RANDOM: tl.constexpr,
    STRIDED: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step for BLOCK elements from `base` on; FULL promises that all of them exist."""
    param = tl.load(tensor + PARAM_AT)
    exp_avg = tl.load(tensor + EXP_AVG_AT)
    exp_avg_sq = tl.load(tensor + EXP_AVG_SQ_AT)

    g = device.load(tl.load(tensor + GRAD_AT), base, left, GRAD, ALIGNED, FULL, BLOCK).to(tl.float32)
    g = tl.load(scalar + GRAD_FACTOR_AT) * g
    m = device.load(exp_avg, base, left, tl.float32, ALIGNED, FULL, BLOCK)
    v = device.load(exp_avg_sq, base, left, tl.float32, ALIGNED, FULL, BLOCK)
    m, v = device.moments(
        g,
        m,
        v,
        tl.load(scalar + BETA1_AT),
        tl.load(scalar + ONE_MINUS_BETA1_AT),
        tl.load(scalar + BETA2_AT),
        tl.load(scalar + ONE_MINUS_BETA2_AT),
    )
    step = device.adamw_update(
        m, v, tl.load(scalar + STEP_SIZE_AT), tl.load(scalar + INV_SQRT_BIAS2_AT), tl.load(scalar + EPS_AT)
    )
    device.store(m, exp_avg, base, left, tl.float32, ALIGNED, FULL, BLOCK)
    device.store(v, exp_avg_sq, base, left, tl.float32, ALIGNED, FULL, BLOCK)

    # lr = 0 moves the moments and leaves the weights, bit for bit.
    if tl.load(scalar + MOVES_AT) != 0.0:
        if RANDOM:
            keep = device.random_keep(
                base,
                tl.load(tensor + OFFSET_AT),
                tl.load(tensor + LOCAL_INNER_AT),
                tl.load(tensor + GLOBAL_INNER_AT),
                tl.load(tensor + SEED_AT),
                tl.load(scalar + STEP_AT).to(tl.uint32),
                tl.load(tensor + ID_AT).to(tl.uint32),
                tl.load(tensor + THRESHOLD_AT).to(tl.uint32),
                DOMAIN,
                STRIDED,
                QUADS,
                BLOCK,
            )
            step = tl.where(keep, step, 0.0)
        if TAU is not None:
            if SPARSE:
                tau = load_sparse(
                    tl.load(tensor + TAU_AT),
                    tl.load(tensor + TAU_VALUES_AT),
                    tl.load(tensor + TAU_OFFSETS_AT),
                    base,
                    left,
                    TAU,
                    FULL,
                    BLOCK,
                )
            else:
                tau = device.load(tl.load(tensor + TAU_AT), base, left, TAU, ALIGNED, FULL, BLOCK).to(tl.float32)
            step = device.linear(step, tau, tl.load(scalar + UPDATE_WEIGHT_AT), tl.load(scalar + TAU_WEIGHT_AT))
        theta = device.load(param, base, left, PARAM, ALIGNED, FULL, BLOCK).to(tl.float32)
        device.store(theta * tl.load(scalar + DECAY_AT) + step, param, base, left, PARAM, ALIGNED, FULL, BLOCK)


@triton.jit
def merging_adamw_kernel(
    programs,  # int32 [P, 2]: tensor, chunk
    tensors,  # int64 [T, 14]: `TensorRow`
    scalars,  # fp32 [T, 15]: `Scalars`
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TAU: tl.constexpr,
    SPARSE: tl.constexpr,
    RANDOM: tl.constexpr,
    STRIDED: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of BLOCK elements of one tensor."""
    program = programs + 2 * tl.program_id(0)
    index = tl.load(program)
    tensor = tensors + index * TENSOR_COLUMNS
    scalar = scalars + index * SCALAR_COLUMNS
    base = tl.load(program + 1).to(tl.int64) * BLOCK
    left = tl.load(tensor + NUMEL_AT) - base
    # An overflow of scaled gradients stops the step on the device; nothing waits to hear of it.
    if tl.load(scalar + ADVANCES_AT) != 0.0:
        # Bounds on single elements would forbid wide accesses: only the last chunk of a tensor pays for them.
        if left >= BLOCK:
            step_chunk(
                tensor, scalar, base, left, PARAM, GRAD, TAU, SPARSE, RANDOM, STRIDED, QUADS, ALIGNED, True, BLOCK
            )
        else:
            step_chunk(
                tensor, scalar, base, left, PARAM, GRAD, TAU, SPARSE, RANDOM, STRIDED, QUADS, ALIGNED, False, BLOCK
            )


class Build(NamedTuple):
    """What one compiled form of the kernel is special to; the tensors that share it go in one launch."""

    PARAM: tl.dtype
    GRAD: tl.dtype
    TAU: tl.dtype | None
    SPARSE: bool
    RANDOM: bool
    STRIDED: bool
    QUADS: bool
    ALIGNED: bool


def unsupported(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    tau: Tau,
    rule: MergeRule,
    *,
    stepk: bool = False,
    master: Tensor | None = None,
) -> str | None:
    """Return in a few words why the kernel cannot step this tensor, or None."""
    if tau is not None and (rule.update not in ("none", "random") or rule.consensus != "linear"):
        return f"F = {rule.update} with a {rule.consensus} consensus has no kernel yet"
    if tau is not None and rule.project is not None:
        return "projection has no kernel yet"
    if stepk:
        return "merges at every K-th step have no kernel yet"
    if master is not None or rule.rounding != "nearest":
        return "master weights and stochastic rounding have no kernel yet"
    if param.dtype not in tables.TL_DTYPE or grad.dtype not in tables.TL_DTYPE:
        return f"{param.dtype} weights with {grad.dtype} gradients have no kernel"
    if exp_avg.dtype != torch.float32 or exp_avg_sq.dtype != torch.float32:
        return f"{exp_avg.dtype} moments have no kernel"
    if isinstance(tau, Tensor) and tau.dtype not in tables.TL_DTYPE:
        return f"a {tau.dtype} reference delta has no kernel"
    if isinstance(tau, SparseTensor) and tau.offsets.dtype != torch.int32:
        return "a sparse delta with 2^31 kept values has no kernel"
    dense = [param, grad, exp_avg, exp_avg_sq] + ([tau] if isinstance(tau, Tensor) else [])
    if not all(tensor.is_contiguous() for tensor in dense):
        return "the kernel takes contiguous tensors"
    return None


def merging_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    taus: Sequence[Tau],
    scalars: Tensor,
    rule: MergeRule,
    *,
    seed: int,
    tensor_ids: Sequence[int],
    shards: Sequence[ShardIndex],
    block: int = tables.DEFAULT_BLOCK,
) -> None:
    """Launch the step for tensors on one device, one launch for all that share a `Build`.

    Args:
        params: weights; mutated in place.
        grads: gradients.
        exp_avgs: first moments; mutated in place.
        exp_avg_sqs: second moments; mutated in place.
        taus: F(tau) of each tensor, dense or sparse, or None for a plain AdamW step.
        scalars: fp32 `[T, 15]`, a row of `Scalars` for each tensor, on the tensors' device.
        rule: the row of the table of methods.
        seed: key of the random masks.
        tensor_ids: what keys each tensor's mask.
        shards: where each tensor lies in the unsharded one.
        block: elements per program, a multiple of 1024.
    """
    launches: dict[Build, list[int]] = {}
    rows = [
        _tensor_row(*tensors, rule, seed, tensor_id, shard)
        for *tensors, tensor_id, shard in zip(
            params, grads, exp_avgs, exp_avg_sqs, taus, tensor_ids, shards, strict=True
        )
    ]
    for index, (param, grad, tau, shard, row) in enumerate(zip(params, grads, taus, shards, rows, strict=True)):
        if row.numel > 0:
            launches.setdefault(_build(param, grad, tau, shard, row, rule), []).append(index)
    where = params[0].device
    for build, members in launches.items():
        programs = tables.program_table([rows[i].numel for i in members], block, where)
        tensors = torch.tensor([rows[i] for i in members], dtype=torch.int64).to(where, non_blocking=True)
        with torch.cuda.device_of(params[0]):
            merging_adamw_kernel[(len(programs),)](
                programs,
                tensors,
                scalars[members] if len(members) < len(rows) else scalars,
                **build._asdict(),
                BLOCK=block,
                num_warps=tables.NUM_WARPS,
                enable_fp_fusion=False,
            )


def _tensor_row(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    tau: Tau,
    rule: MergeRule,
    seed: int,
    tensor_id: int,
    shard: ShardIndex,
) -> TensorRow:
    sparse = isinstance(tau, SparseTensor)
    return TensorRow(
        param=param.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        tau=0 if tau is None else tau.mask.data_ptr() if sparse else tau.data_ptr(),
        tau_values=tau.values.data_ptr() if sparse else 0,
        tau_offsets=tau.offsets.data_ptr() if sparse else 0,
        numel=param.numel(),
        **shard._asdict(),
        tensor_id=tensor_id,
        # The table is signed; the kernel reads the 64 bits as they are.
        seed=(seed + 2**63) % 2**64 - 2**63,
        threshold=keep_threshold(rule.reserve_rate),
    )


def _build(param: Tensor, grad: Tensor, tau: Tau, shard: ShardIndex, row: TensorRow, rule: MergeRule) -> Build:
    sparse = isinstance(tau, SparseTensor)
    strided = shard.local_inner < row.numel
    return Build(
        PARAM=tables.TL_DTYPE[param.dtype],
        GRAD=tables.TL_DTYPE[grad.dtype],
        TAU=None if tau is None else tables.TL_DTYPE[tau.values.dtype if sparse else tau.dtype],
        SPARSE=sparse,
        RANDOM=tau is not None and rule.update == "random" and rule.reserve_rate < 1.0,
        STRIDED=strided,
        QUADS=shard.offset % 4 == 0 and (not strided or shard.local_inner % 4 == shard.global_inner % 4 == 0),
        ALIGNED=tables.is_aligned(
            (row.param, row.grad, row.exp_avg, row.exp_avg_sq) + (() if sparse or tau is None else (row.tau,))
        ),
    )
