"""From lists of tensors to launches: which tensors share a compiled form, and the tables that describe them.

A step is a sequence of passes over the tensors of one `Specialization`: the scalars; what the projection needs; for a
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
from fused_merge.eager.sparsify import RANKED, kept_count
from fused_merge.kernels import kth_largest, layout, merge_stats, scalars
from fused_merge.kernels.layout import Programs, Specialization, TensorEntry
from fused_merge.kernels.merging_adamw import merging_adamw_kernel
from fused_merge.kernels.projection import ROW_BLOCKS, project_kernel
from fused_merge.kernels.sums import Reduction
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
    if _projects_rows(o, rule) and o.param.shape[1:].numel() > layout.DEFAULT_BLOCK * ROW_BLOCKS.value:
        return f"rows of {o.param.shape[1:].numel()} elements are too long to project; use project_over='tensor'"
    return None


def _projects_rows(o: Operands, rule: MergeRule) -> bool:
    """Return whether a tensor is projected over rows and has more than one."""
    projects = rule.project is not None and rule.project_over == "rows" and o.tau is not None
    return projects and o.param.ndim > 1 and o.param.shape[0] > 1 and o.param.numel() > 0


def _specialization(o: Operands, rule: MergeRule, stats: bool, block: int) -> Specialization:
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
    rows = _projects_rows(o, rule)
    row_programs = rows and not ranked and not stats
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


def _entry(
    o: Operands, spec: Specialization, rule: MergeRule, seed: int, first_coefficient: int, first_block: int
) -> TensorEntry:
    """Return what the kernels know of a tensor."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    numel = o.param.numel()
    sparse = o.tau if isinstance(o.tau, SparseTensor) else None
    return TensorEntry(
        param=address(o.param),
        grad=address(o.grad),
        exp_avg=address(o.exp_avg),
        exp_avg_sq=address(o.exp_avg_sq),
        step=address(o.step),
        tau=address(sparse.mask if sparse else o.tau),
        tau_values=address(sparse.values) if sparse else 0,
        tau_offsets=address(sparse.offsets) if sparse else 0,
        tau_dense=address(o.tau_dense),
        anchor=address(o.anchor.weights) if spec.ANCHOR and o.anchor else 0,
        anchor_decay=address(o.anchor.decay) if spec.ANCHOR and o.anchor else 0,
        master=address(o.master),
        numel=numel,
        row_length=o.param.shape[1:].numel() if spec.PROJECT_ROWS else numel,
        first_coefficient=first_coefficient,
        first_block=first_block,
        **o.shard.elements._asdict(),
        tensor_id=o.tensor_id,
        # The table is signed; the kernel reads the 64 bits as they are.
        seed=(seed + 2**63) % 2**64 - 2**63,
        keep_threshold=keep_threshold(rule.reserve_rate),
        rank=kept_count(numel, rule.reserve_rate),
    )


