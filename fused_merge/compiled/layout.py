"""The tables that describe tensors and hold their scalars."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from fused_merge.eager.scalars import Scalars


def columns(table: type[NamedTuple]) -> Any:
    """Return the numbers of a table's columns, by name: a module, whose attributes are constants in compiled code."""
    numbers = ModuleType(table.__name__)
    for number, name in enumerate(table._fields):
        setattr(numbers, name, number)
    return numbers


# Columns of the scalar table, fp32.
SCALAR, SCALARS = columns(Scalars), len(Scalars._fields)

NONE, RANDOM, MAGNITUDE, SOFT_THRESHOLD = range(4)
SPARSIFY = {"none": NONE, "random": RANDOM, "magnitude": MAGNITUDE, "soft_threshold": SOFT_THRESHOLD}
LINEAR, SIGN_REFERENCE, SIGN_PAPER = range(3)
CONSENSUS = {"linear": LINEAR, "sign_reference": SIGN_REFERENCE, "sign_paper": SIGN_PAPER}
# Bits of what is projected, and how.
PROJECTS, ONTO, ON_UPDATE, OVER_ROWS = 1, 2, 4, 8
NO_MASTER, FULL_MASTER, SPLIT_MASTER = range(3)
# No pattern of a magnitude is above it.
LARGEST = 0x7FFFFFFF


class TensorEntry(NamedTuple):
    """What compiled code knows of a tensor; 64-bit integers."""

    # Addresses, 0 where there is none, and in the same order the dtypes, of `memory`.
    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    tau: int  # all of it, or the values of a sparse one
    tau_dense: int  # that something is projected onto
    anchor: int
    param_dtype: int
    grad_dtype: int
    exp_avg_dtype: int
    exp_avg_sq_dtype: int
    tau_dtype: int
    tau_dense_dtype: int
    anchor_dtype: int
    # Other addresses, and what goes with them.
    merges: int  # whether there is a tau, if only one without values
    tau_mask: int  # 0 where tau is dense
    tau_offsets: int
    wide_offsets: int  # whether these are int64
    master: int
    master_kind: int
    anchor_decay: int
    keeps_anchor: int
    step: int
    along: int  # fp32 [1 or rows, 2]: <x, tau> and <tau, tau>; 0 where they are found row by row
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


ENTRY, ENTRIES = columns(TensorEntry), len(TensorEntry._fields)
# From the column of an address to that of a dtype.
DTYPE = ENTRY.param_dtype - ENTRY.param
