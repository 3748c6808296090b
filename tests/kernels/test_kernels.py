"""The Triton step equals the eager one, bit for bit, on everything that it writes, for every pair of options.

Triton's interpreter is watched meanwhile, for addresses outside every tensor and false promises to the compiler.
"""

from __future__ import annotations

from functools import partial
from math import prod
from re import escape
from typing import NamedTuple

import pytest
import torch
from device import DEVICE
from kernel_cases import CASES, Case, complete, every_pair, pairs_shown

from fused_merge import functional
from fused_merge.eager import rounding
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Anchor, Hyper, MergeStats, ShardIndex, merge_rule
from fused_merge.names import tensor_id

INTERPRETED = DEVICE.type == "cpu"
# Blocks in the interpreter; a search looks at two at once.
BLOCK, SEARCH_BLOCKS = 1024, 2

# The second step is the one at lr = 0 or with an overflow, and then another comes after it.
MIDDLE = 1
# An edge case, and then: two blocks and an end that begins in the middle of a row, an end alone, one that has no delta.
# Those at odd places take the special values.
EDGES = {"empty": (0,), "scalar": (), "block": (2, 512)}
SHAPES = [(2, 1032), (3, 5, 7), (70,)]
IDS = [tensor_id(f"layers.{i}.weight") for i in range(1 + len(SHAPES))]
SEED = 2**63 + 5
LR = 1e-2
# What sparse deltas keep, in turn.
DENSITIES = (0.4, 0.05, 1.0)

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
GUARD, SENTINEL = 64, 7


