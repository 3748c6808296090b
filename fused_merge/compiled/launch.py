"""From lists of tensors to passes over their blocks, as `fused_merge.kernels.launch` does for a GPU.

A step is a sequence of passes over all tensors: what the projection needs; for a ranked F the search for thresholds;
the step itself. What a pass adds up over sharded tensors is yielded before the next one begins. The tables are kept,
with the last thresholds, in a `Plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_merge.compiled import merge_stats, passes
from fused_merge.compiled.layout import ENTRIES, ENTRY
from fused_merge.compiled.memory import BLOCK
from fused_merge.compiled.products import sum_pass
from fused_merge.compiled.tables import address, entry, finds_rows, projects_rows
from fused_merge.compiled.threads import Blocks, Crew
from fused_merge.compiled.thresholds import Thresholds
from fused_merge.eager.merge_stats import MergeSums
from fused_merge.eager.operands import Operands
from fused_merge.eager.scalars import Hyper, derive_scalars
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import RANKED, kept_count
from fused_merge.eager.sums import tree_sum
from fused_merge.lockstep import LocalSum, Steps
from fused_merge.methods import MergeRule


class Launch:
    """The passes that step some tensors by one rule."""

    def __init__(self, operands: Sequence[Operands], rule: MergeRule, seed: int, *, stats: bool, decays: bool) -> None:
        self.names = [o.name for o in operands]
        # The table holds addresses. All other tensors are looked at before each step; these have no owner besides.
        self._deltas = [(o.tau, o.tau_dense) for o in operands]
        self._rule, self._stats, self._shards = rule, stats, [o.shard for o in operands]
        entries = [entry(o, rule, seed=seed, stats=stats, decays=decays) for o in operands]
        self.table = np.array(entries, np.int64).reshape(len(entries), ENTRIES)
        self._numels = [o.param.numel() for o in operands]
        merged = [i for i, o in enumerate(operands) if o.tau is not None]
        self.thresholds: Thresholds | None = None
        skips = self.table[:, ENTRY.skips] != 0
        if rule.update in RANKED and rule.reserve_rate < 1.0:
            ranks = [kept_count(shard.numel, rule.reserve_rate) for shard in self._shards]
            self.thresholds = Thresholds(self.table, merged, ranks, self._shards)
            self._listed = Blocks.of([i for i in merged if skips[i]], self._numels)
            self._whole = Blocks.of([i for i, o in enumerate(operands) if o.tau is None or not skips[i]], self._numels)
        else:
            self._listed, self._whole = Blocks.of([], self._numels), Blocks.of(range(len(operands)), self._numels)
        # Of tensors that are projected, but for those whose rows are found on the way: rows, and blocks of one.
        own = [i for i in merged if rule.project is not None and not finds_rows(operands[i], rule)]
        heights = {i: operands[i].param.shape[0] if projects_rows(operands[i], rule) else 1 for i in own}
        widths = -(-self.table[:, ENTRY.row_length] // BLOCK)
        self._projected = Blocks.of(own, self._numels, [heights.get(i, 0) * int(x) for i, x in enumerate(widths)])
        # Where the rows of each begin, and where in two planes of nodes the blocks of each row.
        self._rows = Blocks.of(own, self._numels, [heights.get(i, 0) for i in range(len(operands))])
        widths_of_rows = np.repeat(widths[self._rows.numbers], np.diff(self._rows.firsts))
        self._nodes = np.concatenate(([0], np.tile(widths_of_rows, 2).cumsum()))

    def take_over(self, last: Launch) -> None:
        """Begin with the thresholds that the launch of the last step has left."""
        if self.thresholds is not None and last.thresholds is not None:
            self.thresholds.take_over(
                last.thresholds, dict(zip(last.names, range(len(last.names)), strict=True)), self.names
            )

    def read_from(self, grads: Sequence[Tensor | None]) -> None:
        """Tell the table where the gradients of the next step lie; nothing else about them may have changed."""
        read = [grad if grad is None else grad.contiguous() for grad in grads]
        self.table[:, ENTRY.grad] = [address(grad) for grad in read]
        # Of what is contiguous there are no copies, and nothing that the optimizer would keep alive.
        self._copies = [copy for copy, grad in zip(read, grads, strict=True) if copy is not grad]

    def run(self, scalars: np.ndarray, crew: Crew) -> Steps[list[MergeSums | None]]:
        """Take the step; return what was merged, where it is collected."""
        along = yield from self._project(scalars, crew)
        kths = np.zeros(len(scalars), np.int32)
        if self.thresholds is not None:
            kths = yield from self.thresholds.find(scalars, crew)
        told = {"table": self.table, "scalars": scalars, "tensors": len(scalars), "kths": kths}
        products = np.zeros((self._whole.count if self._stats else 0, merge_stats.PRODUCTS), np.float32)
        counts = np.zeros((self._whole.threads, len(scalars), merge_stats.COUNTS), np.int64)
        crew.over(self._whole, passes.step_pass, **told, products=products, counts=counts)
        if self.thresholds is not None:
            crew.over(self._listed, passes.finish_pass, **told, **self.thresholds.list._asdict())
        crew.all(passes.count_steps, **told)
        self._copies.clear()
        del along
        if not self._stats:
            return [None] * len(scalars)
        sums = self._sums(torch.from_numpy(products), torch.from_numpy(counts.sum(0)))
        yield [LocalSum(x, shard.groups) for own, shard in zip(sums, self._shards, strict=True) if own for x in own]
        return sums

    def _project(self, scalars: np.ndarray, crew: Crew) -> Steps[Tensor | None]:
        """Find what the projection needs, and tell the table where it lies; keep it as long as that is used."""
        blocks, rows = self._projected, self._rows
        if len(blocks.numbers) == 0:
            return None
        nodes, sums = np.empty((2, blocks.count), np.float32), np.empty((2, rows.count), np.float32)
        crew.over(blocks, passes.products_pass, table=self.table, scalars=scalars, products=nodes)
        each = Blocks(blocks.numbers, np.arange(2 * rows.count + 1), blocks.elements)
        crew.over(each, sum_pass, products=nodes, own_firsts=self._nodes, values=sums)
        along = torch.from_numpy(np.ascontiguousarray(sums.T))
        self.table[blocks.numbers, ENTRY.along] = along.data_ptr() + 8 * rows.firsts[:-1]
        extent = self._rule.project_over
        groups = [self._shards[i].summed_over(extent) for i in blocks.numbers]
        parts = zip(rows.firsts[:-1], rows.firsts[1:], groups, strict=True)
        yield [LocalSum(along[first:end], group) for first, end, group in parts if group]
        return along

    def _sums(self, products: Tensor, counts: Tensor) -> list[MergeSums | None]:
        """Return what is added up over each tensor that merges."""
        sums: list[MergeSums | None] = [None] * len(counts)
        parts = torch.split(products, np.diff(self._whole.firsts).tolist())
        for i, own in zip(self._whole.numbers.tolist(), parts, strict=True):
            if self.table[i, ENTRY.stats]:
                sums[i] = MergeSums(*tree_sum(own.t()).unbind(), *counts[i].unbind())
        return sums


class Plan:
    """What repeated steps of the same tensors keep: tables, the last thresholds, and room for threads."""

    def __init__(self) -> None:
        self.crew = Crew()
        self._made_for: Any = None
        self._launch: Launch | None = None

    def launch(self, operands: Sequence[Operands], rule: MergeRule, seed: int, *, stats: bool, decays: bool) -> Launch:
        """Return the launch of some tensors, made again if anything has changed but where gradients lie."""
        made_for = rule, seed, stats, decays, [_identity(o) for o in operands]
        if self._launch is None or self._made_for != made_for:
            launch = Launch(operands, rule, seed, stats=stats, decays=decays)
            if self._launch is not None:
                launch.take_over(self._launch)
            self._launch, self._made_for = launch, made_for
        self._launch.read_from([o.grad for o in operands])
        return self._launch


def _identity(o: Operands) -> tuple[Any, ...]:
    """Return all that the tables of a tensor depend on, but for the address of its gradient."""
    sparse = (o.tau.mask, o.tau.values) if isinstance(o.tau, SparseTensor) else (o.tau,)
    every = (o.param, o.exp_avg, o.exp_avg_sq, o.step, *sparse, o.tau_dense, *(o.anchor or ()), o.master)
    tensors = [(x.data_ptr(), x.dtype) if isinstance(x, Tensor) else x for x in every]
    return o.param.shape, o.tensor_id, o.shard, o.grad is not None and o.grad.dtype, tensors


class PreparedLaunch(NamedTuple):
    """A step that can be taken; nothing is changed yet."""

    launch: Launch
    hyper: Hyper
    crew: Crew


def prepare(
    operands: Sequence[Operands], rule: MergeRule, hyper: Hyper, *, seed: int, stats: bool, plan: Plan
) -> PreparedLaunch:
    """Make ready to step tensors on the CPU, contiguous but for gradients; `plan` is what the last call has left."""
    launch = plan.launch(operands, rule, seed, stats=stats, decays=hyper.weight_decay != 0)
    return PreparedLaunch(launch, _on_host(hyper), plan.crew)


def again(last: PreparedLaunch, grads: Sequence[Tensor], hyper: Hyper) -> PreparedLaunch | None:
    """Make ready to take a step again, with gradients that lie elsewhere; None if the tables are to be made again."""
    if (hyper.weight_decay != 0) != (last.hyper.weight_decay != 0):
        return None
    last.launch.read_from(grads)
    return last._replace(hyper=_on_host(hyper))


def _on_host(hyper: Hyper) -> Hyper:
    """Return hyper-parameters as numbers."""
    tensors: dict[str, Any] = {field: float(x) for field, x in hyper._asdict().items() if isinstance(x, Tensor)}
    return hyper._replace(**tensors)


def run(prepared: PreparedLaunch) -> Steps[list[MergeSums | None]]:
    """Take a prepared step; the operands are mutated, with their step counts.

    Returns:
        T sums if asked for, else T times None; None for tensors without a delta. They mean something only where a step
        has merged.
    """
    launch, hyper, crew = prepared
    steps = np.empty(len(launch.table), np.float32)
    crew.all(passes.read_steps, table=launch.table, tensors=len(steps), products=steps)
    steps += 1
    different = sorted(set(steps.tolist()))
    scalars = np.array([derive_scalars(step, hyper) for step in different], np.float64).astype(np.float32)
    return (yield from launch.run(scalars[np.searchsorted(different, steps)], crew))
