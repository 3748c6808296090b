"""The Triton step equals the eager one, bit for bit, on everything that it writes, for every pair of options.

Triton's interpreter is watched meanwhile, for addresses outside every tensor and false promises to the compiler.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from re import escape

import pytest
import torch
from case_tensors import (
    BITS,
    EDGES,
    MIDDLE,
    Tensors,
    assert_guards_hold,
    assert_same_bits,
    bits,
    rule_of,
    snapshot,
)
from device import DEVICE
from kernel_cases import CASES, Case, complete, every_pair, pairs_shown

INTERPRETED = DEVICE.type == "cpu"
# Blocks in the interpreter.
BLOCK = 1024


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
        launches = tensors.workspace.keep(("step", "triton", DEVICE), list)._launches
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
