"""The compiled step equals the eager one, bit for bit, on everything that it writes, for every pair of options."""

from __future__ import annotations

import pytest
import torch
from case_tensors import MIDDLE, Tensors, assert_same_bits, bits, snapshot
from device import DEVICE
from kernel_cases import CASES, Case, complete

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the tensors of the cases are on the GPU")

# A row longer than a block and an end that begins in the middle of one, an end alone, one that has no delta.
SHAPES = [(2, 5000), (3, 5, 7), (70,)]
EDGES = {"empty": (0,), "scalar": (), "block": (2, 2048)}


def compare(case, shapes=SHAPES):
    """Step by compiled code and by eager code; return the tensors, and what they started from."""
    compiled, eager = (Tensors(case, shapes, EDGES) for _ in range(2))
    start = snapshot(eager.written())
    stops = case.lr == "zero" or case.found_inf == "overflow"
    for index in range(MIDDLE + 2 if stops else MIDDLE + 1):
        found, expected = compiled.step("compiled", index), eager.step("eager", index)
        assert_same_bits(compiled.written(), eager.written())
        assert_same_bits(found, expected)
    return compiled, start


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled_equals_eager(case, threads):
    print(case)  # whole: what pytest shows of it leaves out the middle
    threads(2)
    # Other layouts are refused: `test_tables.py`.
    compiled, start = compare(case._replace(layout="contiguous"))
    # Equal because both did nothing would be no equality.
    moved = {name.split()[0] for name, x in compiled.written().items() if not torch.equal(bits(x), bits(start[name]))}
    # Where others step elsewhere, only the last tensor has moments, and zero gradients do not move them.
    still = {"exp_avg", "exp_avg_sq"} if case.special == "zeros" and case.stepped != "here" else set()
    assert moved == {name.split()[0] for name in start} - still


SIZES = [(4095,), (4096,), (4097,), (8191,), (1023,), (1025,), (1, 1), (4096, 1), (1, 4097), (3, 4096), (2, 4097)]


@pytest.mark.parametrize("method", ["ondare", "onties", "onties-paper", "onproj", "onsoft"])
@pytest.mark.parametrize("over", ["tensor", "rows"])
def test_sizes_around_that_of_a_block(method, over, threads):
    threads(3)
    for on in ("gradient", "update"):
        options = {"method": method, "project": "conflict", "project_over": over, "project_on": on, "statistics": True}
        for rate in (0.3, 0.02) if method != "onproj" else (None,):
            compare(Case(**complete(options | {"reserve_rate": rate, "tau": "bf16"})), SIZES)
