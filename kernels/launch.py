"""From lists of tensors to launches: which tensors share a compiled form, and the tables that describe them.

A step is a sequence of passes over the tensors of one `Specialization`: the scalars; what the projection needs; for a
ranked F the marks and the rounds of the search; the step itself. Everything is decided on the device, so that the host
never waits and a step can be captured in a CUDA graph. What a pass adds up over sharded tensors is yielded before the
next one begins, to be added up over the processes. The tables are kept, with the last thresholds, in a `Plan`, and made
again when an address or an option changes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_merge.eager.merge_stats import MergeSums
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.operands import Operands
from fused_merge.eager.philox import keep_threshold
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import kept_count
from fused_merge.kernels import kth_largest, layout, merge_stats, scalars
from fused_merge.kernels.layout import Programs, Specialization, TensorEntry
from fused_merge.kernels.merging_adamw import WALK_BLOCKS, merging_adamw_kernel, walk_kernel
from fused_merge.kernels.projection import project_kernel
from fused_merge.kernels.specialization import specialization
from fused_merge.kernels.sums import Reduction
from fused_merge.lockstep import LocalSum, Steps, side_by_side
from fused_merge.methods import MergeRule

# A sum for a tensor, by its number in the step.
Asked: TypeAlias = "tuple[int, LocalSum]"


def _entry(
    o: Operands,
    spec: Specialization,
    rule: MergeRule,
    seed: int,
    group_blocks: int,
    list_capacity: int,
    first_coefficient: int,
    first_block: int,
    first_listed: int,
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
        # A tensor without elements has a program, which must find nothing.
        row_length=o.param.shape[1:].numel() if spec.PROJECT_ROWS and numel else numel,
        first_coefficient=first_coefficient,
        first_block=first_block,
        group_blocks=group_blocks,
        first_listed=first_listed,
        list_capacity=list_capacity,
        **o.shard.elements._asdict(),
        tensor_id=o.tensor_id,
        # The table is signed; the kernel reads the 64 bits as they are.
        seed=(seed + 2**63) % 2**64 - 2**63,
        keep_threshold=keep_threshold(rule.reserve_rate),
        rank=kept_count(o.shard.numel, rule.reserve_rate),
    )


class Marks(NamedTuple):
    """What a search leaves of the elements that may be kept."""

    bits: Tensor  # int32, one for each element
    firsts: Tensor  # int64 [blocks]: where in the list of its tensor those of a block begin
    updates: Tensor  # fp32: u of those that are listed, tensor by tensor


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
        self.members = members  # the numbers of its tensors in the step
        self.addresses = [o.param.data_ptr() for o in operands]
        self._spec = spec
        device = operands[0].param.device
        numels = tuple(o.param.numel() for o in operands)
        heights = [max(1, o.param.shape[0]) if spec.PROJECT_ROWS else 1 for o in operands]
        blocks = [layout.block_count(numel, spec.BLOCK) for numel in numels]
        self._heights, self._blocks = heights, sum(blocks)
        self._shards = [o.shard for o in operands]
        self._sharded = any(shard.groups for shard in self._shards)
        group = max(1, self._blocks // kth_largest.PROGRAMS)
        capacities = [kth_largest.list_capacity(numel, rule.reserve_rate, spec) for numel in numels]
        self._listed = sum(capacities)
        firsts = zip(*(accumulate(sizes, initial=0) for sizes in (heights, blocks, capacities)), strict=True)
        entries = [
            _entry(o, spec, rule, seed, group, capacity, *first)
            for o, capacity, first in zip(operands, capacities, firsts, strict=False)
        ]
        self._tensors = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
        self._programs = layout.split_programs(numels, spec.BLOCK, device)
        self._row_programs = _row_programs(operands, spec.BLOCK, device) if spec.PROJECT_ROWS else self._programs
        adds_up = spec.STATS or (spec.PROJECT is not None and not spec.PROJECT_ROWS)
        self._add_up = Reduction(blocks if adds_up else [], device)
        self.thresholds: Tensor | None = None
        if spec.RANKED:
            unknown = torch.full((), kth_largest.LARGEST.value, dtype=torch.int32, device=device)
            self.thresholds = torch.stack([thresholds.get(address, unknown) for address in self.addresses])
            shape = kth_largest.ROUNDS.value + 1, len(operands), kth_largest.BINS.value
            self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
            self._groups = layout.split_programs(numels, spec.BLOCK * group, device)
            walked = layout.program_table(numels, spec.BLOCK * WALK_BLOCKS.value, device)
            self._walks = Programs(walked, walked[:0])

    def run(self, hyper_entry: Tensor, hyper: Hyper) -> Generator[list[Asked], None, tuple[Tensor, Tensor] | None]:
        """Take the step; return the sums of what merged, fp32 `[T, 4]` and int64 `[T, 6]`, where they are collected.

        All launches of one rule yield equally often, if only nothing, but for those without a delta, which never do.
        """
        spec = self._spec
        table = self._scalars(hyper_entry, hyper)
        coefficients = self._project(table)
        if spec.PROJECT is not None:
            # A program that owns a row has not waited for others.
            extent = "rows" if spec.PROJECT_ROWS else "tensor"
            yield [] if spec.ROW_PROGRAMS else self._ask(extent, coefficients, self._heights)
        search, marks = yield from self._search(table, coefficients)
        sums = self._step(table, coefficients, search, marks)
        if sums is not None:
            yield [asked for own in sums for asked in self._ask("tensor", own)]
        return sums

    def _ask(self, extent: str, table: Tensor, heights: Sequence[int] | None = None) -> list[Asked]:
        """Return what is to be added up of a table of local sums, with the number of the tensor that it is of.

        `heights` are the rows that each tensor has in the table; None for one each.
        """
        if not self._sharded:
            return []
        local = table.unbind() if heights is None else table.split(heights)
        return [
            (member, LocalSum(own, groups))
            for member, shard, own in zip(self.members, self._shards, local, strict=True)
            if (groups := shard.summed_over(extent))
        ]

    def _scalars(self, hyper_entry: Tensor, hyper: Hyper) -> Tensor:
        device = self._tensors.device
        table = torch.empty(len(self._tensors), layout.SCALAR.count, dtype=torch.float32, device=device)
        own = []
        for name in scalars.OWN:
            x, column = getattr(hyper, name), getattr(scalars.HYPER, name)
            own.append(x.to(device, torch.float64) if isinstance(x, Tensor) else hyper_entry[column:])
        with torch.cuda.device_of(table):
            scalars.scalars_kernel[(len(table),)](
                self._tensors, hyper_entry, *own, table, num_warps=1, enable_fp_fusion=False
            )
        return table

    def _project(self, table: Tensor) -> Tensor:
        """Return fp32 `[coefficients, 2]`, <x, tau> and <tau, tau>, where a pass of its own computes them."""
        spec = self._spec
        if spec.PROJECT is None or spec.ROW_PROGRAMS:
            return table
        out = table.new_empty(sum(self._heights) if spec.PROJECT_ROWS else self._blocks, 2)
        layout.launch(project_kernel, self._row_programs, self._tensors, table, out, spec=spec)
        return out if spec.PROJECT_ROWS else self._add_up(out)

    def _search(self, table: Tensor, coefficients: Tensor) -> Generator[list[Asked], None, tuple[Tensor, Marks]]:
        """Find the thresholds of a ranked F; return the state of the search and what may be kept."""
        tensors, spec = self._tensors, self._spec
        if self.thresholds is None:
            return tensors, Marks(self._programs.ends, tensors, table)
        counts, rounds = self._counts, kth_largest.ROUNDS.value
        marks = Marks(
            self.thresholds.new_empty(self._blocks * spec.BLOCK // 32),
            tensors.new_empty(self._blocks),
            table.new_empty(self._listed),
        )
        layout.launch(
            kth_largest.mark_kernel, self._programs, tensors, table, coefficients, self.thresholds, counts[0], *marks,
            spec=spec,
        )  # fmt: skip
        counts_here = counts[0].clone() if self._sharded else counts[0]
        # The first round looks at no earlier one.
        searches = tensors.new_empty(rounds + 1, len(tensors), kth_largest.SEARCH.count)
        yield self._ask("tensor", counts[0, :, :2])
        for number in range(rounds):
            layout.launch(
                kth_largest.count_kernel, self._groups, tensors, table, coefficients, self.thresholds, counts[number],
                counts_here, searches[number], searches[number + 1], counts[number + 1], marks.updates,
                spec=spec, FIRST=number == 0,
            )  # fmt: skip
            yield self._ask("tensor", counts[number + 1])
        with torch.cuda.device_of(tensors):
            kth_largest.threshold_kernel[(len(tensors),)](
                table, self.thresholds, searches[rounds], counts, SPEC=spec, num_warps=layout.NUM_WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
        return searches[rounds], marks

    def _step(self, table: Tensor, coefficients: Tensor, search: Tensor, marks: Marks) -> tuple[Tensor, Tensor] | None:
        spec, stats = self._spec, self._spec.STATS
        products = table.new_empty(self._blocks, merge_stats.PRODUCTS.value) if stats else table
        counts = self._tensors.new_zeros(len(table), merge_stats.COUNTS.value) if stats else self._tensors
        programs = self._groups if spec.WALKS else self._row_programs if spec.ROW_PROGRAMS else self._programs
        thresholds = marks.bits if self.thresholds is None else self.thresholds
        layout.launch(
            merging_adamw_kernel, programs, self._tensors, table, coefficients, thresholds, search, marks.bits,
            products, counts, spec=spec,
        )  # fmt: skip
        if spec.WALKS:
            # One of the two finds nothing to do for a tensor.
            layout.launch(walk_kernel, self._walks, self._tensors, table, thresholds, search, *marks, spec=spec)
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
        self,
        operands: Sequence[Operands],
        numbers: Sequence[int],
        rule: MergeRule,
        seed: int,
        stats: bool,
        block: int,
    ) -> list[Launch]:
        """Return the launches of the tensors of these numbers, made again if anything about them has changed."""
        own = [operands[number] for number in numbers]

        def make() -> list[Launch]:
            groups = layout.group(specialization(o, rule, stats, block) for o in own)
            thresholds = {
                address: threshold
                for launch in self._launches
                if launch.thresholds is not None
                for address, threshold in zip(launch.addresses, launch.thresholds, strict=True)
            }
            return [
                Launch(spec, [numbers[i] for i in members], [own[i] for i in members], rule, seed, thresholds)
                for spec, members in groups.items()
            ]

        self._launches = self._tables.get((rule, seed, stats, block, [_identity(o) for o in own], numbers), make)
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

    Tensors that are not contiguous are stepped as contiguous copies, whole ones one at a time.

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
    launches = plan.launches(operands, contiguous, rule, seed, stats, block)
    return PreparedLaunches(operands, rule, hyper, seed, stats, block, contiguous, hyper_entry, launches)


def run(prepared: PreparedLaunches) -> Steps[list[MergeSums | None]]:
    """Take a prepared step; mutates the operands as `Operands` says.

    Returns:
        T sums if asked for, else T times None; None for tensors without a delta. They mean something only where a
        step has merged.
    """
    operands = prepared.operands
    copied = sorted(set(range(len(operands))).difference(prepared.contiguous))
    # Copies of sharded tensors take part in the sums of all others, other copies need not live at the same time.
    together = [i for i in copied if operands[i].shard.groups]
    sums = yield from _run_launches(prepared, prepared.launches, together)
    for i in copied:
        if i not in together:
            sums |= yield from _run_launches(prepared, [], [i])
    return [sums.get(i) for i in range(len(operands))]


def _run_launches(
    step: PreparedLaunches, launches: Sequence[Launch], copied: Sequence[int]
) -> Steps[dict[int, MergeSums | None]]:
    """Run launches, and those for contiguous copies of some tensors, and copy back what these have mutated."""
    operands = [_contiguous(o) if i in copied else o for i, o in enumerate(step.operands)]
    if copied:
        launches = [*launches, *Plan().launches(operands, copied, step.rule, step.seed, step.stats, step.block)]
    running = side_by_side([launch.run(step.hyper_entry, step.hyper) for launch in launches])
    while True:
        try:
            asked = next(running)
        except StopIteration as end:
            sums = end.value
            break
        # How tensors share launches depends on addresses; processes must ask in the same order.
        yield [local_sum for _, local_sum in sorted(asked, key=itemgetter(0))]
    gathered: dict[int, MergeSums | None] = {}
    for launch, own in zip(launches, sums, strict=True):
        for position, number in enumerate(launch.members):
            gathered[number] = own and MergeSums(*own[0][position].unbind(), *own[1][position].unbind())
    for i in copied:
        written = zip(_dense(step.operands[i], written_only=True), _dense(operands[i], written_only=True), strict=True)
        for original, stepped in written:
            if original is not stepped:
                original.copy_(stepped)
    return gathered


def _dense(o: Operands, *, written_only: bool = False) -> list[Tensor]:
    """Return the tensors of the parameter's shape: those that a step writes, and those that it reads."""
    written = (o.param, o.exp_avg, o.exp_avg_sq, o.anchor and o.anchor.weights, o.master)
    read = () if written_only else (o.grad, o.tau, o.tau_dense)
    return [x for x in (*written, *read) if isinstance(x, Tensor)]


def _contiguous(o: Operands) -> Operands:
    """Return operands whose tensors are contiguous, copied where they are not."""

    def contiguous(x: Any) -> Any:
        if isinstance(x, Anchor):
            return Anchor(*map(contiguous, x))
        return x.contiguous() if isinstance(x, Tensor) else x

    return Operands(*map(contiguous, o))
