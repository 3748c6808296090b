"""The step of many tensors: the kernel against eager beyond `tests/kernels`, lists, shards, workspaces, refusals."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from bits import assert_same_bits, same_bits
from device import DEVICE
from tensors import WHOLE, Tensors, run_both

from fused_merge import functional
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import SPARSIFY
from fused_merge.methods import METHODS, Method


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1,), (0,), (127,), (32, 32), (1025,), (3, 7, 501)], {}),
        ([(1,), (0,), (127,), (32, 32), (1025,), (3, 7, 501)], {"reserve_rate": 1.0}),
        ([(100_003,)], {}),
        ([(77,)], {"seed": -1}),
    ],
    ids=str,
)
def test_kernel_equals_eager_in_blocks_of_the_usual_size(shapes, options):
    run_both(Tensors(*shapes, tau=torch.bfloat16, sparse=True), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "onties"},
        {"method": "onsoft"},
        {"method": "onproj", "sparse": False},
        {"method": "onproj", "sparse": False, "project_over": "rows"},
        {"rounding": "stochastic"},
    ],
    ids=str,
)
def test_the_block_size_does_not_show(options, monkeypatch):
    from fused_merge.kernels import launch

    prepare, options = launch.prepare, {"sparse": True} | options
    monkeypatch.setattr(launch, "prepare", lambda *args, **kwargs: prepare(*args, **kwargs, block=2048))
    tensors = Tensors((5000,), (1025,), (3, 2100), tau=torch.bfloat16, sparse=options.pop("sparse"))
    run_both(tensors, steps=1, **options)


def test_elements_beyond_32_bits(monkeypatch):
    """The last chunks of a tensor of 2^31 elements and some, whose pages before them nobody touches."""
    from fused_merge.kernels import layout

    n, tail = 2**31 + 5000, 5000 + 2 * layout.DEFAULT_BLOCK
    split = layout.split_programs

    def last_ones(*args):
        whole, ends = split(*args)
        return layout.Programs(whole[-2:], ends)

    monkeypatch.setattr(layout, "split_programs", last_ones)
    small = Tensors((tail,), dtype=torch.bfloat16, tau=torch.bfloat16)
    small.exp_avgs, small.exp_avg_sqs = ([x.bfloat16() for x in y] for y in (small.exp_avgs, small.exp_avg_sqs))
    large = small.clone()
    for field in WHOLE:
        # Neither filled with zeros nor, by the tests, with NaN: 21 GB that need no memory.
        buffer = torch.empty_strided((n,), (1,), dtype=torch.bfloat16, device=DEVICE)
        buffer[-tail:] = getattr(small, field)[0]
        setattr(large, field, [buffer])
    large.step("triton")
    small.step("eager", shards=[ShardIndex(n - tail, tail, tail)])
    for field in ("params", "exp_avgs", "exp_avg_sqs"):
        assert same_bits(getattr(large, field)[0][-tail:], getattr(small, field)[0])


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 2**34, 2**34 + 1])
def test_a_shard_of_rows_steps_as_its_part_of_the_whole(offset):
    n = 1500
    whole = Tensors((offset % 2**20 + n,))
    part = whole.clone()
    for field in WHOLE:
        setattr(part, field, [getattr(whole, field)[0][-n:].clone()])
    run_both(part, steps=1, shards=[ShardIndex(offset, n, n)])
    if offset < 2**20:
        whole.step("eager")
        assert same_bits(part.params[0], whole.params[0][offset:])


@pytest.mark.parametrize(
    ("rows", "columns", "start", "stop"), [(40, 64, 16, 32), (40, 64, 17, 30), (9, 7, 6, 7), (300, 8, 4, 8)]
)
def test_a_shard_of_columns_steps_as_its_part_of_the_whole(rows, columns, start, stop):
    whole = Tensors((rows, columns))
    part = whole.clone()
    for field in WHOLE:
        setattr(part, field, [getattr(whole, field)[0][:, start:stop].contiguous()])
    run_both(part, steps=1, shards=[ShardIndex(start, stop - start, columns)])
    whole.step("eager")
    assert same_bits(part.params[0], whole.params[0][:, start:stop])


def test_two_runs_and_other_groupings_give_the_same_bits():
    t = Tensors((700,), (33, 9))
    again, apart = t.clone(), t.clone()
    for tensors in (t, again):
        tensors.step("eager")
    assert_same_bits(t.outputs(), again.outputs())
    for i in (1, 0):
        apart.step("triton", {key: values[i : i + 1] for key, values in vars(apart).items()})
    assert_same_bits(t.outputs(), apart.outputs())


def test_a_gradient_that_is_one_number_for_all_is_only_read():
    t = Tensors((20, 30))
    t.grads = [torch.full((), 0.1, device=DEVICE).expand(20, 30)]
    run_both(t)


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        ({"dtype": torch.float64}, "torch.float64 weights have no kernel"),
        ({"grad_dtype": torch.float64}, "torch.float64 gradients have no kernel"),
        ({"tau": torch.float64}, "torch.float64 reference deltas have no kernel"),
        ({"tau": torch.bfloat16, "sparse": True}, r"a sparse delta with 2\^31 kept values has no kernel"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(dtypes, reason):
    tensors = Tensors((200,), **dtypes)
    if "sparse" in dtypes:
        tensors.taus = [SparseTensor(x.mask, x.values, x.offsets.long(), x.shape) for x in tensors.taus]
    before = tensors.clone()
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot serve tensor 0: {reason}; use impl='auto'"):
        tensors.step("triton")
    assert_same_bits(tensors.outputs(), before.outputs())
    tensors.step("auto")
    assert not torch.equal(tensors.exp_avgs[0], before.exp_avgs[0])


def test_rows_too_long_to_project_are_refused():
    # No page of them is touched.
    rows = [torch.empty_strided((2, 2**22 + 1), (2**22 + 1, 1), device=DEVICE)]
    with pytest.raises(RuntimeError, match="rows of 4194305 elements are too long to project; use project_over='tens"):
        Tensors((8,)).step("triton", dict.fromkeys(WHOLE, rows), method="onproj", project_over="rows")


@pytest.mark.parametrize(
    "options", [{"method": "onties"}, {"method": "onsoft"}, {"method": "onproj", "project": "onto"}], ids=str
)
def test_sums_of_a_whole_tensor_need_the_processes_that_hold_it(options):
    part = Tensors((300,))
    before = part.clone()
    with pytest.raises(ValueError, match="thresholds, projections and statistics are of whole tensors; pass Shards"):
        part.step("eager", shards=[ShardIndex(0, 300, 300)], **options)
    assert_same_bits(part.outputs(), before.outputs())


def test_what_shards_cannot_do_is_refused(monkeypatch):
    monkeypatch.setitem(SPARSIFY, "halves", lambda x, rate, key: torch.where(x > x.median(), x, 0.0))
    monkeypatch.setitem(METHODS, "halved", Method("halves", "none", "linear", "nowhere"))
    t = Tensors((20, 15))
    before = t.clone()
    shard = Shard(ShardIndex(7, 300, 300), (40, 15), ("some group",), ("some group",), cuts_rows=True)
    for message, options in {
        r"0.weight: F 'halves' is not known to work on shards of a tensor; step whole tensors": {"method": "halved"},
        r"0.weight: the shards cut through rows, which cannot be projected; use project_over='tensor'": {
            "method": "onproj", "project": "conflict", "project_over": "rows",
        },
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            t.step("eager", lists={"names": ["0.weight"]}, shards=[shard], **options)
    assert_same_bits(t.outputs(), before.outputs())


@pytest.mark.parametrize("column", ["tensor_ids", "steps", "shards", "masters"])
def test_a_list_that_is_too_short_is_named(column):
    t = Tensors((8,), (9,))
    with pytest.raises(ValueError, match=f"{column} must have one entry for each of the 2 params, got 0"):
        t.step("auto", {column: []})
    assert [step.item() for step in t.steps] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("weights", "master", "rounding", "reason"),
    [
        (torch.float32, torch.float32, "nearest", "torch.float32 weights have no torch.float32 master"),
        (torch.float16, torch.int16, "nearest", "torch.float16 weights have no torch.int16 master"),
        (torch.bfloat16, torch.float32, "stochastic", "a weight with a master is rounded to nearest"),
    ],
)
def test_masters_that_do_not_fit_are_refused(weights, master, rounding, reason):
    masters = [torch.zeros(8, dtype=master, device=DEVICE)]
    with pytest.raises(ValueError, match=f"tensor 0: {reason}"):
        Tensors((8,), dtype=weights).step("auto", {"masters": masters}, rounding=rounding)


@pytest.mark.parametrize(
    ("column", "bad", "reason"),
    [
        ("grads", torch.ones(9, device=DEVICE), r".* must have the parameter's shape \(8,\), got \[\(8,\), \(9,\)\]"),
        ("steps", torch.zeros((), dtype=torch.float64, device=DEVICE), "a step count must be fp32"),
        ("steps", torch.zeros((), device="meta"), ".*one of its tensors on meta; move it"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(column, bad, reason):
    t = Tensors((8,), (8,))
    with pytest.raises(ValueError, match=f"tensor 1: {reason}"):
        t.step("eager", {column: [getattr(t, column)[0], bad]})
    assert t.steps[0] == 4.0


def test_a_projection_onto_a_delta_that_is_stored_sparse_is_refused():
    t = Tensors((80,), sparse=True)
    before = t.clone()
    with pytest.raises(ValueError, match="tensor 0: project='conflict' needs the whole reference delta; pass"):
        t.step("auto", project="conflict")
    assert_same_bits(t.outputs(), before.outputs())


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_anchor_without_a_delta_is_left_alone(impl):
    anchor = functional.Anchor(torch.ones(8, device=DEVICE), torch.ones((), device=DEVICE))
    Tensors((8,), tau=None).step(impl, anchors=[anchor])
    assert (anchor.weights == 1).all()
    assert anchor.decay == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a stand-in for a capture, where there is none")
def test_what_a_graph_cannot_capture_is_said_and_changes_nothing(monkeypatch):
    workspace = functional.Workspace()
    t = Tensors((100,))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    before = t.clone()
    with pytest.raises(RuntimeError, match="can only capture a step of tensors and options that have taken one before"):
        t.step("triton", workspace=workspace)
    assert_same_bits(t.outputs(), before.outputs())
    capturing = False
    t.step("triton", workspace=workspace)
    before.step("eager")
    capturing = True
    # What the graph reads stays, whatever is stepped afterwards.
    t.step("triton", workspace=workspace)
    before.step("eager")
    assert_same_bits(t.outputs(), before.outputs())
    plan = workspace.keep(("step", "triton", DEVICE), None)
    captured = weakref.ref(plan._launches[0])
    capturing = False
    t.grads = [grad.clone() for grad in t.grads]
    t.step("triton", workspace=workspace)
    assert captured() is not None
    assert captured() is not plan._launches[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4},
        {"lr": 0.5},
        {"lr": np.float32(0.25)},
        {"reserve_rate": 0.5},
        {"rounding": "stochastic"},
        {"shards": [ShardIndex(8, 300, 300)]},
        {"lists": {"tensor_ids": [7]}},
        {"method": "onties", "vote": "paper"},
        {"found_inf": 1.0},
    ],
    ids=str,
)
def test_a_workspace_notices_what_has_changed(changed):
    t = Tensors((300,), tau=torch.bfloat16, sparse=True)
    by_eager = t.clone()
    workspace = functional.Workspace()
    for options in ({}, changed, {}):
        t.step("triton", workspace=workspace, **options)
        by_eager.step("eager", **options)
        assert_same_bits(t.outputs(), by_eager.outputs())
