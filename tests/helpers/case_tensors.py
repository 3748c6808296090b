"""What the cases of `kernel_cases` step: tensors between guards, and their comparison bit for bit."""

from __future__ import annotations

from collections import namedtuple
from functools import partial
from math import prod

import torch
from device import DEVICE

from fused_merge import functional
from fused_merge.eager import rounding
from fused_merge.eager.operands import Operands
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Anchor, Hyper, Shard, ShardIndex, merge_rule
from fused_merge.functional.merging_adamw import step_
from fused_merge.names import tensor_id

# The second step is the one at lr = 0 or with an overflow, and then another comes after it.
MIDDLE = 1
# An edge case, and then: two blocks and an end that begins in the middle of a row, an end alone, one that has no delta.
# Those at odd places take the special values.
EDGES = {"empty": (0,), "scalar": (), "block": (2, 512)}
SHAPES = [(2, 1032), (3, 5, 7), (70,)]
SEED = 2**63 + 5
LR = 1e-2
# What sparse deltas keep, in turn.
DENSITIES = (0.4, 0.05, 1.0)

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
GUARD, SENTINEL = 64, 7
WRITTEN, READ = ("param", "exp_avg", "exp_avg_sq", "step", "anchor", "master"), ("grad", "tau", "tau_dense")


# What one tensor starts from, and the gradients that it meets, in fp32.
Values = namedtuple("Values", "weight exp_avg exp_avg_sq delta grads")


def draw(shape, generator):
    weight, exp_avg, root, delta, *grads = torch.randn((4 + MIDDLE + 2, *shape), generator=generator).unbind()
    return Values(weight, 0.1 * exp_avg, (0.1 * root).square(), 1e-2 * delta, [0.1 * grad for grad in grads])


