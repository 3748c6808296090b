"""The multi-tensor forms: lists of tensors in, one launch or one eager loop, nothing kept.

`fused_merge.MergingAdamW` and `fused_merge.interpolate` are thin shells around these functions, which are
here for frameworks that keep their own parameters and states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_merge import backend, compiled
from fused_merge.eager.adamw import compute_dtype
from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.eager.interpolate import interpolate_
from fused_merge.eager.merge_stats import MergeStats, MergeSums, merge_stats, merge_sums
from fused_merge.eager.merging_adamw import Anchor, Delta, Terms
from fused_merge.eager.merging_adamw import merging_adamw_ as eager_merging_adamw_
from fused_merge.eager.philox import DOMAIN_UPDATE, MaskKey
from fused_merge.eager.scalars import Hyper, Scalars, derive_scalars, scalar_table
from fused_merge.eager.sums import inner_product
from fused_merge.methods import MergeRule, merge_rule
from fused_merge.operands import Operands
from fused_merge.settings import finite
from fused_merge.sharding import ShardIndex
from fused_merge.sparse import SparseTensor

__all__ = [
    "Anchor",
    "Hyper",
    "MergeRule",
    "MergeStats",
    "ShardIndex",
    "Workspace",
    "inner_products",
    "interpolate",
    "merge_rule",
    "merging_adamw_",
]

Tau = Tensor | SparseTensor | None
Triple = tuple[Tensor, Tensor | None, Tensor | None]


@torch.no_grad()
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
    shards: Sequence[ShardIndex] | None = None,
    full_taus: Sequence[Tensor | None] | None = None,
    anchors: Sequence[Anchor | None] | None = None,
    masters: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    stats: bool = False,
    dry_run: bool = False,
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
        rule: a row of the table of methods with its options, from `merge_rule`.
        hyper: learning rate, betas and the like; a tensor among them is never read by the host.
        tensor_ids: `fused_merge.names.tensor_id` of each tensor's name, which keys its random numbers.
        seed: 64-bit key of the random numbers.
        shards: where each tensor lies in the unsharded one; None where all are whole.
        full_taus: tau before F, where the rule projects and `taus` are sparsified.
        anchors: what step-K keeps between merges; mutated. None merges at every step.
        masters: fp32 copies of 16-bit parameters or int16 low halves of bf16 ones; mutated.
        names: what errors call the tensors; None is "tensor 0" and so on.
        stats: also return what the merge did; the host waits for the device.
        dry_run: only raise what the step would raise; nothing is mutated.
        workspace: what calls with the same tensors share; None starts anew.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`.

    Returns:
        T statistics if asked for, else T times None; None for tensors without a delta or that did not merge.

    Raises:
        ValueError: for lists or shapes that do not match, or a projection onto a delta that is stored sparse. Nothing
            has changed then.
        RuntimeError: if `impl="triton"` cannot run here or does not serve a tensor. Nothing has changed then.
    """
    columns: dict[str, Sequence[Any]] = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "steps": steps,
        "taus": taus,
        "full_taus": [None] * len(params) if full_taus is None else full_taus,
        "anchors": [None] * len(params) if anchors is None else anchors,
        "masters": [None] * len(params) if masters is None else masters,
        "tensor_ids": tensor_ids,
        "shards": [ShardIndex.whole(param.numel()) for param in params] if shards is None else shards,
        "names": [f"tensor {i}" for i in range(len(params))] if names is None else names,
    }
    for column, values in columns.items():
        if len(values) != len(params):
            raise ValueError(f"{column} must have one entry for each of the {len(params)} params, got {len(values)}")
    called = columns.pop("names")
    operands = [Operands(*row) for row in zip(*columns.values(), strict=True)]
    for name, o in zip(called, operands, strict=True):
        _check(name, o, rule)

    def refusal(i: int) -> str | None:
        from fused_merge.kernels.launch import unsupported

        reason: str | None = unsupported(operands[i], rule)
        return reason

    groups = backend.group(impl, params, called, refusal, again=True)
    if dry_run:
        return [None] * len(params)
    hyper = hyper._replace(update_scale=rule.scale(rule.reserve_rate), tau_scale=rule.scale(rule.tau_reserve_rate))
    ready: list[tuple[list[int], Callable[[], list[MergeSums | None]]]] = []
    for runs, device, members in groups:
        own = [operands[i] for i in members]
        if runs == "triton":
            take_step = (workspace or Workspace()).prepare(device, own, rule, hyper, seed, stats)
        else:
            run = compiled.merging_adamw_ if runs == "compiled" else eager_merging_adamw_
            take_step = partial(_step_each, run, device, own, rule, hyper, seed, stats)
        ready.append((members, take_step))
    torch._foreach_add_(list(steps), 1.0)
    sums: dict[int, MergeSums | None] = {}
    for members, take_step in ready:
        sums.update(zip(members, take_step(), strict=True))
    gathered = [
        merge_stats(entry, o.param.numel()) if (entry := sums[i]) is not None and _merges(o, hyper) else None
        for i, o in enumerate(operands)
    ]
    _take_back(steps, hyper.found_inf)
    return gathered


