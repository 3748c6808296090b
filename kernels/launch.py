"""From lists of tensors to launches: which tensors share a compiled form, and the tables that describe them.

A launch of the step is a sequence over the tensors of one `Build`: the scalars; what the projection needs; for a
ranked F the marks and the rounds of the search; the step itself. Everything is decided on the device, so that the host
never waits and a step can be captured in a CUDA graph. The tables are kept, with the last thresholds, in a `Plan`, and
made again when an address or an option changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.merge_stats import MergeSums
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.operands import Operands
from fused_merge.eager.philox import keep_threshold
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import kept_count
from fused_merge.kernels import merge_stats, scalars, sparsify, tables
from fused_merge.kernels.merging_adamw import (
    ROW_BLOCKS,
    SEARCH_BLOCKS,
    count_kernel,
    mark_kernel,
    merging_adamw_kernel,
    project_kernel,
    search_kernel,
)
from fused_merge.kernels.rows import Build, TensorRow
from fused_merge.kernels.sums import Reduction
from fused_merge.methods import MergeRule

# From this share of kept elements on, groups of neighbours that hold none are too rare to skip.
SKIPS_UP_TO = 0.1
FLOATS = (
    "weights",
    "gradients",
    "first moments",
    "second moments",
    "reference deltas",
    "whole reference deltas",
    "anchors",
)
MASTER = {torch.float32: "fp32", torch.int16: "split"}


def why_unsupported(o: Operands, rule: MergeRule) -> str | None:
    """Return in a few words why the kernels cannot step this tensor, or None."""
    anchor = o.anchor.weights if o.anchor else None
    for tensor, what in zip(
        (o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.tau, o.tau_dense, anchor), FLOATS, strict=True
    ):
        if tensor is not None and tensor.dtype not in tables.TL_DTYPE:
            return f"{tensor.dtype} {what} have no kernel"
    if o.tau is not None and rule.update not in ("none", "random", *sparsify.RANKED):
        return f"F {rule.update!r} of the update has no kernel"
    if isinstance(o.tau, SparseTensor) and o.tau.offsets.dtype != torch.int32:
        return "a sparse delta with 2^31 kept values has no kernel"
    if _projects_rows(o, rule) and o.param.shape[1:].numel() > tables.DEFAULT_BLOCK * ROW_BLOCKS.value:
        return f"rows of {o.param.shape[1:].numel()} elements are too long to project; use project_over='tensor'"
    return None


def _projects_rows(o: Operands, rule: MergeRule) -> bool:
    """Return whether a tensor is projected over rows and has more than one."""
    projects = rule.project is not None and o.tau is not None
    return projects and rule.project_over == "rows" and o.param.ndim > 1 and o.param.shape[0] > 1


def _build(o: Operands, rule: MergeRule, stats: bool) -> Build:
    """Return which compiled form steps a tensor."""
    numel, columns = o.param.numel(), o.param.shape[1:].numel()
    common = {
        "PARAM": tables.TL_DTYPE[o.param.dtype],
        "GRAD": tables.TL_DTYPE[o.grad.dtype],
        "EXP_AVG": tables.TL_DTYPE[o.exp_avg.dtype],
        "EXP_AVG_SQ": tables.TL_DTYPE[o.exp_avg_sq.dtype],
        "MASTER": "none" if o.master is None else MASTER[o.master.dtype],
        "STOCHASTIC": rule.rounding == "stochastic",
        "STRIDED": o.shard.local_inner < numel,
    }
    dense = [o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.master]
    runs = o.shard.offset % 4 == 0 and (
        o.shard.local_inner >= numel or o.shard.local_inner % 4 == o.shard.global_inner % 4 == 0
    )
    if o.tau is None:
        return Build(**common, ALIGNED=tables.is_aligned(dense), QUADS=runs)
    sparse = isinstance(o.tau, SparseTensor)
    f_of_u = "none" if rule.reserve_rate == 1.0 else rule.update
    ranked = f_of_u in sparsify.RANKED
    rows = _projects_rows(o, rule)
    row_programs = rows and not ranked and not stats
    wide = o.exp_avg.dtype == o.exp_avg_sq.dtype == torch.float32
    dense += [None if sparse else o.tau, o.tau_dense if rule.project else None, o.anchor and o.anchor.weights]
    return Build(
        **common,
        TAU=tables.TL_DTYPE[o.tau.dtype],
        SPARSE=sparse,
        SPARSIFY=f_of_u,
        CONSENSUS=rule.consensus,
        PROJECT=rule.project,
        PROJECT_ON=rule.project_on,
        PROJECT_ROWS=rows,
        FULL=tables.TL_DTYPE[o.tau_dense.dtype] if rule.project and o.tau_dense is not None else None,
        ANCHOR=o.anchor and tables.TL_DTYPE[o.anchor.weights.dtype],
        STATS=stats,
        RANKED=ranked,
        RESUMES=ranked and wide and o.anchor is None and not stats,
        ROW_PROGRAMS=row_programs,
        SKIPS=sparse
        and f_of_u != "none"
        and rule.reserve_rate <= SKIPS_UP_TO
        and o.anchor is None
        and o.master is None
        and not stats,
        # Rows must begin as aligned as the tensor does.
        ALIGNED=tables.is_aligned(dense) and (not rows or columns % 8 == 0),
        QUADS=runs and (not row_programs or columns % 4 == 0),
    )


def _row(o: Operands, build: Build, rule: MergeRule, seed: int, coefficients: int, words: int) -> TensorRow:
    """Return what the kernels read of a tensor."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    numel = o.param.numel()
    sparse = o.tau if isinstance(o.tau, SparseTensor) else None
    return TensorRow(
        param=address(o.param),
        grad=address(o.grad),
        exp_avg=address(o.exp_avg),
        exp_avg_sq=address(o.exp_avg_sq),
        step=address(o.step),
        tau=address(sparse.mask if sparse else o.tau),
        tau_values=address(sparse.values) if sparse else 0,
        tau_offsets=address(sparse.offsets) if sparse else 0,
        full=address(o.tau_dense),
        anchor=address(o.anchor.weights) if build.ANCHOR and o.anchor else 0,
        anchor_decay=address(o.anchor.decay) if build.ANCHOR and o.anchor else 0,
        master=address(o.master),
        numel=numel,
        columns=max(1, o.param.shape[1:].numel()) if build.PROJECT_ROWS else numel,
        coefficients=coefficients,
        **o.shard._asdict(),
        tensor_id=o.tensor_id,
        # The table is signed; the kernel reads the 64 bits as they are.
        seed=(seed + 2**63) % 2**64 - 2**63,
        threshold=keep_threshold(rule.reserve_rate),
        rank=kept_count(numel, rule.reserve_rate),
        words=words,
    )


