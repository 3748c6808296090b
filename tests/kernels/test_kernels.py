"""The Triton step equals the eager one, bit for bit, on everything that it writes, for every pair of options.

Triton's interpreter is watched meanwhile, for addresses outside every tensor and false promises to the compiler.
"""

from __future__ import annotations

from collections import namedtuple
from functools import partial
from itertools import combinations
from math import prod
from re import escape

import pytest
import torch
from device import DEVICE
from kernel_cases import CASES, Case, complete, every_pair, pairs_shown

from fused_merge import functional
from fused_merge.eager import rounding
from fused_merge.eager.operands import Operands
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Anchor, Hyper, Shard, ShardIndex, merge_rule
from fused_merge.functional.merging_adamw import step_
from fused_merge.names import tensor_id

INTERPRETED = DEVICE.type == "cpu"
# Blocks in the interpreter.
BLOCK = 1024

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

    def __init__(self, case):
        self.case = case
        self.workspace = functional.Workspace()
        generator = torch.Generator().manual_seed(0)
        drawn = [draw(shape, generator) for shape in (EDGES[case.edge], *SHAPES)]
        for values in drawn[1::2]:
            SPECIAL[case.special](values)
        self.grads = list(zip(*(values.grads for values in drawn), strict=True))
        self.operands = [operands_of(case, i, values, generator) for i, values in enumerate(drawn)]

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


def operands_of(case, number, t, generator):
    """Return the operands of a tensor, the last of which have no delta."""

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
    if number == len(SHAPES) or case.tau == "none":
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
    keep = torch.rand(shape, generator=generator) < DENSITIES[number]
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


@pytest.fixture
def watch(monkeypatch):
    """Make the kernels work in small blocks and watch them; None where no interpreter runs them."""
    if not INTERPRETED:
        return None
    from watch import Watch

    from fused_merge.kernels import kth_largest, launch

    monkeypatch.setattr(launch, "prepare", partial(launch.prepare, block=BLOCK))
    # Groups of blocks, of which one is not whole.
    monkeypatch.setattr(kth_largest, "PROGRAMS", 3)
    return Watch(monkeypatch)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_equals_eager(case, watch):
    print(case)  # whole: what pytest shows of it leaves out the middle
    by_kernel, by_eager = Tensors(case), Tensors(case)
    start, merges = snapshot(by_kernel.written()), 0
    stops = case.lr == "zero" or case.found_inf == "overflow"
    for index in range(MIDDLE + 2 if stops else MIDDLE + 1):
        before = snapshot(by_kernel.written())
        found, expected = by_kernel.step("triton", index), by_eager.step("eager", index)
        assert_same_bits(by_kernel.written(), by_eager.written())
        assert_same_bits(found, expected)
        merges += len(expected)
        if case.found_inf == "overflow" and index == MIDDLE:
            assert_same_bits(by_kernel.written(), before)
    # Equal because both did nothing would be no equality.
    moved = {name.split()[0] for name, x in by_kernel.written().items() if not torch.equal(bits(x), bits(start[name]))}
    # Where others step elsewhere, only the last tensor has moments, and zero gradients do not move them.
    still = {"exp_avg", "exp_avg_sq"} if case.special == "zeros" and case.stepped != "here" else set()
    assert moved == {name.split()[0] for name in start} - still
    assert bool(merges) == (case.statistics and case.tau != "none")
    if watch:
        assert {"create_masked_load", "create_masked_store"} <= watch.seen
        assert not watch.wrong


# How far the last threshold was from the next one, in patterns, and whether all that is kept was listed then.
LAST_THRESHOLDS = {"here": (0, True), "a little lower": (-(1 << 20), True), "too low": (-(1 << 25), False),
                   "higher": (1 << 20, False)}  # fmt: skip