class Workspace:
    """What repeated calls on the same tensors can keep; it is never part of the result.

    On a GPU these are the tables that describe the tensors, made again when an address changes, and the last
    thresholds of F by magnitude, which save passes over the moments. A captured CUDA graph uses them: keep it as
    long as the graph.
    """

    def __init__(self) -> None:
        self._plans: dict[torch.device, Any] = {}
        self._product_plans: dict[torch.device, Any] = {}
        self._parts: dict[str, Workspace] = {}

    def part(self, name: str) -> Workspace:
        """Return what calls with this one of the tensors share."""
        return self._parts.setdefault(name, Workspace())

    def prepare(
        self,
        device: torch.device,
        operands: Sequence[Operands],
        rule: MergeRule,
        hyper: Hyper,
        seed: int,
        stats: bool,
    ) -> Callable[[], list[MergeSums | None]]:
        """Make ready to step the tensors of one device by the kernels; see `fused_merge.kernels.launch.prepare`."""
        from fused_merge.kernels import launch

        plan = self._plans.setdefault(device, launch.Plan())
        step: Callable[[], list[MergeSums | None]] = launch.prepare(
            operands, rule, hyper, seed=seed, stats=stats, plan=plan
        )
        return step

    def multiply(self, device: torch.device, triples: Sequence[Triple], scale: float | Tensor) -> list[Tensor]:
        """Multiply tensors of one device by the kernel; see `fused_merge.kernels.sums.inner_products`."""
        from fused_merge.kernels import sums

        # Filled and not copied: a copy of a number from the host would wait for the device.
        factor = (
            scale.to(device, torch.float32)
            if isinstance(scale, Tensor)
            else torch.full((), scale, dtype=torch.float32, device=device)
        )
        plan = self._product_plans.setdefault(device, sums.Plan())
        products: list[Tensor] = sums.inner_products(triples, factor, plan=plan)
        return products


def _check(name: str, o: Operands, rule: MergeRule) -> None:
    """Raise a `ValueError` if the tensors of a parameter do not fit one another."""
    others = (o.grad, o.exp_avg, o.exp_avg_sq, o.tau, o.full, o.master, o.anchor and o.anchor.weights)
    shape, device = o.param.shape, o.param.device
    for other in (*others, o.step, o.anchor and o.anchor.decay):
        if other is not None and other.device != device:
            raise ValueError(f"{name}: the parameter is on {device} and one of its tensors on {other.device}; move it")
    if o.step.dtype != torch.float32:
        raise ValueError(f"{name}: a step count must be fp32, as torch.optim.AdamW has it, got {o.step.dtype}")
    if any(other is not None and other.shape != shape for other in others):
        shapes = {tuple(other.shape) for other in others if other is not None}
        raise ValueError(
            f"{name}: gradient, states and reference delta must have the parameter's shape "
            f"{tuple(shape)}, got {sorted(shapes)}"
        )
    if rule.project and o.full is None and isinstance(o.tau, SparseTensor):
        raise ValueError(f"{name}: project={rule.project!r} needs the whole reference delta; pass it as full_taus")
    if o.master is not None:
        fits = {torch.float32: (torch.bfloat16, torch.float16), torch.int16: (torch.bfloat16,)}
        if o.param.dtype not in fits.get(o.master.dtype, ()):
            raise ValueError(
                f"{name}: {o.param.dtype} weights have no {o.master.dtype} master; 16-bit weights may have an fp32 "
                "one, bf16 weights int16 low halves"
            )
        if rule.rounding == "stochastic":
            raise ValueError(f"{name}: a weight with a master is rounded to nearest; use rounding='nearest'")