class Launch:
    """The sequence of kernels that steps all tensors of one `Build`."""

    def __init__(
        self,
        build: Build,
        members: list[int],
        operands: Sequence[Operands],
        rule: MergeRule,
        seed: int,
        block: int,
        thresholds: dict[int, Tensor],
    ) -> None:
        self.members = members
        self.addresses = [o.param.data_ptr() for o in operands]
        self._build = build
        self._block = block
        self._shares = 1.0 - rule.project_strength, rule.project_strength
        self._device = device = operands[0].param.device
        numels = [o.param.numel() for o in operands]
        chunks = [tables.chunk_count(numel, block) for numel in numels]
        heights = [o.param.shape[0] if build.PROJECT_ROWS else 1 for o in operands]
        self._coefficients = sum(heights)
        words = [count * block // 32 for count in chunks]
        self._words = sum(words)
        firsts = zip(accumulate(heights, initial=0), accumulate(words, initial=0), strict=True)
        table = [
            _row(o, build, rule, seed, coefficients, first_word)
            for o, (coefficients, first_word) in zip(operands, firsts, strict=False)
        ]
        self._tensors = torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
        self._chunks = tables.program_table(tuple(numels), block, device)
        self._rows = tables.program_table(tuple(heights), 1, device) if build.PROJECT_ROWS else self._chunks
        adds_up = build.STATS or (build.PROJECT is not None and not build.PROJECT_ROWS)
        self._add_up = Reduction(chunks if adds_up else [], device)
        self.thresholds: Tensor | None = None
        if build.RANKED:
            unknown = torch.full((), sparsify.LARGEST.value, dtype=torch.int32, device=device)
            self.thresholds = torch.stack([thresholds.get(address, unknown) for address in self.addresses])
            self._counts = torch.zeros(len(operands), sparsify.BINS.value, dtype=torch.int64, device=device)
            self._groups = tables.program_table(tuple(numels), block * SEARCH_BLOCKS.value, device)

    def run(self, constants: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor] | None:
        """Take the step; return the sums of what merged, fp32 `[T, 4]` and int64 `[T, 5]`, where they are collected."""
        with torch.cuda.device_of(self._tensors):
            table = self._scalars(constants, hyper)
            coefficients = self._project(table)
            search, words = self._search(table, coefficients)
            return self._step(table, coefficients, search, words)

    def _scalars(self, constants: Tensor, hyper: Hyper) -> Tensor:
        table = torch.empty(len(self._tensors), scalars.COLUMNS.value, dtype=torch.float32, device=self._device)
        own = (
            value.to(self._device, torch.float64) if isinstance(value, Tensor) else constants[column:]
            for column, value in enumerate((hyper.lr, hyper.grad_factor, hyper.found_inf))
        )
        scalars.scalars_kernel[(len(table),)](
            self._tensors, constants, *own, table, num_warps=1, enable_fp_fusion=False
        )
        return table

    def _project(self, table: Tensor) -> Tensor:
        """Return fp32 `[coefficients, 2]`, <x, tau> and <tau, tau>, where a pass of its own computes them."""
        build = self._build
        if build.PROJECT is None or build.ROW_PROGRAMS:
            return table
        out = table.new_empty(self._coefficients if build.PROJECT_ROWS else len(self._chunks), 2)
        self._launch(project_kernel, self._rows, self._rows, self._tensors, table, out, BLOCK=self._block)
        return out if build.PROJECT_ROWS else self._add_up(out)

    def _search(self, table: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Find the thresholds of a ranked F; return the state of the search and the marks."""
        if self.thresholds is None:
            return self._tensors, self._chunks
        words, patterns = (self._chunks.new_empty(self._words) for _ in range(2))
        search = self._tensors.new_empty(len(self._tensors), sparsify.SEARCH_COLUMNS.value)
        self._launch(
            mark_kernel, self._chunks, self._chunks, self._tensors, table, coefficients, self.thresholds, self._counts,
            words, patterns, *self._shares, BLOCK=self._block,
        )  # fmt: skip
        for finished in range(sparsify.ROUNDS + 1):
            if finished:
                self._launch(
                    count_kernel, self._groups, self._groups, self._tensors, table, coefficients, self._counts, search,
                    patterns, *self._shares, BLOCK=self._block,
                )  # fmt: skip
            self._launch(
                search_kernel, self._tensors, self._tensors, table, self.thresholds, self._counts, search,
                FIRST=finished == 0, LAST=finished == sparsify.ROUNDS, BLOCK=self._block,
            )  # fmt: skip
        return search, words

    def _step(self, table: Tensor, coefficients: Tensor, search: Tensor, words: Tensor) -> tuple[Tensor, Tensor] | None:
        stats = self._build.STATS
        products = table.new_empty(len(self._chunks), merge_stats.PRODUCTS.value) if stats else table
        counts = self._tensors.new_zeros(len(table), merge_stats.COUNTS.value) if stats else self._tensors
        programs = self._rows if self._build.ROW_PROGRAMS else self._chunks
        thresholds = self._chunks if self.thresholds is None else self.thresholds
        self._launch(
            merging_adamw_kernel, programs, programs, self._tensors, table, coefficients, thresholds, search, words,
            products, counts, *self._shares, BLOCK=self._block,
        )  # fmt: skip
        return (self._add_up(products), counts) if stats else None

    def _launch(self, kernel: Any, programs: Tensor, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel with as many programs as a table has rows."""
        kernel[(len(programs),)](
            *arguments, BUILD=self._build, **constants, num_warps=tables.NUM_WARPS, enable_fp_fusion=False
        )


class Plan:
    """What repeated steps of the same tensors keep on a device: tables, compiled forms, and the last thresholds."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._tables: tables.Remembered[list[Launch]] = tables.Remembered()
        self._constants: tables.Remembered[Tensor] = tables.Remembered()

    def launches(
        self, operands: Sequence[Operands], rule: MergeRule, seed: int, stats: bool, block: int
    ) -> list[Launch]:
        """Return the launches of these tensors, made again if anything about them has changed."""

        def make() -> list[Launch]:
            groups: dict[Build, list[int]] = {}
            for index, o in enumerate(operands):
                groups.setdefault(_build(o, rule, stats), []).append(index)
            thresholds = {
                address: launch.thresholds[row]
                for launch in self._launches
                if launch.thresholds is not None
                for row, address in enumerate(launch.addresses)
            }
            return [
                Launch(build, members, [operands[i] for i in members], rule, seed, block, thresholds)
                for build, members in groups.items()
            ]

        self._launches = self._tables.get((rule, seed, stats, block, [_identity(o) for o in operands]), make)
        return self._launches

    def constants(self, hyper: Hyper, device: torch.device) -> Tensor:
        """Return the hyper-parameters that are numbers, fp64 on the device; copied there only when they change."""
        numbers = scalars.constants(hyper)
        return self._constants.get(
            numbers, lambda: torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
        )


def _identity(o: Operands) -> tuple[Any, ...]:
    """Return all that the tables of a tensor depend on."""
    sparse = (o.tau.mask, o.tau.values) if isinstance(o.tau, SparseTensor) else (o.tau,)
    every = (o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.step, *sparse, o.tau_dense, *(o.anchor or ()), o.master)
    tensors = [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in every]
    return o.param.shape, o.tensor_id, o.shard, tensors


class PreparedLaunches(NamedTuple):
    """A step of tensors on one device that can be taken; nothing is changed yet."""

    operands: Sequence[Operands]
    rule: MergeRule
    hyper: Hyper
    seed: int
    stats: bool
    block: int
    straight: list[int]  # the contiguous ones, which the launches step
    constants: Tensor
    launches: list[Launch]


def prepare(
    operands: Sequence[Operands],
    rule: MergeRule,
    hyper: Hyper,
    *,
    seed: int,
    stats: bool = False,
    plan: Plan | None = None,
    block: int = tables.DEFAULT_BLOCK,
) -> PreparedLaunches:
    """Make ready to step tensors that lie on one device, in one sequence of launches for all that share a `Build`.

    Tensors that are not contiguous are stepped as contiguous copies, one at a time.

    Args:
        operands: of T tensors.
        rule: the row of the table of methods.
        hyper: what the scalars are derived from; a tensor among them is never read by the host.
        seed: key of the random numbers.
        stats: also add up what is merged.
        plan: what the last call with these tensors has left.
        block: elements per program, a multiple of 1024.

    Raises:
        RuntimeError: for what a CUDA graph that is captured just now cannot hold.
    """
    straight = [i for i, o in enumerate(operands) if all(t.is_contiguous() for t in _dense(o))]
    if len(straight) < len(operands) and tables.capturing():
        raise RuntimeError("a CUDA graph cannot capture a step of tensors that are not contiguous; make them so")
    device = operands[0].param.device
    if device.type != "cpu":
        # The host reads its own tensors; to copy them would wait for the device.
        on_host = {
            field: float(value)
            for field, value in hyper._asdict().items()
            if isinstance(value, Tensor) and value.device.type == "cpu"
        }
        hyper = hyper._replace(**on_host)
    plan = plan or Plan()
    constants = plan.constants(hyper, device)
    launches = plan.launches([operands[i] for i in straight], rule, seed, stats, block)
    return PreparedLaunches(operands, rule, hyper, seed, stats, block, straight, constants, launches)


def run(prepared: PreparedLaunches) -> list[MergeSums | None]:
    """Take a prepared step; mutates the operands as `Operands` says.

    Returns:
        T sums if asked for, else T times None; None for tensors without a delta. They mean something only where a
        step has merged.
    """
    operands, straight = prepared.operands, prepared.straight
    gathered: list[MergeSums | None] = [None] * len(operands)
    for launch in prepared.launches:
        sums = launch.run(prepared.constants, prepared.hyper)
        for row, member in enumerate(launch.members):
            gathered[straight[member]] = sums and MergeSums(*sums[0][row].unbind(), *sums[1][row].unbind())
    for i in set(range(len(operands))) - set(straight):
        gathered[i] = _step_copy(operands[i], prepared)
    return gathered


def _dense(o: Operands) -> list[Tensor]:
    """Return the tensors that must be contiguous."""
    dense = (o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.tau, o.tau_dense, o.anchor and o.anchor.weights, o.master)
    return [tensor for tensor in dense if isinstance(tensor, Tensor)]


def _step_copy(o: Operands, step: PreparedLaunches) -> MergeSums | None:
    """Step a contiguous copy of a tensor and copy back what is mutated."""

    def straight(tensor: Any) -> Any:
        return tensor.contiguous() if isinstance(tensor, Tensor) else tensor

    copy = Operands(*map(straight, o))
    if o.anchor is not None:
        copy = copy._replace(anchor=Anchor(o.anchor.weights.contiguous(), o.anchor.decay))
    (sums,) = run(prepare([copy], step.rule, step.hyper, seed=step.seed, stats=step.stats, block=step.block))
    for mine, theirs in zip(_written(o), _written(copy), strict=True):
        if mine is not theirs:
            mine.copy_(theirs)
    return sums


def _written(o: Operands) -> list[Tensor]:
    """Return the tensors of the parameter's shape that a step mutates."""
    written = (o.param, o.exp_avg, o.exp_avg_sq, o.anchor and o.anchor.weights, o.master)
    return [tensor for tensor in written if isinstance(tensor, Tensor)]
