"""What `bench/gpu_suite.py` steps: the operations of `bench/roofline.py` as calls, on tensors shaped like a model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_merge as fm
from fused_merge import functional
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Anchor, Hyper, Shard, merge_rule
from fused_merge.names import tensor_id

LR, BETAS, EPS, ALPHA = 1e-6, (0.9, 0.999), 1e-8, 1e-6
# The standard deviation of gradients, and where in a run they are.
GRADIENT, STEP = 1e-3, 1000.0
SEED = 5


class Shape(NamedTuple):
    """The sizes of a transformer with grouped key and value heads and a gated feed-forward network."""

    vocabulary: int
    hidden: int
    key_value: int
    inner: int
    layers: int

    def tensors(self) -> list[tuple[int, ...]]:
        """Return the shapes of its parameters."""
        vocabulary, hidden, key_value, inner, layers = self
        attention = [(hidden, hidden), (hidden,), *2 * [(key_value, hidden), (key_value,)], (hidden, hidden)]
        network = [(inner, hidden), (inner, hidden), (hidden, inner)]
        return [(vocabulary, hidden), *layers * [*attention, *network, (hidden,), (hidden,)], (hidden,)]

    @property
    def parameters(self) -> int:
        """How many they hold together."""
        return sum(torch.Size(shape).numel() for shape in self.tensors())


# 290 tensors of 0.49 B parameters; 194 of 0.03 B, where the host shows; 14 to compare; and what an interpreter can do.
LARGE = Shape(151936, 896, 128, 4864, 24)
SMALL = Shape(8192, 384, 128, 1024, 16)
FEW = Shape(3000, 256, 64, 1000, 1)
TINY = Shape(6, 20, 0, 0, 0)


class Case(NamedTuple):
    """How a step of ours is called."""

    method: str = "ondare"
    reserve_rate: float | None = 0.01
    tau: str = "sparse"  # "dense", or "none" for plain AdamW
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = {}  # noqa: RUF012 - never written
    master: torch.dtype | None = None
    merge_every: int = 1


PROJECT = {"project": "conflict"}
BF16 = torch.bfloat16
# Checked as unaligned shards too.
SHARDED = ("ondare, p = 0.01", "onties, p = 0.01", "onproj, rows", "ondare, K = 4, at a merge", "bf16 ondare, split")
# By the names that they have in `bench/roofline.py`.
CASES = {
    "adamw": Case(reserve_rate=1.0, tau="none"),
    "ondare, p = 1": Case(reserve_rate=1.0, tau="dense"),
    "ondare, p = 0.01": Case(),
    "ondare, p = 0.3": Case(reserve_rate=0.3),
    "onties, p = 0.01": Case("onties"),
    "onties, p = 0.01, first step": Case("onties"),
    "onproj, tensor": Case("onproj", None, "dense", options=PROJECT),
    "onproj, rows": Case("onproj", None, "dense", options=PROJECT | {"project_over": "rows"}),
    "ondare, K = 4, between merges": Case(merge_every=4),
    "ondare, K = 4, at a merge": Case(merge_every=4),
    "bf16 adamw": Case(reserve_rate=1.0, tau="none", dtype=BF16),
    "bf16 ondare, split": Case(dtype=BF16, master=torch.int16),
    "bf16 ondare, p = 0.01": Case(dtype=BF16),
}
# Rows that are checked and not timed.
MORE_CASES = {
    "onsoft": Case("onsoft", 0.05),
    "onties, paper's vote, wide": Case("onties", 0.3, options={"vote": "paper"}),
    "onproj, rows of u": Case(
        "onproj", None, "dense", options=PROJECT | {"project_over": "rows", "project_on": "update"}
    ),
    "bf16 ondare, stochastic": Case(dtype=BF16, options={"rounding": "stochastic"}),
    "bf16 onties, stochastic": Case("onties", dtype=BF16, options={"rounding": "stochastic"}),
}


class Pool:
    """Tensors of given shapes, made when first asked for: steps that are timed against one another share them."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, *, shifted: bool = False) -> None:
        """Make nothing yet; `shifted` tensors begin one element after an aligned address and end their allocation."""
        self.shapes = shapes
        self.device = device
        self._shifted = shifted
        self._made: dict[Any, list[Any]] = {}

    def place(self, x: Tensor) -> Tensor:
        """Return a tensor as this pool lays it out."""
        if not self._shifted:
            return x
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)

    def _keep(self, key: Any, make: Callable[[tuple[int, ...]], Any]) -> list[Any]:
        if key not in self._made:
            self._made[key] = [make(shape) for shape in self.shapes]
        return self._made[key]

    def _normal(self, key: Any, deviation: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        def make(shape: tuple[int, ...]) -> Tensor:
            return self.place((deviation * torch.randn(shape, device=self.device)).to(dtype))

        return self._keep((key, dtype), make)

    def params(self, dtype: torch.dtype) -> list[Tensor]:
        """Return weights."""
        return self._normal("params", 0.02, dtype)

    def grads(self, dtype: torch.dtype) -> list[Tensor]:
        """Return gradients."""
        return self._normal("grads", GRADIENT, dtype)

    def moments(self, owner: str) -> tuple[list[Tensor], list[Tensor]]:
        """Return both moments, as many steps on such gradients leave them."""
        beta1 = BETAS[0]

        def second(shape: tuple[int, ...]) -> Tensor:
            return self.place(GRADIENT**2 * (1 + 0.02 * torch.randn(shape, device=self.device)).abs())

        first = self._normal(("m", owner), GRADIENT * ((1 - beta1) / (1 + beta1)) ** 0.5)
        return first, self._keep(("v", owner), second)

    def steps(self, owner: str) -> list[Tensor]:
        """Return step counts, beside the weights."""
        return self._keep(("steps", owner), lambda _: torch.full((), STEP, device=self.device))

    def taus(self, kind: str, rate: float | None) -> list[Any]:
        """Return F(tau) in bf16."""
        if kind == "none":
            return [None] * len(self.shapes)
        dense = self._normal("tau", 1e-3, BF16)
        if kind == "dense":
            return dense
        rest = iter(dense)

        def pack(_: tuple[int, ...]) -> SparseTensor:
            tau = next(rest)
            return SparseTensor.pack(tau, torch.rand(tau.shape, device=tau.device) < rate)

        return self._keep(("sparse", rate), pack)

    def masters(self, dtype: torch.dtype | None) -> list[Any]:
        """Return masters, split or fp32."""
        if dtype is None:
            return [None] * len(self.shapes)
        return self._keep(
            ("master", dtype), lambda shape: self.place(torch.zeros(shape, dtype=dtype, device=self.device))
        )

    def anchors(self, params: list[Tensor], merge_every: int) -> list[Any]:
        """Return what step-K keeps."""
        if merge_every == 1:
            return [None] * len(self.shapes)
        weights = iter(params)

        def make(_: tuple[int, ...]) -> Anchor:
            return Anchor(self.place(next(weights).clone()), torch.ones((), device=self.device))

        return self._keep(("anchors", params[0].dtype), make)

    def refresh(self) -> None:
        """Draw all gradients anew, in place."""
        for key, tensors in self._made.items():
            if key[0] == "grads":
                for grad in tensors:
                    grad.normal_(std=GRADIENT)


@dataclass
class Stepper:
    """A step of ours on tensors of a pool."""

    case: Case
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    taus: list[Any]
    masters: list[Any]
    anchors: list[Any]
    shards: list[Shard] | None = None
    impl: str = "triton"
    lr: float = LR
    workspace: functional.Workspace = field(default_factory=functional.Workspace)

    @classmethod
    def of(cls, case: Case, pool: Pool, owner: str = "", **options: Any) -> Stepper:
        """Take from a pool what a case needs; steps of one owner share moments and counts."""
        params = pool.params(case.dtype)
        return cls(
            case,
            params,
            pool.grads(case.dtype),
            *pool.moments(owner),
            pool.steps(owner),
            pool.taus(case.tau, case.reserve_rate),
            pool.masters(case.master),
            pool.anchors(params, case.merge_every),
            **options,
        )

    def copy(self, device: torch.device, impl: str) -> Stepper:
        """Return the same step on copies of everything."""

        def there(x: Any) -> Any:
            if isinstance(x, Anchor):
                return Anchor(there(x.weights), there(x.decay))
            if isinstance(x, Tensor):
                return x.to(device, copy=True)
            return x.to(device) if isinstance(x, SparseTensor) else x

        columns = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps)
        rest = (self.taus, self.masters, self.anchors)
        copies = [[there(x) for x in column] for column in (*columns, *rest)]
        return Stepper(self.case, *copies, shards=self.shards, impl=impl, lr=self.lr)

    def step(self) -> None:
        """Take a step."""
        case = self.case
        functional.merging_adamw_(
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            self.taus,
            rule=merge_rule(case.method, case.reserve_rate, **case.options),
            hyper=Hyper(self.lr, BETAS, EPS, 0.0, ALPHA, merge_every=case.merge_every),
            tensor_ids=[tensor_id(f"layers.{i}.weight") for i in range(len(self.params))],
            seed=SEED,
            shards=self.shards,
            masters=self.masters,
            anchors=self.anchors,
            workspace=self.workspace,
            impl=self.impl,
        )

    def lose_threshold(self) -> None:
        """Take a step four times as long: the next one finds its k-th largest magnitude far below the last."""
        self.lr *= 4
        self.step()
        self.lr /= 4

    def set_steps(self, count: float) -> None:
        """Set the number of steps taken."""
        torch._foreach_zero_(self.steps)
        torch._foreach_add_(self.steps, count)

    def written(self) -> Iterator[tuple[str, Tensor]]:
        """Yield by name what a step changes."""
        yield from (("weights", x) for x in self.params)
        yield from (("first moments", x) for x in self.exp_avgs)
        yield from (("second moments", x) for x in self.exp_avg_sqs)
        yield from (("step counts", x) for x in self.steps)
        yield from (("masters", x) for x in self.masters if x is not None)
        for anchor in self.anchors:
            yield from (("anchors", x) for x in anchor or () if isinstance(x, torch.Tensor))