def nonfinite(t):
    # So many that in a small tensor the k-th largest is one of them.
    t.grads[0].view(-1)[-64:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(16)
    # Infinite, and the largest of fp16, bf16 and fp32.
    t.weight.view(-1)[:5] = torch.tensor([torch.inf, -torch.inf, 65504.0, 3.3895e38, 3.4028e38])


def tiny(t):
    # Weights that fp16 rounds to zero, and squares of gradients that are subnormal even in fp32.
    for x, scale in ((t.weight, 1e-8), (t.exp_avg, 1e-21), (t.delta, 1e-5), *((grad, 1e-21) for grad in t.grads)):
        x *= scale
    t.exp_avg_sq.view(-1)[::2] = 0.0


SPECIAL = {
    "none": lambda t: None,
    "nonfinite": nonfinite,
    "ties": lambda t: [x.copy_(x.sign() * 0.0625) for x in (t.exp_avg, t.exp_avg_sq, t.delta, *t.grads)],
    "zeros": lambda t: [x.zero_() for x in (*t[:-1], *t.grads)],
    "zero-delta": lambda t: (t.delta if t.delta.ndim == 1 else t.delta[::2]).zero_(),
    "signed-zeros": lambda t: [x.mul_(x.abs() >= x.std()) for x in (*t[:-1], *t.grads)],
    "tiny": tiny,
}


class Tensors:
    """What a case steps: mid-run, each tensor between guards, the same whenever it is made."""

    def __init__(self, case, shapes=SHAPES, edges=EDGES):
        self.case = case
        self.workspace = functional.Workspace()
        generator = torch.Generator().manual_seed(0)
        drawn = [draw(shape, generator) for shape in (edges[case.edge], *shapes)]
        for values in drawn[1::2]:
            SPECIAL[case.special](values)
        self.grads = list(zip(*(values.grads for values in drawn), strict=True))
        self.operands = [
            operands_of(case, i, values, generator, merges=i < len(shapes)) for i, values in enumerate(drawn)
        ]

    def step(self, impl, index):
        """Take a step, see that it changes only what it may, and return its statistics by name."""
        stopped = self.case.found_inf == "overflow" and index == MIDDLE
        for o, grad in zip(self.operands, self.grads[index], strict=True):
            if o.grad is not None:
                o.grad.copy_(grad)
            elif not stopped:
                step_elsewhere(o, grad)
        read = snapshot(parts(self.operands, READ))
        stats = step_(
            self.operands, rule=rule_of(self.case), hyper=hyper_of(self.case, index), seed=SEED,
            stats=self.case.statistics, workspace=self.workspace, impl=impl,
        )  # fmt: skip
        assert_same_bits(parts(self.operands, READ), read)
        assert_guards_hold(parts(self.operands, READ + WRITTEN))
        return {f"{field} of {i}": x for i, entry in enumerate(stats) if entry for field, x in entry._asdict().items()}

    def written(self):
        """Return by name what a step may change."""
        return parts(self.operands, WRITTEN)


def operands_of(case, number, t, generator, merges):
    """Return the operands of a tensor; those of one that does not merge have no delta."""

    def place(x, dtype=None):
        return placed(x if dtype is None else x.to(DTYPE[dtype]), case, case.layout)

    shape, length = t.weight.shape, prod(t.weight.shape[1:])
    shard = {
        "whole": ShardIndex.whole(prod(shape)),
        # Odd, and beyond what 32 bits count.
        "rows": ShardIndex.whole(prod(shape))._replace(offset=2**34 + 7),
        # The middle columns, at distances that are no multiple of 4.
        "columns": ShardIndex(length, length, 2 * length + 2),
    }[case.shard]
    param, master = weight_and_master(t.weight, case)
    o = Operands(
        name=f"tensor {number}",
        param=place(param),
        grad=place(t.grads[0], case.grad),
        exp_avg=place(t.exp_avg, case.exp_avg),
        exp_avg_sq=place(t.exp_avg_sq, case.exp_avg_sq),
        # Not all of them merge at the same step.
        step=placed(torch.tensor(4.0 + number % 2), case),
        tau=None,
        tau_dense=None,
        anchor=None,
        master=None if master is None else place(master),
        tensor_id=tensor_id(f"layers.{number}.weight"),
        shard=Shard(shard, shape),
    )
    if not merges or case.tau == "none":
        return o
    if case.special == "ties" and number % 2:
        t.delta.view(-1)[::2] = -first_update(case, o).reshape(-1)[::2]
    anchor = None
    if case.merge_every is not None:
        weights = place(0.99 * t.weight, case.weights if case.master == "none" else "fp32")
        anchor = Anchor(weights, placed(torch.tensor(0.97), case))
    if case.stepped != "here":
        anchor = Anchor(anchor.weights, kept=case.stepped == "elsewhere")
        o = o._replace(grad=None, exp_avg=None, exp_avg_sq=None)
    keep = torch.rand(shape, generator=generator) < DENSITIES[number % len(DENSITIES)]
    dense = None if case.tau_dense == "none" else placed(t.delta.to(DTYPE[case.tau_dense]), case)
    return o._replace(tau=stored_tau(t.delta, keep, case), tau_dense=dense, anchor=anchor)


def step_elsewhere(o, grad):
    """Move the weights as another optimizer would; the anchor of a single step is made before."""
    if not o.anchor.kept:
        split = o.master is not None and o.master.dtype == torch.int16
        o.anchor.weights.copy_(rounding.join(o.param, o.master) if split else o.param if o.master is None else o.master)
    o.param.sub_(LR * grad)


def first_update(case, o):
    """Return u of the first step: where plain AdamW gets from zero."""
    end = torch.zeros_like(o.grad, dtype=torch.float32)
    states = {field: getattr(o, field).clone() for field in ("exp_avg", "exp_avg_sq", "step")}
    step_(
        [o._replace(param=end, master=None, **states)], rule=merge_rule("onproj"), hyper=hyper_of(case, 0), impl="eager"
    )
    return end.cpu()


def parts(operands, fields):
    """Return the tensors of some fields under names such as "param of tensor 1" and "anchor.decay of tensor 0"."""
    found = {}
    for o in operands:
        for field in fields:
            x = getattr(o, field)
            inner = x._asdict() if isinstance(x, Anchor) else vars(x) if isinstance(x, SparseTensor) else {"": x}
            tensors = {part: y for part, y in inner.items() if isinstance(y, torch.Tensor)}
            found |= {f"{field}{part and '.'}{part} of {o.name}": y for part, y in tensors.items()}
    return found


def placed(x, case, layout="contiguous"):
    """Copy a tensor into the middle of a buffer of sentinels."""
    start, stride = GUARD + (case.alignment == "shifted"), 2 if layout == "strided" else 1
    buffer = torch.full((start + stride * x.numel() + GUARD,), SENTINEL, dtype=x.dtype, device=DEVICE)
    elements = buffer[start : start + stride * x.numel() : stride]
    if layout == "permuted":
        return elements.view(x.shape[::-1]).permute(tuple(reversed(range(x.ndim)))).copy_(x)
    return elements.view(x.shape).copy_(x)


def weight_and_master(weight, case):
    """Return a weight as it is stored and its master, after somebody set some of the weights to zero."""
    if case.master == "split":
        param, master = rounding.split(weight)
    else:
        param, master = weight.to(DTYPE[case.weights]), weight if case.master == "fp32" else None
    if master is not None:
        param.view(-1)[::50] = 0.0
    return param, master


def stored_tau(delta, keep, case):
    """Return F(tau) as the case stores it, its parts between guards."""
    storage, _, dtype = case.tau.rpartition("-")
    if dtype == "none":
        return None
    delta = delta.to(DTYPE[dtype])
    if not storage:
        return placed(delta, case, "contiguous" if case.layout == "permuted" else case.layout)
    packed = SparseTensor.pack(delta, keep)
    return SparseTensor(*(placed(x, case) for x in (packed.mask, packed.values, packed.offsets)), packed.shape)


def rule_of(case):
    method, _, vote = case.method.partition("-")
    project, _, strength = case.project.partition("-")
    own = {name: getattr(case, name) for name in ("project_over", "project_on", "rounding")}
    own |= {} if project == "none" else {"project": project, "project_strength": float(strength or 1.0)}
    return merge_rule(method, case.reserve_rate, rescale=None if case.rescale else False, vote=vote or None, **own)


def hyper_of(case, index):
    in_the_middle = float(index == MIDDLE)
    number = partial(torch.tensor, device=DEVICE)
    return Hyper(
        lr={"float": LR, "zero": LR * (1.0 - in_the_middle), "tensor": number(LR)}[case.lr],
        betas=(0.9, 0.95),
        eps=case.eps,
        weight_decay=case.weight_decay,
        alpha=case.alpha,
        grad_factor=number(0.37) if case.grad_factor == "tensor" else case.grad_factor,
        found_inf={"absent": 0.0, "clear": number(0.0), "overflow": number(in_the_middle)}[case.found_inf],
        merge_every=case.merge_every or 1,
    )


def snapshot(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bits(x):
    """Return what has to be equal: the pattern of every number, and one for all NaN."""
    return x.masked_fill(x.isnan(), torch.nan).view(BITS[x.dtype]) if x.is_floating_point() else x


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        y = expected[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        different = (bits(x) != bits(y)).sum().item()
        assert not different, f"{name}: {different} of {x.numel()} elements differ"


def assert_guards_hold(tensors):
    for name, x in tensors.items():
        buffer = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        untouched = torch.full_like(buffer, SENTINEL)
        untouched.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
        assert torch.equal(bits(buffer), bits(untouched)), f"{name}: written beside"