@pytest.mark.parametrize("last", LAST_THRESHOLDS)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "onties"},
        {"method": "onties-paper", "alpha": 0.5},
        {"method": "onsoft"},
        {"method": "onties", "weights": "bf16", "rounding": "stochastic", "shard": "columns", "alignment": "shifted"},
        {"method": "onties", "weights": "fp16", "grad": "bf16", "project": "conflict", "tau_dense": "bf16"},
        {"method": "onties", "weight_decay": 0.1},
        # Lists of more blocks than there are programs to read them.
        {"method": "onties", "reserve_rate": 0.1, "edge": "block"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_lists_are_walked_where_they_hold_all_that_is_kept(options, last, watch, monkeypatch):
    from fused_merge.kernels import kth_largest, launch

    def thresholds(tensors):
        launches = tensors.workspace.keep(("step", DEVICE), list)._launches
        return [own.thresholds for own in launches if own.thresholds is not None]

    def watched(self, table, coefficients, search, marks):
        if self.thresholds is not None:
            listed.update(zip(self.members, search[:, kth_largest.SEARCH.listed].tolist(), strict=True))
        return take(self, table, coefficients, search, marks)

    take, listed = launch.Launch._step, {}
    monkeypatch.setattr(launch.Launch, "_step", watched)
    monkeypatch.setitem(EDGES, "block", (40, 1024))
    offset, walks = LAST_THRESHOLDS[last]
    case = Case(**complete({"tau": "sparse-bf16", "reserve_rate": 0.02, "weight_decay": 0.0} | options))
    ahead, by_kernel, by_eager = Tensors(case), Tensors(case), Tensors(case)
    for index in range(2):
        ahead.step("triton", index)
    for index in range(2):
        by_kernel.step("triton", index)
        by_eager.step("eager", index)
        assert_same_bits(by_kernel.written(), by_eager.written())
        if index == 0:
            for own, found in zip(thresholds(by_kernel), thresholds(ahead), strict=True):
                own.copy_((found + offset).clamp(min=0))
    assert all(map(torch.equal, thresholds(by_kernel), thresholds(ahead)))
    # Of the one that has more than a block.
    assert (listed[1] >= 0) == walks
    assert not (watch and watch.wrong)


@pytest.mark.skipif(not INTERPRETED, reason="watches Triton's interpreter")
def test_a_false_promise_and_a_foreign_address_are_noticed(watch, monkeypatch):
    from fused_merge.kernels import layout

    Tensors(Case(**complete({"method": "ondare"}))).step("triton", 0)
    assert not watch.wrong
    # Tensors that nobody knows.
    monkeypatch.setattr("watch.tensors_in", lambda operands: [])
    Tensors(Case(**complete({"method": "ondare"}))).step("triton", 0)
    assert "create_masked_store" in watch.wrong
    watch.wrong = frozenset()
    # Every buffer one element too far, and said to be aligned.
    monkeypatch.setattr(layout, "is_aligned", lambda tensors: True)
    Tensors(Case(**complete({"method": "onties", "tau": "sparse-bf16", "alignment": "shifted"}))).step("triton", 0)
    assert "tt.divisibility" in watch.wrong


def test_the_cases_show_every_legal_pair_of_options():
    assert len(CASES) <= 250
    shown = set().union(*(pairs_shown(case._asdict()) for case in CASES.values()))
    assert not [pair for pair in every_pair() if pair not in shown and complete(dict(pair))]


def test_the_cases_show_every_compiled_form():
    from fused_merge.kernels.specialization import specialization

    specs = {
        specialization(o, rule_of(case), case.statistics, BLOCK)
        for case in CASES.values()
        for o in Tensors(case).operands
    }
    flags = {flag for flag, value in next(iter(specs))._asdict().items() if isinstance(value, bool)} - {"MASKED"}
    for flag in flags:
        assert {getattr(spec, flag) for spec in specs} == {False, True}, flag
    together = {frozenset(pair) for spec in specs for pair in combinations((f for f in flags if getattr(spec, f)), 2)}
    for other in ("SPARSE", "STOCHASTIC", "SKIPS", "ALIGNED"):
        assert {"ROW_PROGRAMS", other} in together
    for other in ("RESUMES", "STOCHASTIC", "STRIDED"):
        assert {"SKIPS", other} in together
    assert {frozenset({"RESUMES", "PROJECT_ROWS"}), frozenset({"RANKED", "STATS"})} <= together
    assert any(spec.RANKED and spec.ANCHOR for spec in specs)


def test_one_bit_of_any_output_shows_and_one_element_beside_it():
    case = Case(**complete({"weights": "bf16", "master": "fp32", "merge_every": 3}))
    tensors, others = Tensors(case).written(), Tensors(case).written()
    for name, x in tensors.items():
        beside = x.as_strided((1,), (1,), x.storage_offset() + x.numel())
        beside += 1
        with pytest.raises(AssertionError, match=escape(name)):
            assert_guards_hold(tensors)
        beside -= 1
        for pattern in x.view(BITS[x.dtype]).view(-1)[-1:]:
            pattern ^= 1
            with pytest.raises(AssertionError, match=escape(name)):
                assert_same_bits(tensors, others)
            pattern ^= 1
    assert_guards_hold(tensors)
    assert_same_bits(tensors, others)


def test_zeros_have_signs_and_a_nan_is_a_nan():
    zero, minus_zero, nan, another = bits(
        torch.tensor([0, -(2**31), 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    )
    assert zero != minus_zero
    assert nan == another