def differences(one: Tensor, other: Tensor) -> int:
    """Return how many elements of two tensors differ in a bit."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int((one.cpu().contiguous().view(as_integers) != other.cpu().contiguous().view(as_integers)).sum())


class Captured:
    """A step as a CUDA graph, captured after steps that warm up; without a GPU the step itself."""

    def __init__(self, step: Callable[[], Any], gpu: bool, warm_up: int = 3) -> None:
        """Warm up and capture; `step` is kept, since the graph uses what it owns."""
        self._step = self._run = step
        if not gpu:
            step()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self._run = graph.replay

    def __call__(self) -> None:
        """Take the step."""
        self._run()


def optimizers() -> dict[str, Callable[..., Any]]:
    """Return the optimizers that are captured, by name."""
    return {
        "ondare, p = 0.01": partial(fm.OnDAREAdamW, reserve_rate=0.01),
        "onties, p = 0.01": partial(fm.OnTIESAdamW, reserve_rate=0.01),
        "onproj, tensor": fm.OnProjAdamW,
        "ondare, K = 3, clipped": partial(fm.OnDAREAdamW, reserve_rate=0.3, merge_every=3, max_grad_norm=1e-2),
    }


def model(shape: Shape, device: torch.device) -> tuple[dict[str, torch.nn.Parameter], fm.ReferenceDelta]:
    """Return named parameters with gradients and a reference delta for them."""
    torch.manual_seed(0)
    base = {f"layers.{i}.weight": 0.02 * torch.randn(size) for i, size in enumerate(shape.tensors())}
    tuned = {name: x + 1e-3 * torch.randn(x.shape) for name, x in base.items()}
    params = {name: torch.nn.Parameter(x.to(device)) for name, x in tuned.items()}
    for param in params.values():
        param.grad = GRADIENT * torch.randn_like(param)
    return params, fm.ReferenceDelta.from_models(base, tuned)