def _step_each(
    run: Callable[..., Terms | None],
    device: torch.device,
    operands: Sequence[Operands],
    rule: MergeRule,
    hyper: Hyper,
    seed: int,
    stats: bool,
) -> list[MergeSums | None]:
    """Step tensors of one device one after the other; return what they merged, where it is asked for."""
    sums: list[MergeSums | None] = []
    for o, row in zip(operands, scalar_table([o.step for o in operands], hyper, device).unbind(), strict=True):
        s = Scalars(*row.to(compute_dtype(o.param.dtype)).unbind())
        terms = run(
            o.param,
            o.grad,
            o.exp_avg,
            o.exp_avg_sq,
            _delta(o.tau, o.full, rule),
            s,
            rule,
            MaskKey(seed, s.step, o.tensor_id, DOMAIN_UPDATE, o.shard),
            anchor=o.anchor,
            master=o.master,
            keep_terms=stats,
        )
        stored = o.param.dtype if o.master is None else torch.float32
        sums.append(terms and merge_sums(terms, s, rule, stored))
    return sums


def _merges(o: Operands, hyper: Hyper) -> bool:
    """Return whether a step merges: not between merges, at lr = 0 or at an overflow. Waits for the device."""
    s = derive_scalars(float(o.step), hyper)
    return bool(s.moves * s.advances) and (o.anchor is None or bool(s.merges))


def _take_back(steps: Sequence[Tensor], found_inf: float | Tensor) -> None:
    """Uncount a step that an overflow of scaled gradients has stopped, without asking the device."""
    if isinstance(found_inf, Tensor):
        stopped = {device: found_inf.to(device, torch.float32).clamp(max=1.0) for device in {s.device for s in steps}}
        torch._foreach_sub_(list(steps), [stopped[step.device].view(()) for step in steps])
    elif found_inf:
        torch._foreach_sub_(list(steps), 1.0)


def _delta(tau: Tau, full: Tensor | None, rule: MergeRule) -> Delta | None:
    """Return the delta of one tensor as the eager step takes it."""
    if tau is None:
        return None
    kept = tau.unpack() if isinstance(tau, SparseTensor) else tau
    return Delta(kept, full if full is not None else kept if rule.project else None)


