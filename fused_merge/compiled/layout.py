"""The tables that describe tensors and hold their scalars, and the room that a thread works in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fused_merge.compiled.memory import BLOCK
from fused_merge.eager.scalars import Scalars

# Columns of the scalar table, fp32.
SCALAR = Scalars(*range(len(Scalars._fields)))

NONE, RANDOM, MAGNITUDE, SOFT_THRESHOLD = range(4)
SPARSIFY = {"none": NONE, "random": RANDOM, "magnitude": MAGNITUDE, "soft_threshold": SOFT_THRESHOLD}
LINEAR, SIGN_REFERENCE, SIGN_PAPER = range(3)
CONSENSUS = {"linear": LINEAR, "sign_reference": SIGN_REFERENCE, "sign_paper": SIGN_PAPER}
# Bits of what is projected, and how.
PROJECTS, ONTO, ON_UPDATE, OVER_ROWS = 1, 2, 4, 8
# Above every pattern of a magnitude.
LARGEST = 0x7FFFFFFF
NO_MASTER, FULL_MASTER, SPLIT_MASTER = range(3)


class TensorEntry(NamedTuple):
    """What compiled code knows of a tensor; 64-bit integers. An address of 0 is no tensor, a dtype is of `memory`."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    step: int
    tau: int  # dense, or the mask of a sparse one
    tau_values: int  # 0 where tau is dense
    tau_offsets: int
    wide_offsets: int  # whether these are int64
    tau_dense: int  # that something is projected onto
    along: int  # fp32 [1 or rows, 2]: <x, tau> and <tau, tau>; 0 where they are found row by row
    anchor: int
    anchor_decay: int
    master: int
    param_dtype: int
    grad_dtype: int
    exp_avg_dtype: int
    exp_avg_sq_dtype: int
    tau_dtype: int
    tau_dense_dtype: int
    anchor_dtype: int
    master_kind: int
    keeps_anchor: int
    numel: int
    row_length: int
    offset: int
    local_inner: int
    global_inner: int
    tensor_id: int
    seed: int
    keep_threshold: int  # of a random F
    sparsify: int
    consensus: int
    project: int  # bits: whether, and how
    strength: int  # s of "onto" and 1 - s, as the patterns of fp32 numbers
    rest: int
    stochastic: int
    stats: int  # whether statistics are collected
    skips: int  # whether weights to which nothing is added are left alone


ENTRY = TensorEntry(*range(len(TensorEntry._fields)))


class Scratch(NamedTuple):
    """What one thread works in."""

    rows: Any  # fp32 [ROWS, BLOCK]
    zeros: Any  # fp32 [BLOCK], zeros between calls
    bits: Any  # uint16 [BLOCK]
    kept: Any  # uint8, four bits a counter
    candidates: Any  # int32, counters that keep something
    places: Any  # int32 [2, ...], places in a block: of what is kept of u, and of tau
    marks: Any  # uint8 [BLOCK], which elements are listed
    random: Any  # uint32 [2, ...], random words
    row: Any  # int64 [2], the tensor and the row that `along` is of
    along: Any  # fp32 [2], <x, tau> and <tau, tau>
    nodes: Any  # fp32 [2, LONGEST_ROW / BLOCK], sums of the blocks of a row


# Rows of scratch.
(
    GRAD, SCALED, PROJECTED, EXP_AVG, EXP_AVG_SQ, UPDATE, KEPT, TAU, TAU_DENSE, VALUES, MERGED, START, WEIGHT, ANCHOR,
    MASTER, THETA, X, Y, PRODUCT, SUMS, ROWS,
) = range(21)  # fmt: skip
# Longer rows are projected with products that were found before the step.
LONGEST_ROW = 1 << 24


def scratch() -> Scratch:
    """Return a room for one thread."""
    return Scratch(
        rows=np.zeros((ROWS, BLOCK), np.float32),
        zeros=np.zeros(BLOCK, np.float32),
        bits=np.zeros(BLOCK, np.uint16),
        kept=np.zeros(BLOCK // 4 + 2, np.uint8),
        candidates=np.zeros(BLOCK // 4 + 3, np.int32),
        places=np.zeros((2, BLOCK + 8), np.int32),
        marks=np.zeros(BLOCK, np.uint8),
        random=np.zeros((2, BLOCK + 8), np.uint32),
        row=np.full(2, -1, np.int64),
        along=np.zeros(2, np.float32),
        nodes=np.zeros((2, LONGEST_ROW // BLOCK), np.float32),
    )
