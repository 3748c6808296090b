"""The step: eager by hand, against numpy and against torch; the kernel against eager, bit for bit."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import reference
import torch
from device import DEVICE

from fused_merge import functional
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.shard import ShardIndex
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import sparsify_tau
from fused_merge.methods import merge_rule
from fused_merge.names import tensor_id

NAME = "layers.0.weight"
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.05, "seed": 3}
STORAGE = [torch.float32, torch.bfloat16, torch.float16]


def sparse_tau(tau, name):
    kept = sparsify_tau(tau, name=name, method="random", reserve_rate=0.1, seed=3)
    return SparseTensor.pack(kept, kept != 0)


class Tensors:
    """Parameters, gradients, states and deltas of some sizes, mid-run; `clone` for the other backend."""

    def __init__(self, shapes, dtype=torch.float32, grad_dtype=None, tau=torch.float32, sparse=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(shape, scale, dtype=torch.float32):
            return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)

        self.params = [draw(shape, 1.0, dtype) for shape in shapes]
        self.grads = [draw(shape, 0.1, grad_dtype or dtype) for shape in shapes]
        self.exp_avgs = [draw(shape, 0.1) for shape in shapes]
        self.exp_avg_sqs = [draw(shape, 0.1).square() for shape in shapes]
        self.steps = [torch.tensor(4.0, device=DEVICE) for _ in shapes]
        self.ids = [tensor_id(f"layers.{i}.weight") for i in range(len(shapes))]
        self.taus = [None if tau is None else draw(shape, 1e-2, tau) for shape in shapes]
        if sparse:
            self.taus = [sparse_tau(tau, f"layers.{i}.weight") for i, tau in enumerate(self.taus)]

    def clone(self):
        other = object.__new__(Tensors)
        other.__dict__ = {
            key: [x.clone() if isinstance(x, torch.Tensor) else x for x in values]
            for key, values in self.__dict__.items()
        }
        return other

    def step(self, impl, **options):
        options = HYPER | {"method": "ondare", "reserve_rate": 0.1} | options
        extras = {key: options.pop(key) for key in ("seed", "shards", "workspace") if key in options}
        hyper = Hyper(**{key: options.pop(key) for key in Hyper._fields if key in options})
        functional.merging_adamw_(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, self.taus,
            rule=merge_rule(**options), hyper=hyper, tensor_ids=self.ids, impl=impl, **extras,
        )  # fmt: skip

    def outputs(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.steps]


def assert_same_bits(a, b):
    for x, y in zip(a.outputs(), b.outputs(), strict=True):
        assert x.dtype == y.dtype
        # NaN has many patterns; where there is none, equal means equal bits.
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def run_both(tensors, steps=2, **options):
    by_eager = tensors.clone()
    for _ in range(steps):
        tensors.step("triton", **options)
        by_eager.step("eager", **options)
    assert_same_bits(tensors, by_eager)
    return tensors


def test_one_merged_step_by_hand():
    # b1 = b2 = 0, eps = 0: u = -lr * sign(g). lr = 0.5, wd = 0.5, alpha = 0.25, p = 1.
    t = Tensors([(3,)])
    t.params, t.grads = [torch.tensor([1.0, 2.0, -4.0])], [torch.tensor([3.0, -2.0, 1.0])]
    t.exp_avgs, t.exp_avg_sqs = [torch.zeros(3)], [torch.zeros(3)]
    t.taus, t.steps = [torch.tensor([4.0, 0.0, 8.0])], [torch.tensor(0.0)]
    t.step(
        "eager",
        lr=0.5,
        betas=(0.0, 0.0),
        eps=0.0,
        weight_decay=0.5,
        alpha=0.25,
        reserve_rate=1.0,
        method="ondare",
    )
    # theta * 0.75 + 0.75 * u + 0.25 * tau with u = (-0.5, +0.5, -0.5)
    assert t.params[0].tolist() == [0.75 - 0.375 + 1.0, 1.5 + 0.375, -3.0 - 0.375 + 2.0]
    assert t.exp_avgs[0].tolist() == [3.0, -2.0, 1.0]
    assert t.exp_avg_sqs[0].tolist() == [9.0, 4.0, 1.0]
    assert t.steps[0].item() == 1.0


def test_one_onties_step_by_hand():
    # u = -lr * g: after m = g, v = 1 (from v = 1, g irrelevant with b2 = 1 - 0), take p = 0.5 of four.
    t = Tensors([(4,)])
    t.params, t.grads = [torch.zeros(4)], [torch.tensor([4.0, -3.0, 2.0, 1.0])]
    t.exp_avgs, t.exp_avg_sqs = [torch.zeros(4)], [torch.zeros(4)]
    t.taus, t.steps = [torch.tensor([8.0, 8.0, 8.0, 8.0])], [torch.tensor(0.0)]
    # With eps so large that it is the denominator: u = -g * lr / eps = -g.
    t.step(
        "eager", lr=2.0**40, betas=(0.0, 0.0), eps=2.0**40, weight_decay=0.0, alpha=0.5, reserve_rate=0.5,
        method="onties",
    )  # fmt: skip
    # F(u) = (-4, 3, 0, 0); votes: 4, 11, 8, 8 all +: u of the first is dropped.
    assert t.params[0].tolist() == [4.0, 5.5, 4.0, 4.0]


NUMPY_CASES = [
    {"method": "ondare", "reserve_rate": 0.1},
    {"method": "ondare", "reserve_rate": 0.1, "rescale": False},
    {"method": "ondare", "reserve_rate": 1.0},
    {"method": "onties", "reserve_rate": 0.2},
    {"method": "onties", "reserve_rate": 0.2, "vote": "paper"},
    {"method": "onties", "reserve_rate": 1.0},
]


@pytest.mark.parametrize("options", NUMPY_CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_an_independent_calculation(options, dtype):
    n = 3001
    rng = np.random.default_rng(0)
    draw = lambda scale: (scale * rng.normal(size=n)).astype(np.float32)  # noqa: E731
    # Mid-run: in Adam's first step every |u| is lr, and rounding would choose the top.
    theta, m, v, tau = draw(1.0), draw(0.1), draw(0.1) ** 2, draw(1e-2)
    options = HYPER | options
    expected = reference.Run(theta, m, v, 4, tau, NAME, **options)
    t = Tensors([(n,)])
    t.params, t.exp_avgs, t.exp_avg_sqs, t.taus = ([torch.tensor(x, dtype=dtype)] for x in (theta, m, v, expected.tau))
    t.steps, t.ids = [torch.tensor(4.0)], [tensor_id(NAME)]
    for _ in range(5):
        g = rng.normal(size=n).astype(np.float32)
        expected.step(g)
        t.grads = [torch.tensor(g, dtype=dtype)]
        t.step("eager", **options)
    for ours, theirs in ((t.params, expected.theta), (t.exp_avgs, expected.m), (t.exp_avg_sqs, expected.v)):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        assert np.abs(ours[0].double().numpy() - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_without_merging_it_is_torch_adamw(impl):
    shapes = [(300,), (17, 31), (2, 3, 5)]
    t = Tensors(shapes)
    t.steps = [torch.zeros((), device=DEVICE) for _ in shapes]
    t.exp_avgs, t.exp_avg_sqs = ([torch.zeros(shape, device=DEVICE) for shape in shapes] for _ in range(2))
    theirs = [torch.nn.Parameter(p.clone()) for p in t.params]
    peer = torch.optim.AdamW(theirs, lr=1e-2, betas=HYPER["betas"], eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        t.grads = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
        for p, g in zip(theirs, t.grads, strict=True):
            p.grad = g.clone()
        peer.step()
        t.step(impl, alpha=0.0, reserve_rate=1.0)
    for i, p in enumerate(theirs):
        for ours, other in (
            (t.params[i], p.detach()),
            (t.exp_avgs[i], peer.state[p]["exp_avg"]),
            (t.exp_avg_sqs[i], peer.state[p]["exp_avg_sq"]),
        ):
            assert (ours - other).abs().max() <= 1e-6 * other.abs().max()
        assert t.steps[i] == peer.state[p]["step"] == 20


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_no_worse_than_torch_adamw(impl, dtype):
    shapes = [(300,), (17, 31)]
    t = Tensors(shapes, dtype)
    t.steps = [torch.zeros((), device=DEVICE) for _ in shapes]
    t.exp_avgs, t.exp_avg_sqs = ([torch.zeros(shape, device=DEVICE) for shape in shapes] for _ in range(2))
    runs = {kind: [torch.nn.Parameter(p.clone().to(kind)) for p in t.params] for kind in (dtype, torch.float64)}
    options = {"lr": 1e-2, "betas": HYPER["betas"], "eps": 1e-6, "weight_decay": 0.1}
    peers = [torch.optim.AdamW(params, **options) for params in runs.values()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        t.grads = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
        for kind, params in runs.items():
            for p, g in zip(params, t.grads, strict=True):
                p.grad = g.to(kind)
        for peer in peers:
            peer.step()
        t.step(impl, alpha=0.0, reserve_rate=1.0, eps=1e-6)
    for ours, theirs, exact in zip(t.params, runs[dtype], runs[torch.float64], strict=True):
        our_error = (ours.double() - exact).abs()
        their_error = (theirs.double() - exact).abs()
        assert our_error.max() <= their_error.max()
        assert our_error.mean() <= their_error.mean()


TAUS = [
    (None, False),
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
    (torch.float32, True),
]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(("tau", "sparse"), TAUS, ids=lambda x: str(x))
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_kernel_equals_eager(dtype, tau, sparse, rate):
    run_both(
        Tensors([(1,), (0,), (127,), (32, 32), (1025,), (3, 7, 501)], dtype, tau=tau, sparse=sparse),
        reserve_rate=rate,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rescale": False},
        {"weight_decay": 0.0},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"seed": -1},
        {"seed": 2**63 + 5},
    ],
    ids=str,
)
def test_kernel_equals_eager_with_every_option(options):
    run_both(Tensors([(2000,), (77,)], tau=torch.bfloat16), **options)


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.permutations(STORAGE, 2)), ids=str)
def test_kernel_equals_eager_with_gradients_of_another_dtype(dtype, grad_dtype):
    run_both(Tensors([(2000,)], dtype, grad_dtype=grad_dtype))


def test_kernel_equals_eager_on_a_large_tensor():
    run_both(Tensors([(100_003,)], tau=torch.bfloat16, sparse=True), steps=1)


def test_tensors_with_and_without_a_delta_mix():
    t = Tensors([(500,), (500,), (30,)])
    t.taus[1] = None
    run_both(t)


def test_a_tensor_without_a_delta_steps_as_adamw():
    t = Tensors([(500,)], tau=None)
    plain = t.clone()
    plain.taus = [torch.zeros(500, device=DEVICE)]
    t.step("eager")
    plain.step("eager", alpha=0.0, reserve_rate=1.0)
    assert_same_bits(t, plain)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_at_lr_zero_the_moments_move_and_the_weights_do_not(impl, lr, dtype):
    t = Tensors([(1000,)], dtype)
    t.params[0][:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    before = t.clone()
    t.step(impl, lr=lr)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(t.params[0].view(width), before.params[0].view(width))
    assert not torch.equal(t.exp_avgs[0], before.exp_avgs[0])
    assert not torch.equal(t.exp_avg_sqs[0], before.exp_avg_sqs[0])
    assert t.steps[0] == before.steps[0] + 1


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_tensor_learning_rate_is_the_float(impl):
    t = Tensors([(1000,)])
    other = t.clone()
    t.step(impl, lr=torch.tensor(0.01, dtype=torch.float64))
    other.step(impl, lr=0.01)
    assert_same_bits(t, other)


@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_a_nan_gradient_reaches_everything(method):
    t = Tensors([(1000,)])
    t.grads[0][5] = torch.nan
    t.step("eager", method=method, reserve_rate=1.0)
    for tensor in (t.params[0], t.exp_avgs[0], t.exp_avg_sqs[0]):
        assert tensor.isnan().nonzero().flatten().tolist() == [5]


EVERY_ROW = [
    {},
    {"method": "onties"},
    {"method": "onsoft"},
    {"method": "onproj", "reserve_rate": None, "sparse": False},
    {"method": "onproj", "reserve_rate": None, "sparse": False, "project_over": "rows"},
    {"rounding": "stochastic"},
]


@pytest.fixture
def in_blocks_of(monkeypatch):
    """Make the kernels work in blocks of this size."""
    from fused_merge.kernels import launch

    prepare = launch.prepare

    def set_block(block):
        monkeypatch.setattr(launch, "prepare", lambda *args, **kwargs: prepare(*args, **kwargs, block=block))

    return set_block


@pytest.mark.parametrize("options", EVERY_ROW, ids=str)
@pytest.mark.parametrize("block", [1024, 2048])
def test_the_block_size_does_not_show(block, options, in_blocks_of):
    options = dict(options)
    sparse = options.pop("sparse", True)
    in_blocks_of(block)
    run_both(Tensors([(5000,), (1025,), (3, 2100)], tau=torch.bfloat16, sparse=sparse), steps=1, **options)


def test_elements_beyond_32_bits(monkeypatch):
    """The last chunks of a tensor of 2^31 elements and some, whose pages before them nobody touches."""
    from fused_merge.kernels import layout

    n, tail = 2**31 + 5000, 5000 + 2 * layout.DEFAULT_BLOCK
    split = layout.split_programs

    def last_ones(*args):
        whole, ends = split(*args)
        return layout.Programs(whole[-2:], ends)

    monkeypatch.setattr(layout, "split_programs", last_ones)
    # Neither filled with zeros nor, by the tests, with NaN: 21 GB that need no memory.
    buffers = [torch.empty_strided((n,), (1,), dtype=torch.bfloat16, device=DEVICE) for _ in range(5)]
    small = Tensors([(tail,)], torch.bfloat16, tau=torch.bfloat16)
    small.exp_avgs, small.exp_avg_sqs = ([x.bfloat16() for x in y] for y in (small.exp_avgs, small.exp_avg_sqs))
    large = small.clone()
    for field, buffer in zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "taus"), buffers, strict=True):
        buffer[-tail:] = getattr(small, field)[0]
        setattr(large, field, [buffer])
    large.step("triton")
    small.step("eager", shards=[ShardIndex(n - tail, tail, tail)])
    for field in ("params", "exp_avgs", "exp_avg_sqs"):
        assert torch.equal(getattr(large, field)[0][-tail:], getattr(small, field)[0])


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 2**34, 2**34 + 1])
def test_a_shard_of_rows_steps_as_its_part_of_the_whole(offset):
    n = 1500
    shard = [ShardIndex(offset, n, n)]
    part = run_both(Tensors([(n,)]), steps=1, shards=shard)
    if offset < 2**20:
        whole = Tensors([(offset + n,)])
        for field in ("params", "grads", "exp_avgs", "exp_avg_sqs", "taus"):
            getattr(whole, field)[0][offset:] = getattr(Tensors([(n,)]), field)[0]
        whole.step("eager")
        assert torch.equal(part.params[0], whole.params[0][offset:])


@pytest.mark.parametrize(
    ("rows", "columns", "start", "stop"), [(40, 64, 16, 32), (40, 64, 17, 30), (9, 7, 6, 7), (300, 8, 4, 8)]
)
def test_a_shard_of_columns_steps_as_its_part_of_the_whole(rows, columns, start, stop):
    whole = Tensors([(rows, columns)])
    part = whole.clone()
    for field in ("params", "grads", "exp_avgs", "exp_avg_sqs", "taus"):
        setattr(part, field, [getattr(whole, field)[0][:, start:stop].contiguous()])
    run_both(part, steps=1, shards=[ShardIndex(start, stop - start, columns)])
    whole.step("eager")
    assert torch.equal(part.params[0], whole.params[0][:, start:stop])


@pytest.mark.parametrize("shift", [1, 3])
def test_unaligned_views_and_nothing_past_their_end(shift):
    n, guard = 1500, 64
    buffers = {key: torch.full((n + 2 * guard,), 7.0, device=DEVICE) for key in ("params", "exp_avgs", "exp_avg_sqs")}
    t = Tensors([(n,)], tau=torch.bfloat16)
    expected = t.clone()
    for key, buffer in buffers.items():
        view = buffer[guard + shift : guard + shift + n]
        setattr(t, key, [view.copy_(getattr(t, key)[0])])
    t.step("triton")
    expected.step("eager")
    assert_same_bits(t, expected)
    for buffer in buffers.values():
        assert (buffer[: guard + shift] == 7.0).all()
        assert (buffer[guard + shift + n :] == 7.0).all()


def test_two_runs_and_other_groupings_give_the_same_bits():
    t = Tensors([(700,), (33, 9)])
    again, apart = t.clone(), t.clone()
    t.step("eager")
    again.step("eager")
    assert_same_bits(t, again)
    fields = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "ids", "taus")
    for i in (1, 0):
        one = t.clone()
        for field in fields:
            setattr(one, field, [getattr(apart, field)[i]])
        one.step("triton")
    assert_same_bits(t, apart)


def test_permuted_strides_number_elements_row_major():
    t = Tensors([(20, 30)])
    strided = t.clone()
    strided.params = [t.params[0].t().contiguous().t()]
    strided.grads = [t.grads[0].t().contiguous().t()]
    t.step("eager")
    strided.step("auto")
    assert_same_bits(t, strided)


def test_what_the_kernel_cannot_do_is_said():
    projection = {"method": "onproj", "reserve_rate": None}
    long_rows = Tensors([(2, 2**22 + 1)])
    many_kept = Tensors([(2000,)], tau=torch.bfloat16, sparse=True)
    many_kept.taus = [SparseTensor(x.mask, x.values, x.offsets.long(), x.shape) for x in many_kept.taus]
    cases = [
        (Tensors([(8,)], torch.float64), {}, "torch.float64 weights have no kernel"),
        (Tensors([(8,)], grad_dtype=torch.float64), {}, "torch.float64 gradients have no kernel"),
        (Tensors([(8,)], tau=torch.float64), {}, "torch.float64 reference deltas have no kernel"),
        (many_kept, {}, r"a sparse delta with 2\^31 kept values has no kernel"),
        (long_rows, projection | {"project_over": "rows"}, "rows of 4194305 elements are too long to project; use"),
    ]
    for tensors, options, reason in cases:
        before = tensors.clone()
        with pytest.raises(RuntimeError, match=f"impl='triton' cannot serve tensor 0: {reason}.*; use impl='auto'"):
            tensors.step("triton", **options)
        assert_same_bits(tensors, before)
        tensors.step("auto", **options)
        assert not torch.equal(tensors.exp_avgs[0], before.exp_avgs[0])


@pytest.mark.parametrize("column", ["tensor_ids", "steps", "shards", "masters"])
def test_a_list_that_is_too_short_is_named(column):
    t = Tensors([(8,), (9,)])
    lists = {"steps": t.steps, "tensor_ids": t.ids, "shards": None, "masters": None} | {column: []}
    with pytest.raises(ValueError, match=f"{column} must have one entry for each of the 2 params, got 0"):
        functional.merging_adamw_(
            t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, lists.pop("steps"), t.taus, rule=merge_rule("ondare"),
            hyper=Hyper(1e-2, (0.9, 0.99), 1e-8, 0.0, 0.1), **lists,
        )  # fmt: skip
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
    t = Tensors([(8,)], weights)
    with pytest.raises(ValueError, match=f"tensor 0: {reason}"):
        functional.merging_adamw_(
            t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.steps, t.taus, tensor_ids=t.ids,
            masters=[torch.zeros(8, dtype=master, device=DEVICE)], rule=merge_rule("ondare", rounding=rounding),
            hyper=Hyper(1e-2, (0.9, 0.99), 1e-8, 0.0, 0.1),
        )  # fmt: skip


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_anchor_without_a_delta_is_left_alone(impl):
    t = Tensors([(8,)], tau=None)
    anchor = functional.Anchor(torch.ones(8, device=DEVICE), torch.ones((), device=DEVICE))
    functional.merging_adamw_(
        t.params, t.grads, t.exp_avgs, t.exp_avg_sqs, t.steps, t.taus, tensor_ids=t.ids, anchors=[anchor],
        rule=merge_rule("ondare"), hyper=Hyper(1e-2, (0.9, 0.99), 1e-8, 0.1, 0.1), impl=impl,
    )  # fmt: skip
    assert (anchor.weights == 1).all()
    assert anchor.decay == 1


def test_shapes_that_differ_are_named():
    t = Tensors([(8,), (9,)])
    t.grads[1] = torch.ones(8)
    with pytest.raises(
        ValueError, match=r"tensor 1: .* must have the parameter's shape \(9,\), got \[\(8,\), \(9,\)\]"
    ):
        t.step("eager")
    assert t.steps[0] == 4.0


def test_what_a_graph_cannot_capture_is_said_and_changes_nothing(monkeypatch):
    if DEVICE.type == "cuda":
        pytest.skip("a stand-in for a capture, where there is none")
    workspace = functional.Workspace()
    t = Tensors([(100,)])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    before = t.clone()
    with pytest.raises(RuntimeError, match="can only capture a step of tensors and options that have taken one before"):
        t.step("triton", workspace=workspace)
    assert_same_bits(t, before)
    capturing = False
    t.step("triton", workspace=workspace)
    before.step("eager")
    capturing = True
    # What the graph reads stays, whatever is stepped afterwards.
    t.step("triton", workspace=workspace)
    before.step("eager")
    assert_same_bits(t, before)
    (plan,) = workspace._kept.values()
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
        {"tensor_ids": [7]},
        {"method": "onties", "vote": "paper"},
        {"found_inf": 1.0},
    ],
    ids=str,
)
def test_a_workspace_notices_what_has_changed(changed):
    t = Tensors([(300,)], tau=torch.bfloat16, sparse=True)
    by_eager = t.clone()
    workspace = functional.Workspace()
    for options in ({}, changed, {}):
        options = dict(options)
        ids = options.pop("tensor_ids", t.ids)
        for tensors, own in ((t, {"impl": "triton", "workspace": workspace}), (by_eager, {"impl": "eager"})):
            tensors.ids = ids
            tensors.step(**own, **options)
        assert_same_bits(t, by_eager)


def test_a_gradient_that_is_one_number_for_all_is_only_read():
    t = Tensors([(20, 30)])
    t.grads = [torch.full((), 0.1, device=DEVICE).expand(20, 30)]
    run_both(t)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (torch.zeros((), dtype=torch.float64, device=DEVICE), "a step count must be fp32"),
        (torch.zeros((), device="meta"), "one of its tensors on meta; move it"),
    ],
    ids=str,
)
def test_a_step_count_that_no_kernel_could_read_is_refused(step, reason):
    t = Tensors([(8,)])
    t.steps = [step]
    with pytest.raises(ValueError, match=f"tensor 0: .*{reason}"):
        t.step("eager")
