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
# Blocks in the interpreter; a search looks at two at once.
BLOCK, SEARCH_BLOCKS = 1024, 2


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
    moved = {name.split()[0] for name, x in by_kernel.written().items() if not torch.equal(bits(x), bits(start[name]))}
    # Where others step elsewhere, only the last tensor has moments, and zero gradients do not move them.
    still = {"exp_avg", "exp_avg_sq"} if case.special == "zeros" and case.stepped != "here" else set()
    assert moved == {name.split()[0] for name in start} - still
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
