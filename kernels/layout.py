"""What a launch knows of its tensors and programs, on the host and in a kernel.

A launch serves many tensors: a table of tensors (a `TensorEntry` each) and a table of programs that says which tensor
and which part of it each program works on. Blocks that lie wholly in their tensor and those at its end are launched
separately: only the latter need bounds on single elements, which forbid wide accesses.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.eager.scalars import Scalars
from fused_merge.kernels import INTERPRETED

Kept, Spec = TypeVar("Kept"), TypeVar("Spec")

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

NUM_WARPS = 4
# Eight elements a thread: 128-bit accesses of 16-bit types, with 32 threads a warp and, on AMD, 64. The
# interpreter pays by the operation and not by the element.
DEFAULT_BLOCK = 16384 if INTERPRETED else 8 * NUM_WARPS * (64 if torch.version.hip else 32)

# Global loads and stores are 128 bits wide where every pointer is a multiple of this.
ALIGNMENT = 16


class Columns(tl.constexpr):
    """Where the fields of a table's entry stand: `Columns(Entry).field` is the column of that field.

    Import it by name into a module of kernels: Triton then makes it part of what identifies their compiled code.
    """

    def __init__(self, entry: type) -> None:
        super().__init__(entry(*range(len(entry._fields))))
        self.count = len(entry._fields)

    def __getattr__(self, field: str) -> int:
        if field == "value" or field.startswith("_"):
            raise AttributeError(field)
        return getattr(self.value, field)


class TensorEntry(NamedTuple):
    """What a step knows of a tensor, int64: addresses (0 where there is nothing) and numbers."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    step: int
    tau: int  # F(tau): dense values, or the mask of a sparse one
    tau_values: int
    tau_offsets: int
    tau_dense: int  # tau before F
    anchor: int
    anchor_decay: int
    master: int
    numel: int
    row_length: int  # elements at one index along dim 0, where rows are projected
    first_coefficient: int  # of the tensor, in the table of projections
    first_block: int  # of the tensor, among the blocks of all tensors
    group_blocks: int  # blocks of a group, which one program looks at where there are few programs
    first_listed: int  # of the tensor, in the lists of a search
    list_capacity: int
    offset: int
    local_inner: int
    global_inner: int
    tensor_id: int
    seed: int
    keep_threshold: int  # of the random bits
    rank: int  # k of the k-th largest


# What a step knows of a tensor's scalars, fp32; the decay is the product of (1 - lr*wd) since the last merge, of this
# step too, and the shares are those of a projection "onto".
ScalarEntry = namedtuple("ScalarEntry", (*Scalars._fields, "origin_decay", "rest_share", "onto_share"))

ENTRY, SCALAR = Columns(TensorEntry), Columns(ScalarEntry)
ENTRY_COLUMNS, SCALAR_COLUMNS = tl.constexpr(ENTRY.count), tl.constexpr(SCALAR.count)


class Specialization(NamedTuple):
    """What one compiled form of the step is special to; tensors that share it go in one launch."""

    PARAM: tl.dtype
    GRAD: tl.dtype | None  # None where another optimizer has taken the step, and moments are None too
    EXP_AVG: tl.dtype | None
    EXP_AVG_SQ: tl.dtype | None
    TAU: tl.dtype | None = None  # of F(tau); None for a plain AdamW step
    SPARSE: bool = False  # F(tau) is a `SparseTensor`
    SPARSIFY: str = "none"  # F of u
    CONSENSUS: str = "linear"
    PROJECT: str | None = None
    PROJECT_ON: str = "gradient"
    PROJECT_ROWS: bool = False
    TAU_DENSE: tl.dtype | None = None  # of tau before F, where something is projected onto it and F(tau) is another
    ANCHOR: tl.dtype | None = None  # merges at every K-th step, or after another optimizer's
    KEEPS_ANCHOR: bool = True  # a merge leaves the next anchor
    MASTER: str = "none"  # "fp32", or "split" for the low halves
    STOCHASTIC: bool = False
    STATS: bool = False
    RANKED: bool = False  # F compares with the k-th largest magnitude, which passes of their own find
    RESUMES: bool = False  # those passes store the moments, and the last one makes u of them again
    ROW_PROGRAMS: bool = False  # a program takes a whole row, so that it can project it in one pass
    SKIPS: bool = False  # weights are touched only where a group of neighbors holds something to add
    STRIDED: bool = False  # a shard of more than one run
    QUADS: bool = True  # four neighbors share a block of random bits
    ALIGNED: bool = True  # every dense tensor allows 128-bit accesses
    MASKED: bool = False  # blocks may reach beyond the end of their tensor or row
    BLOCK: int = DEFAULT_BLOCK

    @property
    def WALKS(self) -> bool:
        """Whether the last pass walks lists of what is kept, where that is known to be in them."""
        return self.RESUMES and self.SKIPS


