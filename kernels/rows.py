"""What a launch knows of each tensor, and what one compiled form of the step is special to."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl


class TensorRow(NamedTuple):
    """A row of the tensor table, int64: addresses (0 where there is nothing) and numbers."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    step: int
    tau: int  # F(tau): dense values, or the mask of a sparse one
    tau_values: int
    tau_offsets: int
    full: int  # tau before F
    anchor: int
    anchor_decay: int
    master: int
    numel: int
    columns: int  # elements in a row, the index along dim 0
    coefficients: int  # which are the tensor's first
    offset: int
    local_inner: int
    global_inner: int
    tensor_id: int
    seed: int
    threshold: int  # of the random words
    rank: int  # k of the k-th largest
    words: int  # which are the tensor's first words of marks


# Where a kernel finds a column.
PARAM_AT, GRAD_AT, EXP_AVG_AT, EXP_AVG_SQ_AT, STEP_AT = map(tl.constexpr, range(5))
TAU_AT, TAU_VALUES_AT, TAU_OFFSETS_AT, FULL_AT = map(tl.constexpr, range(5, 9))
ANCHOR_AT, ANCHOR_DECAY_AT, MASTER_AT = map(tl.constexpr, range(9, 12))
NUMEL_AT, COLUMNS_AT, COEFFICIENTS_AT = map(tl.constexpr, range(12, 15))
OFFSET_AT, LOCAL_INNER_AT, GLOBAL_INNER_AT, ID_AT, SEED_AT, THRESHOLD_AT = map(tl.constexpr, range(15, 21))
RANK_AT, WORDS_AT, TENSOR_COLUMNS = map(tl.constexpr, range(21, 24))


class Build(NamedTuple):
    """What one compiled form of the step is special to; tensors that share it go in one launch."""

    PARAM: tl.dtype
    GRAD: tl.dtype
    EXP_AVG: tl.dtype
    EXP_AVG_SQ: tl.dtype
    TAU: tl.dtype | None = None  # of F(tau); None for a plain AdamW step
    SPARSE: bool = False  # F(tau) is a `SparseTensor`
    SPARSIFY: str = "none"  # F of u
    CONSENSUS: str = "linear"
    PROJECT: str | None = None
    PROJECT_ON: str = "gradient"
    PROJECT_ROWS: bool = False
    FULL: tl.dtype | None = None  # of tau before F, where something is projected onto it and F(tau) is another
    ANCHOR: tl.dtype | None = None  # merges at every K-th step
    MASTER: str = "none"  # "fp32", or "split" for the low halves
    STOCHASTIC: bool = False
    STATS: bool = False
    RANKED: bool = False  # F compares with the k-th largest magnitude, which passes of their own find
    RESUMES: bool = False  # those passes store the moments, and the last one makes u of them again
    ROW_PROGRAMS: bool = False  # a program takes a whole row, so that it can project it in one pass
    SKIPS: bool = False  # weights are touched only where a group of neighbours holds something to add
    STRIDED: bool = False  # a shard of more than one run
    QUADS: bool = True  # four neighbours share a block of random words
    ALIGNED: bool = True  # every dense tensor allows 128-bit accesses