class Values(NamedTuple):
    """What one tensor starts from and meets, in fp32."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    delta: torch.Tensor
    grads: list[torch.Tensor]  # of each step

    @classmethod
    def draw(cls, shape, generator):
        weight, exp_avg, root, delta, *grads = torch.randn((4 + MIDDLE + 2, *shape), generator=generator).unbind()
        return cls(weight, 0.1 * exp_avg, (0.1 * root).square(), 1e-2 * delta, [0.1 * grad for grad in grads])


def nonfinite(t):
    # So many that in a small tensor the k-th largest is one of them.
    t.grads[0].view(-1)[-64:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(16)
    # Infinite, and the largest of fp16, bf16 and fp32.
    t.weight.view(-1)[:5] = torch.tensor([torch.inf, -torch.inf, 65504.0, 3.3895e38, 3.4028e38])


def ties(t):
    for x in (t.exp_avg, t.exp_avg_sq, t.delta, *t.grads):
        x.copy_(x.sign() * 0.0625)


def zeros(t):
    for x in (*t[:-1], *t.grads):
        x.zero_()


def zero_delta(t):
    (t.delta if t.delta.ndim == 1 else t.delta[::2]).zero_()


def signed_zeros(t):
    for x in (*t[:-1], *t.grads):
        x[x.abs() < x.std()] *= 0.0


def tiny(t):
    # Weights that fp16 rounds to zero, and squares of gradients that are subnormal even in fp32.
    for x, scale in ((t.weight, 1e-8), (t.exp_avg, 1e-21), (t.delta, 1e-5), *((grad, 1e-21) for grad in t.grads)):
        x *= scale
    t.exp_avg_sq.view(-1)[::2] = 0.0


SPECIAL = {
    "none": lambda t: None,
    "nonfinite": nonfinite,
    "ties": ties,
    "zeros": zeros,
    "zero-delta": zero_delta,
    "signed-zeros": signed_zeros,
    "tiny": tiny,
}


class Tensors:
    """What a case steps: mid-run, each tensor between guards, the same whenever it is made."""

    def __init__(self, case):
        self.case = case
        self.workspace = functional.Workspace()
        generator = torch.Generator().manual_seed(0)
        shapes = [EDGES[case.edge], *SHAPES]
        drawn = [Values.draw(shape, generator) for shape in shapes]
        for values in drawn[1::2]:
            SPECIAL[case.special](values)
        weights, exp_avgs, exp_avg_sqs, deltas, grads = zip(*drawn, strict=True)

        def place(tensors, dtype):
            return [placed(x.to(DTYPE[dtype]), case, case.layout) for x in tensors]

        self.new_grads = list(zip(*grads, strict=True))
        self.grads = place(self.new_grads[0], case.grad)
        self.exp_avgs = place(exp_avgs, case.exp_avg)
        self.exp_avg_sqs = place(exp_avg_sqs, case.exp_avg_sq)
        # Not all of them merge at the same step.
        self.steps = [placed(torch.tensor(4.0 + i % 2), case) for i in range(len(shapes))]
        if case.special == "ties":
            for delta, u in list(zip(deltas, self.first_updates(), strict=True))[1::2]:
                delta.view(-1)[::2] = -u.reshape(-1)[::2]

        stored = [weight_and_master(weight, case) for weight in weights]
        self.params = [placed(param, case, case.layout) for param, _ in stored]
        self.masters = [None if master is None else placed(master, case, case.layout) for _, master in stored]
        self.anchors = [None] * len(shapes)
        if case.merge_every is not None:
            anchors = place([0.99 * weight for weight in weights], case.weights if case.master == "none" else "fp32")
            self.anchors = [Anchor(anchor, placed(torch.tensor(0.97), case)) for anchor in anchors]

        shares = [torch.rand(shape, generator=generator) for shape in shapes]
        self.taus = [
            stored_tau(delta, share < DENSITIES[i % 3], case)
            for i, (delta, share) in enumerate(zip(deltas, shares, strict=True))
        ]
        self.dense_taus = [
            None if case.tau_dense == "none" else placed(delta.to(DTYPE[case.tau_dense]), case) for delta in deltas
        ]
        self.taus[-1] = self.dense_taus[-1] = None
        # Between merges of what?
        self.anchors = [None if tau is None else anchor for anchor, tau in zip(self.anchors, self.taus, strict=True)]

    def first_updates(self):
        """Return u of the first step: where plain AdamW gets from zero."""
        ends = [torch.zeros_like(grad, dtype=torch.float32) for grad in self.grads]
        states = [[x.clone() for x in state] for state in (self.exp_avgs, self.exp_avg_sqs, self.steps)]
        functional.merging_adamw_(
            ends, self.grads, *states, [None] * len(ends), rule=merge_rule("onproj"), hyper=hyper_of(self.case, 0),
            tensor_ids=IDS, impl="eager",
        )  # fmt: skip
        return [end.cpu() for end in ends]

    def step(self, impl, index):
        """Take a step, see that it changes only what it may, and return its statistics by name."""
        for grad, new in zip(self.grads, self.new_grads[index], strict=True):
            grad.copy_(new)
        read = snapshot(self.read())
        stats = functional.merging_adamw_(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.taus,
            rule=rule_of(self.case), hyper=hyper_of(self.case, index), tensor_ids=IDS, seed=SEED,
            shards=shards_of(self.case), dense_taus=self.dense_taus, anchors=self.anchors, masters=self.masters,
            stats=self.case.statistics, workspace=self.workspace, impl=impl,
        )  # fmt: skip
        assert_same_bits(self.read(), read)
        assert_guards_hold(self.read() | self.written())
        return by_name(**{field: [getattr(entry, field, None) for entry in stats] for field in MergeStats._fields})

    def written(self):
        """Return by name what a step may change."""
        return by_name(
            param=self.params,
            exp_avg=self.exp_avgs,
            exp_avg_sq=self.exp_avg_sqs,
            step=self.steps,
            master=self.masters,
            anchor=[getattr(anchor, "weights", None) for anchor in self.anchors],
            anchor_decay=[getattr(anchor, "decay", None) for anchor in self.anchors],
        )

    def read(self):
        """Return by name what a step only reads."""
        return by_name(
            grad=self.grads,
            tau_dense=self.dense_taus,
            tau=[tau if isinstance(tau, torch.Tensor) else None for tau in self.taus],
            **{
                part: [getattr(tau, part) if isinstance(tau, SparseTensor) else None for tau in self.taus]
                for part in ("mask", "values", "offsets")
            },
        )


def by_name(**columns):
    """Return the tensors of some columns under names such as "param of tensor 1"."""
    return {
        f"{column} of tensor {i}": tensor
        for column, tensors in columns.items()
        for i, tensor in enumerate(tensors)
        if tensor is not None
    }


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
    return merge_rule(
        method,
        case.reserve_rate,
        rescale=None if case.rescale else False,
        vote=vote or None,
        project=None if project == "none" else project,
        project_strength=float(strength or 1.0),
        project_over=case.project_over,
        project_on=case.project_on,
        rounding=case.rounding,
    )


def hyper_of(case, index):
    in_the_middle = float(index == MIDDLE)
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


def number(value):
    return torch.tensor(value, device=DEVICE)


def shards_of(case):
    shapes = [EDGES[case.edge], *SHAPES]
    return {
        "whole": None,
        # Odd, and beyond what 32 bits count.
        "rows": [ShardIndex.whole(prod(shape))._replace(offset=2**34 + 7) for shape in shapes],
        # The middle columns, at distances that are no multiple of 4.
        "columns": [ShardIndex(length, length, 2 * length + 2) for length in (prod(shape[1:]) for shape in shapes)],
    }[case.shard]


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


def columns_that_differ(found, expected):
    """Return which columns, such as "param", differ somewhere."""
    return {name.split()[0] for name, x in found.items() if not torch.equal(bits(x), bits(expected[name]))}


@pytest.fixture
def watch(monkeypatch):
    """Make the kernels work in small blocks and watch them; None where no interpreter runs them."""
    if not INTERPRETED:
        return None
    import triton.language as tl
    from watch import Watch

    from fused_merge.kernels import kth_largest, launch

    monkeypatch.setattr(launch, "prepare", partial(launch.prepare, block=BLOCK))
    monkeypatch.setattr(kth_largest, "SEARCH_BLOCKS", tl.constexpr(SEARCH_BLOCKS))
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
    assert columns_that_differ(by_kernel.written(), start) == {name.split()[0] for name in start}
    assert bool(merges) == (case.statistics and case.tau != "none")
    if watch:
        assert {"create_masked_load", "create_masked_store"} <= watch.seen
        assert not watch.wrong


@pytest.mark.skipif(not INTERPRETED, reason="watches Triton's interpreter")
def test_a_false_promise_and_a_foreign_address_are_noticed(watch, monkeypatch):
    from fused_merge.kernels import layout

    Tensors(Case(**complete({"method": "ondare"}))).step("triton", 0)
    assert not watch.wrong
    # Tensors that nobody knows.
    monkeypatch.setattr(watch, "add", lambda *parts: None)
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
    for pair in every_pair():
        assert pair in shown or complete(dict(pair)) is None, pair


class Prepared(Exception):
    """Where a step stops whose compiled forms are asked for."""


def test_the_cases_show_every_compiled_form(monkeypatch):
    from fused_merge.kernels import launch

    specs = set()

    def collect(operands, rule, hyper, *, stats, **options):
        specs.update(launch._specialization(o, rule, stats, BLOCK) for o in operands)
        raise Prepared

    monkeypatch.setattr(launch, "prepare", collect)
    for case in CASES.values():
        with pytest.raises(Prepared):
            Tensors(case).step("triton", 0)
    flags = "SPARSE PROJECT_ROWS STOCHASTIC STATS RANKED RESUMES ROW_PROGRAMS SKIPS STRIDED QUADS ALIGNED"
    for flag in flags.split():
        assert {getattr(spec, flag) for spec in specs} == {False, True}, flag
    for pair in (
        "ROW_PROGRAMS SPARSE",
        "ROW_PROGRAMS STOCHASTIC",
        "ROW_PROGRAMS SKIPS",
        "ROW_PROGRAMS ALIGNED",
        "SKIPS RESUMES",
        "SKIPS STOCHASTIC",
        "SKIPS STRIDED",
        "RESUMES PROJECT_ROWS",
        "RANKED STATS",
        "RANKED ANCHOR",
    ):
        assert any(all(getattr(spec, flag) for flag in pair.split()) for spec in specs), pair


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