class Launch:
    """The sequence of kernels that steps all tensors of one `Specialization`."""

    def __init__(
        self,
        spec: Specialization,
        members: list[int],
        operands: Sequence[Operands],
        rule: MergeRule,
        seed: int,
        thresholds: dict[int, Tensor],
    ) -> None:
        self.members = members
        self.addresses = [o.param.data_ptr() for o in operands]
        self._spec = spec
        device = operands[0].param.device
        numels = tuple(o.param.numel() for o in operands)
        heights = [o.param.shape[0] if spec.PROJECT_ROWS else 1 for o in operands]
        blocks = [layout.block_count(numel, spec.BLOCK) for numel in numels]
        self._coefficients, self._blocks = sum(heights), sum(blocks)
        firsts = zip(accumulate(heights, initial=0), accumulate(blocks, initial=0), strict=True)
        entries = [_entry(o, spec, rule, seed, *first) for o, first in zip(operands, firsts, strict=False)]
        self._tensors = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
        self._programs = layout.split_programs(numels, spec.BLOCK, device)
        self._row_programs = _row_programs(operands, spec.BLOCK, device) if spec.PROJECT_ROWS else self._programs
        adds_up = spec.STATS or (spec.PROJECT is not None and not spec.PROJECT_ROWS)
        self._add_up = Reduction(blocks if adds_up else [], device)
        self.thresholds: Tensor | None = None
        if spec.RANKED:
            unknown = torch.full((), kth_largest.LARGEST.value, dtype=torch.int32, device=device)
            self.thresholds = torch.stack([thresholds.get(address, unknown) for address in self.addresses])
            self._counts = torch.zeros(len(operands), kth_largest.BINS.value, dtype=torch.int64, device=device)
            self._groups = layout.split_programs(numels, spec.BLOCK * kth_largest.SEARCH_BLOCKS.value, device)

    def run(self, hyper_entry: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor] | None:
        """Take the step; return the sums of what merged, fp32 `[T, 4]` and int64 `[T, 5]`, where they are collected."""
        with torch.cuda.device_of(self._tensors):
            table = self._scalars(hyper_entry, hyper)
            coefficients = self._project(table)
            search, mark_bits = self._search(table, coefficients)
            return self._step(table, coefficients, search, mark_bits)

    def _scalars(self, hyper_entry: Tensor, hyper: Hyper) -> Tensor:
        device = self._tensors.device
        table = torch.empty(len(self._tensors), layout.SCALAR.count, dtype=torch.float32, device=device)
        own = []
        for name in scalars.OWN:
            x, column = getattr(hyper, name), getattr(scalars.HYPER, name)
            own.append(x.to(device, torch.float64) if isinstance(x, Tensor) else hyper_entry[column:])
        scalars.scalars_kernel[(len(table),)](
            self._tensors, hyper_entry, *own, table, num_warps=1, enable_fp_fusion=False
        )
        return table

    def _project(self, table: Tensor) -> Tensor:
        """Return fp32 `[coefficients, 2]`, <x, tau> and <tau, tau>, where a pass of its own computes them."""
        spec = self._spec
        if spec.PROJECT is None or spec.ROW_PROGRAMS:
            return table
        out = table.new_empty(self._coefficients if spec.PROJECT_ROWS else self._blocks, 2)
        layout.launch(project_kernel, self._row_programs, self._tensors, table, out, spec=spec)
        return out if spec.PROJECT_ROWS else self._add_up(out)

    def _search(self, table: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Find the thresholds of a ranked F; return the state of the search and the marks."""
        if self.thresholds is None:
            return self._tensors, self._programs.ends
        tensors, counts, spec = self._tensors, self._counts, self._spec
        mark_bits, patterns = (self.thresholds.new_empty(self._blocks * spec.BLOCK // 32) for _ in range(2))
        search = tensors.new_empty(len(tensors), kth_largest.SEARCH.count)
        layout.launch(
            kth_largest.mark_kernel, self._programs, tensors, table, coefficients, self.thresholds, counts, mark_bits,
            patterns, spec=spec,
        )  # fmt: skip
        for finished in range(kth_largest.ROUNDS + 1):
            if finished:
                layout.launch(
                    kth_largest.count_kernel, self._groups, tensors, table, coefficients, counts, search, patterns,
                    spec=spec,
                )  # fmt: skip
            kth_largest.search_kernel[(len(tensors),)](
                tensors, table, self.thresholds, counts, search, SPEC=spec,
                FIRST=finished == 0, LAST=finished == kth_largest.ROUNDS,
                num_warps=layout.NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return search, mark_bits

    def _step(
        self, table: Tensor, coefficients: Tensor, search: Tensor, mark_bits: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        stats = self._spec.STATS
        products = table.new_empty(self._blocks, merge_stats.PRODUCTS.value) if stats else table
        counts = self._tensors.new_zeros(len(table), merge_stats.COUNTS.value) if stats else self._tensors
        programs = self._row_programs if self._spec.ROW_PROGRAMS else self._programs
        thresholds = mark_bits if self.thresholds is None else self.thresholds
        layout.launch(
            merging_adamw_kernel, programs, self._tensors, table, coefficients, thresholds, search, mark_bits,
            products, counts, spec=self._spec,
        )  # fmt: skip
        return (self._add_up(products), counts) if stats else None


def _row_programs(operands: Sequence[Operands], block: int, device: torch.device) -> Programs:
    """Return a program for each row; those of a tensor whose rows are whole blocks need no bounds."""
    table = layout.program_table(tuple(o.param.shape[0] for o in operands), 1, torch.device("cpu"))
    whole = torch.tensor([o.param.shape[1:].numel() % block == 0 for o in operands])[table[:, 0]]
    return Programs(*(table[chosen].to(device, non_blocking=True) for chosen in (whole, ~whole)))


class Plan:
    """What repeated steps of the same tensors keep on a device: tables, compiled forms, and the last thresholds."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self._tables: layout.Remembered[list[Launch]] = layout.Remembered()
        self._hyper: layout.Remembered[Tensor] = layout.Remembered()

    def launches(
        self, operands: Sequence[Operands], rule: MergeRule, seed: int, stats: bool, block: int
    ) -> list[Launch]:
        """Return the launches of these tensors, made again if anything about them has changed."""

        def make() -> list[Launch]:
            groups = layout.group(_specialization(o, rule, stats, block) for o in operands)
            thresholds = {
                address: threshold
                for launch in self._launches
                if launch.thresholds is not None
                for address, threshold in zip(launch.addresses, launch.thresholds, strict=True)
            }
            return [
                Launch(spec, members, [operands[i] for i in members], rule, seed, thresholds)
                for spec, members in groups.items()
            ]

        self._launches = self._tables.get((rule, seed, stats, block, [_identity(o) for o in operands]), make)
        return self._launches

    def hyper_entry(self, hyper: Hyper, rule: MergeRule, device: torch.device) -> Tensor:
        """Return the numbers that a step depends on, fp64 on the device; copied there only when they change."""
        entry = scalars.hyper_entry(hyper, rule.project_strength)
        return self._hyper.get(entry, lambda: torch.tensor(entry, dtype=torch.float64).to(device, non_blocking=True))


def _identity(o: Operands) -> tuple[Any, ...]:
    """Return all that the tables of a tensor depend on."""
    sparse = (o.tau.mask, o.tau.values) if isinstance(o.tau, SparseTensor) else (o.tau,)
    every = (o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.step, *sparse, o.tau_dense, *(o.anchor or ()), o.master)
    tensors = [(x.data_ptr(), x.dtype) if isinstance(x, Tensor) else x for x in every]
    return o.param.shape, o.tensor_id, o.shard, tensors


class PreparedLaunches(NamedTuple):
    """A step of tensors on one device that can be taken; nothing is changed yet."""

    operands: Sequence[Operands]
    rule: MergeRule
    hyper: Hyper
    seed: int
    stats: bool
    block: int
    contiguous: list[int]  # those, which the launches step
    hyper_entry: Tensor
    launches: list[Launch]


def prepare(
    operands: Sequence[Operands],
    rule: MergeRule,
    hyper: Hyper,
    *,
    seed: int,
    stats: bool = False,
    plan: Plan | None = None,
    block: int = layout.DEFAULT_BLOCK,
) -> PreparedLaunches:
    """Make ready to step tensors on one device, in one sequence of launches for all that share a `Specialization`.

    Tensors that are not contiguous are stepped as contiguous copies, one at a time.

    Args:
        operands: of T tensors.
        rule: how they merge.
        hyper: what the scalars are derived from; a tensor among them is never read by the host.
        seed: key of the random numbers.
        stats: also add up what is merged.
        plan: what the last call with these tensors has left.
        block: elements per program, a multiple of 1024.

    Raises:
        RuntimeError: for what a CUDA graph that is captured just now cannot hold.
    """
    contiguous = [i for i, o in enumerate(operands) if all(t.is_contiguous() for t in _dense(o))]
    if len(contiguous) < len(operands) and layout.capturing():
        raise RuntimeError("a CUDA graph cannot capture a step of tensors that are not contiguous; make them so")
    device = operands[0].param.device
    if device.type != "cpu":
        # The host reads its own tensors; to copy them would wait for the device.
        tensors = {field: x for field, x in hyper._asdict().items() if isinstance(x, Tensor)}
        hyper = hyper._replace(**{field: float(x) for field, x in tensors.items() if x.device.type == "cpu"})
    plan = plan or Plan()
    hyper_entry = plan.hyper_entry(hyper, rule, device)
    launches = plan.launches([operands[i] for i in contiguous], rule, seed, stats, block)
    return PreparedLaunches(operands, rule, hyper, seed, stats, block, contiguous, hyper_entry, launches)


def run(prepared: PreparedLaunches) -> list[MergeSums | None]:
    """Take a prepared step; mutates the operands as `Operands` says.

    Returns:
        T sums if asked for, else T times None; None for tensors without a delta. They mean something only where a
        step has merged.
    """
    operands, contiguous = prepared.operands, prepared.contiguous
    gathered: list[MergeSums | None] = [None] * len(operands)
    for launch in prepared.launches:
        sums = launch.run(prepared.hyper_entry, prepared.hyper)
        for position, member in enumerate(launch.members):
            own = sums and MergeSums(*sums[0][position].unbind(), *sums[1][position].unbind())
            gathered[contiguous[member]] = own
    for i in set(range(len(operands))) - set(contiguous):
        gathered[i] = _step_copy(operands[i], prepared)
    return gathered


def _dense(o: Operands, *, written_only: bool = False) -> list[Tensor]:
    """Return the tensors of the parameter's shape: those that a step writes, and those that it reads."""
    written = (o.param, o.exp_avg, o.exp_avg_sq, o.anchor and o.anchor.weights, o.master)
    read = () if written_only else (o.grad, o.tau, o.tau_dense)
    return [x for x in (*written, *read) if isinstance(x, Tensor)]


def _step_copy(o: Operands, step: PreparedLaunches) -> MergeSums | None:
    """Step a contiguous copy of a tensor and copy back what is mutated."""

    def contiguous(x: Any) -> Any:
        if isinstance(x, Anchor):
            return Anchor(*map(contiguous, x))
        return x.contiguous() if isinstance(x, Tensor) else x

    copy = Operands(*map(contiguous, o))
    (sums,) = run(prepare([copy], step.rule, step.hyper, seed=step.seed, stats=step.stats, block=step.block))
    for original, stepped in zip(_dense(o, written_only=True), _dense(copy, written_only=True), strict=True):
        if original is not stepped:
            original.copy_(stepped)
    return sums