class Block(NamedTuple):
    """Elements of one tensor, as device functions take them; none returns one whose `where` is None."""

    tensor_ptr: Any  # int64, its `TensorEntry`
    scalars_ptr: Any  # fp32, its `ScalarEntry`
    base: Any  # int64, the first of BLOCK elements; or int64 [lanes], one for each lane
    where: Any  # bool [BLOCK or lanes], the elements to access; None for all


@triton.jit
def locate(programs_ptr, tensors_ptr, scalars_ptr, tensor_columns=ENTRY_COLUMNS, scalar_columns=SCALAR_COLUMNS):
    """What this program works on: the number of its tensor, which part of it, and its entries in two tables."""
    program_ptr = programs_ptr + 2 * tl.program_id(0)
    index = tl.load(program_ptr)
    part = tl.load(program_ptr + 1).to(tl.int64)
    return index, part, tensors_ptr + index * tensor_columns, scalars_ptr + index * scalar_columns


@triton.jit
def block_of_tensor(tensor_ptr, number, SPEC: tl.constexpr):
    """The first element of a block of a tensor, by its number, and which of its elements the tensor has."""
    base = number * SPEC.BLOCK
    return base, tl.arange(0, SPEC.BLOCK) < tl.load(tensor_ptr + ENTRY.numel) - base


def block_count(numel: int, block: int) -> int:
    """Return how many blocks of `block` elements a tensor takes, at least one."""
    return max(1, -(-numel // block))


@lru_cache(maxsize=32)
def program_table(numels: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return int32 `[programs, 2]`: the tensor and the number of the block there that each program works on.

    Every tensor has a block, if only an empty one. Tables are kept: shapes outlive addresses. Read only.
    """
    counts = torch.tensor([block_count(numel, block) for numel in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    number = torch.arange(len(tensor)) - first
    return torch.stack((tensor, number), dim=1).to(torch.int32).contiguous().to(device, non_blocking=True)


class Programs(NamedTuple):
    """The programs of a pass, in two tables like that of `program_table`: one launch each."""

    whole: Tensor  # blocks that lie wholly in their tensor
    ends: Tensor  # those that may not


@lru_cache(maxsize=32)
def split_programs(numels: tuple[int, ...], block: int, device: torch.device) -> Programs:
    """Return the programs for all blocks of some tensors; kept, and read only, as those of `program_table`."""
    table = program_table(numels, block, torch.device("cpu"))
    whole = (table[:, 1].long() + 1) * block <= torch.tensor(numels)[table[:, 0]]
    return Programs(*(table[chosen].to(device, non_blocking=True) for chosen in (whole, ~whole)))


def launch(kernel: Any, programs: Programs, *arguments: Any, spec: Any, **constants: Any) -> None:
    """Launch a kernel for all programs: those with whole blocks, then those that need bounds."""
    for table, masked in zip(programs, (False, True), strict=True):
        if len(table) > 0:
            with torch.cuda.device_of(table):
                kernel[(len(table),)](
                    table, *arguments, SPEC=spec._replace(MASKED=masked), **constants, num_warps=NUM_WARPS,
                    enable_fp_fusion=False,
                )  # fmt: skip


def group(specs: Iterable[Spec]) -> dict[Spec, list[int]]:
    """Return which tensors share a compiled form, by their numbers."""
    groups: dict[Spec, list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault(spec, []).append(index)
    return groups


def is_aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether every tensor allows 128-bit accesses."""
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors if tensor is not None)


def capturing() -> bool:
    """Return whether the current stream captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Remembered(Generic[Kept]):
    """What was made for something, until it is asked for something else; what a CUDA graph captured stays alive."""

    def __init__(self) -> None:
        self._made_for: Any = None
        self._made: Kept | None = None
        self._captured: list[Kept] = []

    def get(self, made_for: Any, make: Callable[[], Kept]) -> Kept:
        """Return what `make` has made for this, or makes now.

        Raises:
            RuntimeError: if it must be made while a CUDA graph is captured, since tables are copied from the host.
        """
        if self._made is None or made_for != self._made_for:
            if capturing():
                raise RuntimeError(
                    "a CUDA graph can only capture a step of tensors and options that have taken one before: take it "
                    "first, and keep the gradients where they are (zero_grad(set_to_none=False))"
                )
            self._made, self._made_for = make(), made_for
        if capturing():
            self._captured.append(self._made)
        return self._made