@torch.no_grad()
def inner_products(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None = None,
    minus: Sequence[Tensor] | None = None,
    *,
    scale: float | Tensor = 1.0,
    workspace: Workspace | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Return <s*x, y - z> of each of T tensors, without writing the difference; without `ys` <s*x, s*x>.

    Each is one defined sum, a binary tree over row-major neighbours, in fp32 (fp64 where a tensor is fp64): it does not
    depend on what else is summed, on block sizes or on the backend.

    Args:
        xs: T floating tensors of any shapes and strides.
        ys: T tensors of the same shapes and devices, in any floating dtypes.
        minus: z, the same; needs `ys`.
        scale: s, a float or a 0-d tensor that the host never reads; x is multiplied first.
        workspace: what calls with the same tensors share; None starts anew.
        impl: `"auto"`, `"triton"` or `"eager"`; `"compiled"` is the step's, and runs eager code here.

    Returns:
        T 0-d tensors, each where its tensor is.

    Raises:
        ValueError: for lists, shapes, dtypes or devices that do not match.
        RuntimeError: if `impl="triton"` cannot run here or does not serve a tensor.
    """
    if ys is None and minus is not None:
        raise ValueError("minus is subtracted from ys; pass both, or neither")
    nothing = [None] * len(xs)
    lengths = [len(column) for column in (xs, ys, minus) if column is not None]
    if lengths != [len(xs)] * len(lengths):
        raise ValueError(f"xs, ys and minus must have equally many tensors, got {lengths}")
    triples: list[Triple] = list(zip(xs, ys or nothing, minus or nothing, strict=True))
    for index, triple in enumerate(triples):
        x = triple[0]
        for other in triple:
            if other is None:
                continue
            if (other.shape, other.device) != (x.shape, x.device) or not other.is_floating_point():
                raise ValueError(
                    f"tensor {index}: {_describe(x)} and {_describe(other)} have no inner product; make shape and "
                    "device the same, and the dtypes floating"
                )

    def refusal(i: int) -> str | None:
        from fused_merge.kernels.sums import unsupported

        reason: str | None = unsupported(triples[i])
        return reason

    called = [f"tensor {i}" for i in range(len(xs))]
    results: dict[int, Tensor] = {}
    for runs, device, members in backend.group(impl, xs, called, refusal):
        if runs == "triton":
            products = (workspace or Workspace()).multiply(device, [triples[i] for i in members], scale)
        else:
            products = [_eager_product(*triples[i], scale) for i in members]
        results.update(zip(members, products, strict=True))
    return [results[i] for i in range(len(xs))]


def _eager_product(x: Tensor, y: Tensor | None, z: Tensor | None, scale: float | Tensor) -> Tensor:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, y, z))
    compute = torch.float64 if wide else torch.float32
    x = (scale.to(x.device, compute) if isinstance(scale, Tensor) else scale) * x.to(compute)
    right = x if y is None else y.to(compute)
    return inner_product(x, right if z is None else right - z.to(compute))


@torch.no_grad()
def interpolate(
    bases: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    ratios: Sequence[float] | Sequence[Sequence[float]],
    outs: Sequence[Sequence[Tensor]] | None = None,
    *,
    impl: str = "auto",
) -> list[list[Tensor]]:
    """Return R points of the line through each pair of tensors, reading each pair once.

    theta(r) = theta0 + r * (theta1 - theta0), in fp32 (fp64 if an end is) from the nearer end and rounded
    once; r = 0 and r = 1 copy bits. Source: Lin et al. 2024 (arXiv 2309.06256).

    Args:
        bases: T tensors theta0, floating, any shapes and strides.
        tuneds: T tensors theta1 of the same shapes and devices.
        ratios: R finite ratios for all tensors, or R for each of the T tensors. Below 0 or above 1 they
            extrapolate.
        outs: R tensors for each of the T pairs, of the shape and device of the pair: mutated. With R = 1 an
            output may be one of its inputs; they may not overlap otherwise. None allocates, in the dtype of
            theta0. The kernel takes only ends and outputs of one dtype.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`. Compiled code, which `"auto"` never chooses here, serves
            contiguous tensors on a CPU, and takes some seconds to compile when it is first used.

    Returns:
        `outs`, or R new tensors for each of the T pairs: `result[t][r]`.

    Raises:
        ValueError: for a ratio that is not finite or tensors that do not match.
        RuntimeError: if `impl="triton"` cannot run here.
    """
    per_tensor = _ratios_per_tensor(ratios, len(bases))
    pairs = list(zip(bases, tuneds, strict=True))
    if outs is None:
        outs = [
            [torch.empty_like(base, memory_format=torch.contiguous_format) for _ in row]
            for base, row in zip(bases, per_tensor, strict=True)
        ]
    for index, ((base, tuned), points, row) in enumerate(zip(pairs, outs, per_tensor, strict=True)):
        for tensor in (base, tuned, *points):
            if not tensor.is_floating_point():
                raise ValueError(f"tensor {index}: only floating tensors lie on a line, got {tensor.dtype}")
        if len(points) != len(row):
            raise ValueError(f"tensor {index}: {len(row)} ratios need as many outputs, got {len(points)}")
        for other in (tuned, *points):
            if (other.shape, other.device) != (base.shape, base.device):
                raise ValueError(
                    f"tensor {index}: base is {_describe(base)} and another end or output {_describe(other)}; "
                    "make shape and device the same"
                )

    def refusal(i: int) -> str | None:
        from fused_merge.kernels.interpolate import unsupported

        reason: str | None = unsupported(*pairs[i], outs[i])
        return reason

    groups = backend.group(impl, bases, [f"tensor {i}" for i in range(len(bases))], refusal)
    for runs, _, members in groups:
        if runs == "triton":
            from fused_merge.kernels import interpolate as kernel

            columns = (bases, tuneds, per_tensor, outs)
            kernel.interpolate(*([column[i] for i in members] for column in columns))
            continue
        run = compiled.interpolate_ if runs == "compiled" else interpolate_
        for i in members:
            if all(tensor.is_contiguous() for tensor in (*pairs[i], *outs[i])):
                base, tuned, *points = (tensor.view(-1) for tensor in (*pairs[i], *outs[i]))
                run(base, tuned, per_tensor[i], points)
                continue
            for out, ratio in zip(outs[i], per_tensor[i], strict=True):
                out.copy_(eager_interpolate(*pairs[i], ratio))
    return [list(points) for points in outs]


def _ratios_per_tensor(ratios: Sequence[float] | Sequence[Sequence[float]], tensors: int) -> list[list[float]]:
    """Return the ratios of each tensor, all of them finite."""
    shared = [ratio for ratio in ratios if not isinstance(ratio, Sequence)]
    own = [[float(ratio) for ratio in row] for row in ratios if isinstance(row, Sequence)]
    per_tensor = own or [[float(ratio) for ratio in shared]] * tensors
    if (shared and own) or len(per_tensor) != tensors:
        raise ValueError(f"ratios must be one list of numbers, or a list for each of the {tensors} tensors")
    return [[finite(ratio, what="ratio") for ratio in row] for row in per_tensor]


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
