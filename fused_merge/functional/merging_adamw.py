"""One merged AdamW step of many tensors: checked, given to a backend, taken.

`prepare` raises all that can go wrong and changes nothing, `take` changes the tensors; `step_` is both, and so is
`merging_adamw_`, for callers whose tensors stand in parallel lists. `again` is a `prepare` that costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.merge_stats import MergeStats, MergeSums, merge_stats, merge_sums
from fused_merge.eager.merging_adamw import (
    Anchor,
    Delta,
    added_elsewhere,
    fresh_update,
    projected,
    projected_products,
    update_since_merge,
)
from fused_merge.eager.merging_adamw import merging_adamw_ as eager_merging_adamw_
from fused_merge.eager.operands import Operands, Tau
from fused_merge.eager.philox import DOMAIN_UPDATE, MaskKey
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.projection import products
from fused_merge.eager.scalars import Hyper, Scalars, derive_scalars, scalar_table
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import ELEMENTWISE, RANKED, kept_count
from fused_merge.functional import backend
from fused_merge.functional.workspace import Workspace
from fused_merge.lockstep import LocalSum, Steps, finish, kth_largest, side_by_side
from fused_merge.methods import MergeRule


class PreparedStep(NamedTuple):
    """A step that can be taken; nothing is changed yet."""

    operands: Sequence[Operands]  # none of a step that is taken again
    rule: MergeRule
    hyper: Hyper
    seed: int
    stats: bool
    shares: Sequence[tuple[backend.Share, Any]]  # what each backend serves, with the launches of those that have any

    def repeatable(self) -> PreparedStep | None:
        """Return what `again` needs of this step, and no tensor of it; None where only `prepare` will do."""
        if self.stats or [share.backend for share, _ in self.shares] != ["compiled"]:
            return None
        return self._replace(operands=())


def step_(
    operands: Sequence[Operands],
    *,
    rule: MergeRule,
    hyper: Hyper,
    seed: int = 0,
    stats: bool = False,
    workspace: Workspace | None = None,
    impl: str = "auto",
) -> list[MergeStats | None]:
    """Do what `merging_adamw_` does, for what that takes as lists in one list of operands.

    Args:
        operands: T parameters, each with all that its step reads and writes; mutated as `merging_adamw_` says.
        rule: a method of the table with its options, from `merge_rule`.
        hyper: learning rate, betas and the like; a tensor among them is never read by the host.
        seed: 64-bit key of the random numbers.
        stats: also return what the merge did; the host waits for the device.
        workspace: what calls with the same tensors share; None starts anew.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`.

    Returns:
        What `merging_adamw_` returns.

    Raises:
        ValueError, RuntimeError: as `merging_adamw_`; nothing has changed then.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Hyper, Operands, Shard, merge_rule, step_
        >>> w, m, v, tau = torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0])
        >>> step, shard = torch.zeros(()), Shard.whole(w.shape)
        >>> operands = Operands("w", w, torch.ones(2), m, v, step, tau, None, None, None, 0, shard)
        >>> rule = merge_rule("onties", reserve_rate=1.0)
        >>> hyper = Hyper(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=0.5)
        >>> (stats,) = step_([operands], rule=rule, hyper=hyper, stats=True)
        >>> w, stats.conflicts
        (tensor([ 0.5000, -0.5500]), tensor(0.5000))
    """
    workspace = workspace or Workspace()
    prepared = prepare(operands, rule=rule, hyper=hyper, seed=seed, stats=stats, workspace=workspace, impl=impl)
    return take(prepared)[0]


@torch.no_grad()
def prepare(
    operands: Sequence[Operands],
    *,
    rule: MergeRule,
    hyper: Hyper,
    seed: int,
    stats: bool,
    workspace: Workspace,
    impl: str,
) -> PreparedStep:
    """Check everything that a step needs and decide what runs it; args and errors are those of `merging_adamw_`."""
    for o in operands:
        _check(o, rule)
    hyper = _scaled(hyper, rule)
    params = [o.param for o in operands]
    # A bare ShardIndex does not know the whole.
    numels = [max(o.shard.numel, o.param.numel()) for o in operands]
    chosen = backend.choose(impl, params, numels)
    reasons: Sequence[str | None] = [None] * len(operands)
    if "triton" in chosen.values():
        from fused_merge.kernels import launch, specialization

        reasons = [specialization.why_unsupported(o, rule) for o in operands]
    if "compiled" in chosen.values():
        from fused_merge.compiled import launch as compiled_launch
        from fused_merge.compiled import tables

        reasons = [tables.why_unsupported(o, rule) for o in operands]
    shares: list[tuple[backend.Share, Any]] = []
    for share in backend.group(impl, chosen, params, [o.name for o in operands], reasons):
        launches = None
        if share.backend != "eager":
            module = launch if share.backend == "triton" else compiled_launch
            plan = workspace.keep(("step", share.backend, share.device), module.Plan)
            own = [operands[i] for i in share.members]
            launches = module.prepare(own, rule, hyper, seed=seed, stats=stats, plan=plan)
        shares.append((share, launches))
    return PreparedStep(operands, rule, hyper, seed, stats, shares)


def again(last: PreparedStep, grads: Sequence[Tensor], hyper: Hyper) -> PreparedStep | None:
    """Prepare a step once more, with other gradients and scalars; None where that takes all of `prepare`.

    Args:
        last: what was `repeatable` of the last step that was prepared of these tensors. The caller has made sure that
            they all are as they were then and lie where they lay, but for the gradients, which may lie elsewhere.
        grads: one for each of its operands.
        hyper: as for `prepare`.
    """
    from fused_merge.compiled import launch as compiled_launch

    hyper, (share, launches) = _scaled(hyper, last.rule), last.shares[0]
    launches = compiled_launch.again(launches, grads, hyper)
    return None if launches is None else last._replace(hyper=hyper, shares=[(share, launches)])


def _scaled(hyper: Hyper, rule: MergeRule) -> Hyper:
    """Return hyper-parameters with what a rule multiplies by where it drops at random."""
    return hyper._replace(update_scale=rule.scale(rule.reserve_rate), tau_scale=rule.scale(rule.tau_reserve_rate))


@torch.no_grad()
def take(*prepared: PreparedStep) -> list[list[MergeStats | None]]:
    """Take prepared steps side by side; returns for each what `merging_adamw_` does, nothing if it is taken again."""
    return finish(side_by_side([_taking(step) for step in prepared]))


def _taking(prepared: PreparedStep) -> Steps[list[MergeStats | None]]:
    operands, hyper = prepared.operands, prepared.hyper
    # Compiled code counts its own.
    steps = [operands[i].step for share, _ in prepared.shares if share.backend != "compiled" for i in share.members]
    if steps:
        torch._foreach_add_(steps, 1.0)
    serving = []
    for share, launches in prepared.shares:
        if share.backend == "compiled":
            from fused_merge.compiled import launch as compiled_launch

            serving.append(compiled_launch.run(launches))
        elif share.backend == "triton":
            from fused_merge.kernels import launch

            serving.append(launch.run(launches))
        else:
            serving.append(_step_each(share, prepared))
    sums: dict[int, MergeSums | None] = {}
    for (share, _), own in zip(prepared.shares, (yield from side_by_side(serving)), strict=True):
        sums.update(zip(share.members, own, strict=True))
    gathered = [
        merge_stats(entry, o.shard.numel) if (entry := sums[i]) is not None and _merges(o, hyper) else None
        for i, o in enumerate(operands)
    ]
    if steps:
        _take_back(steps, hyper.found_inf)
    return gathered


def merging_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    taus: Sequence[Tau],
    *,
    rule: MergeRule,
    hyper: Hyper,
    tensor_ids: Sequence[int],
    seed: int = 0,
    shards: Sequence[Shard | ShardIndex] | None = None,
    dense_taus: Sequence[Tensor | None] | None = None,
    anchors: Sequence[Anchor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    stats: bool = False,
    workspace: Workspace | None = None,
    impl: str = "auto",
) -> list[MergeStats | None]:
    """Take one merged AdamW step on every tensor: theta += F(u) ⊕ F(tau).

    Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1.

    Args:
        params: T floating tensors of any shapes and strides; mutated, unless the learning rate is 0.
        grads: T dense gradients of the same shapes.
        exp_avgs: T first moments; mutated.
        exp_avg_sqs: T second moments; mutated.
        steps: T step counts, 0-d fp32, beside the parameters; incremented.
        taus: F(tau) of each tensor: already sparsified, unscaled, dense or sparse; None for plain AdamW.
        rule: a method of the table with its options, from `merge_rule`.
        hyper: learning rate, betas and the like; a tensor among them is never read by the host.
        tensor_ids: `fused_merge.names.tensor_id` of each tensor's name, which keys its random numbers.
        seed: 64-bit key of the random numbers.
        shards: what each tensor is of the unsharded one; None where all are whole. A bare `ShardIndex` does where
            nothing is summed or ranked over the unsharded tensor.
        dense_taus: tau before F, where the rule projects and `taus` are sparsified.
        anchors: what step-K keeps between merges; mutated. None merges at every step.
        masters: fp32 copies of 16-bit parameters or int16 low halves of bf16 ones; mutated.
        names: tensor names, used in error messages; None is "tensor 0" and so on.
        stats: also return what the merge did; the host waits for the device.
        workspace: what calls with the same tensors share; None starts anew.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`.

    Returns:
        T statistics if asked for, else T times None; None for tensors without a delta or that did not merge.

    Raises:
        ValueError: for lists or shapes that do not match, or a projection onto a delta that is stored sparse. Nothing
            has changed then.
        RuntimeError: if `impl="triton"` cannot run here or does not serve a tensor. Nothing has changed then.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Hyper, merge_rule, merging_adamw_
        >>> w, tau = torch.zeros(2), torch.tensor([1.0, -1.0])
        >>> m, v, step = torch.zeros(2), torch.zeros(2), torch.zeros(())
        >>> rule = merge_rule("ondare", reserve_rate=1.0)
        >>> hyper = Hyper(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=0.5)
        >>> merging_adamw_([w], [torch.ones(2)], [m], [v], [step], [tau], rule=rule, hyper=hyper, tensor_ids=[0])
        [None]
        >>> w, step
        (tensor([ 0.4500, -0.5500]), tensor(1.))
    """
    count = len(params)
    columns: dict[str, Sequence[Any]] = {
        "names": [f"tensor {i}" for i in range(count)] if names is None else names,
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "taus": taus,
        "dense_taus": [None] * count if dense_taus is None else dense_taus,
        "anchors": [None] * count if anchors is None else anchors,
        "masters": [None] * count if masters is None else masters,
        "tensor_ids": tensor_ids,
        "shards": _shards(params, shards, needs=rule.update not in ELEMENTWISE or rule.project is not None or stats),
    }
    for column, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{column} must have one entry for each of the {count} params, got {len(values)}")
    operands = [Operands(*entry) for entry in zip(*columns.values(), strict=True)]
    return step_(operands, rule=rule, hyper=hyper, seed=seed, stats=stats, workspace=workspace, impl=impl)


def _shards(params: Sequence[Tensor], shards: Sequence[Shard | ShardIndex] | None, *, needs: bool) -> Sequence[Shard]:
    """Return a shard for each parameter, unless something `needs` all of a tensor of which only elements are known."""
    if shards is None:
        return [Shard.whole(param.shape) for param in params]
    if needs and any(isinstance(shard, ShardIndex) for shard in shards):
        raise ValueError(
            "thresholds, projections and statistics are of whole tensors; pass Shards, which know the process "
            "groups that hold it, instead of a ShardIndex"
        )
    return [shard if isinstance(shard, Shard) else Shard(shard, ()) for shard in shards]


def _check(o: Operands, rule: MergeRule) -> None:
    """Raise a `ValueError` if the tensors of a parameter do not fit one another."""
    others = (o.grad, o.exp_avg, o.exp_avg_sq, o.tau, o.tau_dense, o.master, o.anchor and o.anchor.weights)
    shape, device = o.param.shape, o.param.device
    for other in (*others, o.step, o.anchor and o.anchor.decay):
        if other is not None and other.device != device:
            raise ValueError(
                f"{o.name}: the parameter is on {device} and one of its tensors on {other.device}; move it"
            )
    if o.step.dtype != torch.float32:
        raise ValueError(f"{o.name}: a step count must be fp32, as torch.optim.AdamW has it, got {o.step.dtype}")
    if any(other is not None and other.shape != shape for other in others):
        shapes = {tuple(other.shape) for other in others if other is not None}
        raise ValueError(
            f"{o.name}: gradient, states and reference delta must have the parameter's shape "
            f"{tuple(shape)}, got {sorted(shapes)}"
        )
    if o.grad is None and (o.tau is None or o.anchor is None or (rule.project_on == "gradient" and rule.project)):
        raise ValueError(
            f"{o.name}: without a gradient u is what another optimizer has added to the anchor; pass an anchor and a "
            "reference delta, and project the update if anything"
        )
    if rule.project and rule.project_over == "rows" and o.shard.cuts_rows and o.tau is not None and o.shard.has_rows:
        raise ValueError(f"{o.name}: the shards cut through rows, which cannot be projected; use project_over='tensor'")
    if o.shard.groups and o.tau is not None and rule.update not in (*ELEMENTWISE, *RANKED):
        raise ValueError(
            f"{o.name}: F {rule.update!r} is not known to work on shards of a tensor; step whole tensors, or use a "
            f"method whose F is one of {', '.join((*ELEMENTWISE, *RANKED))}"
        )
    if rule.project and o.tau_dense is None and isinstance(o.tau, SparseTensor):
        raise ValueError(f"{o.name}: project={rule.project!r} needs the whole reference delta; pass it as dense_taus")
    if o.master is not None:
        fits = {torch.float32: (torch.bfloat16, torch.float16), torch.int16: (torch.bfloat16,)}
        if o.param.dtype not in fits.get(o.master.dtype, ()):
            raise ValueError(
                f"{o.name}: {o.param.dtype} weights have no {o.master.dtype} master; 16-bit weights may have an fp32 "
                "one, bf16 weights int16 low halves"
            )
        if rule.rounding == "stochastic":
            raise ValueError(f"{o.name}: a weight with a master is rounded to nearest; use rounding='nearest'")


def _step_each(share: backend.Share, prepared: PreparedStep) -> Steps[list[MergeSums | None]]:
    """Step tensors of one device one after the other; return what they merged, where it is asked for.

    What a step needs to know of the whole of a sharded tensor is found first, of all such tensors together.
    """
    operands, rule = [prepared.operands[i] for i in share.members], prepared.rule
    table = scalar_table([o.step for o in operands], prepared.hyper, share.device)
    scalars = [
        Scalars(*entry.to(compute_dtype(o.param.dtype)).unbind())
        for o, entry in zip(operands, table.unbind(), strict=True)
    ]
    sharded = [i for i, o in enumerate(operands) if o.shard.groups and o.tau is not None]
    along: dict[int, Tensor] = {}
    if rule.project is not None:
        along = {i: _products(operands[i], scalars[i], rule) for i in sharded}
        yield [LocalSum(along[i], operands[i].shard.summed_over(rule.project_over)) for i in sharded]
    kths: dict[int, Tensor] = {}
    if rule.update in RANKED and rule.reserve_rate < 1.0:
        searches = []
        for i in sharded:
            update = partial(_update, operands[i], scalars[i], rule, along.get(i))
            shard = operands[i].shard
            searches.append(kth_largest(update, kept_count(shard.numel, rule.reserve_rate), shard.groups))
        kths = dict(zip(sharded, (yield from side_by_side(searches)), strict=True))
    sums: list[MergeSums | None] = []
    for i, (o, s) in enumerate(zip(operands, scalars, strict=True)):
        if o.grad is None and i not in sharded and share.device.type == "cpu" and not s.advances * s.merges:
            # Another optimizer has taken the step, and there is nothing to merge. The host can tell on a CPU.
            sums.append(None)
            continue
        terms = eager_merging_adamw_(
            o.param,
            o.grad,
            o.exp_avg,
            o.exp_avg_sq,
            _delta(o, rule),
            s,
            rule,
            MaskKey(prepared.seed, s.step, o.tensor_id, DOMAIN_UPDATE, o.shard.elements),
            anchor=o.anchor,
            master=o.master,
            along=along.get(i),
            kth=kths.get(i),
            keep_terms=prepared.stats,
        )
        stored = o.param.dtype if o.master is None else torch.float32
        sums.append(terms and merge_sums(terms, s, rule, stored))
    if prepared.stats:
        # Some are integers: counts.
        yield [LocalSum(x, operands[i].shard.groups) for i in sharded for x in sums[i] or ()]
    return sums


def _products(o: Operands, s: Scalars, rule: MergeRule) -> Tensor:
    """Return the local sums that the projection of a tensor needs."""
    tau = o.tau_dense if o.tau_dense is not None else o.tau
    assert isinstance(tau, Tensor)
    compute = compute_dtype(o.param.dtype)
    if o.grad is None or o.exp_avg is None or o.exp_avg_sq is None:
        assert o.anchor is not None
        u = added_elsewhere(o.param, o.anchor, o.master, compute)
        return products(u, tau.to(compute), rows=rule.project_over == "rows")
    return projected_products(o.grad, o.exp_avg, o.exp_avg_sq, tau, s, rule, compute)


def _update(o: Operands, s: Scalars, rule: MergeRule, along: Tensor | None) -> Tensor:
    """Return the local u that F sees at a merge."""
    compute, delta = compute_dtype(o.param.dtype), _delta(o, rule) if rule.project else None
    if o.grad is None or o.exp_avg is None or o.exp_avg_sq is None:
        assert o.anchor is not None
        u = added_elsewhere(o.param, o.anchor, o.master, compute)
        return projected(u, delta, rule, "update", along)
    _, _, u = fresh_update(o.grad, o.exp_avg, o.exp_avg_sq, delta, s, rule, compute, along)
    return update_since_merge(u, o.param, o.anchor, o.master, s)


def _delta(o: Operands, rule: MergeRule) -> Delta | None:
    """Return the delta of one tensor as the eager step takes it."""
    if o.tau is None:
        return None
    tau = o.tau.unpack() if isinstance(o.tau, SparseTensor) else o.tau
    return Delta(tau, o.tau_dense if o.tau_dense is not None else tau if rule.project else None)


def _merges(o: Operands, hyper: Hyper) -> bool:
    """Return whether a step merges: not between merges, at lr = 0 or at an overflow. Waits for the device."""
    if hyper.found_inf:
        return False
    s = derive_scalars(float(o.step), hyper)
    return bool(s.moves) and (o.anchor is None or bool(s.merges))


def _take_back(steps: Sequence[Tensor], found_inf: float | Tensor) -> None:
    """Uncount a step that an overflow of scaled gradients has stopped, without asking the device."""
    if isinstance(found_inf, Tensor):
        stopped = {device: found_inf.to(device, torch.float32).clamp(max=1.0) for device in {s.device for s in steps}}
        torch._foreach_sub_(list(steps), [stopped[step.device].view(()) for step in steps])
    elif found_inf:
        torch._foreach_sub_(list(steps), 1.0)
