"""What `make bench` steps: lists of tensors, and everyone who steps them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from gpu_cases import BETAS, GRADIENT, LARGE, LR, STEP
from paired import Run
from published import PublishedOnlineMerging
from roofline import touched
from torch import Tensor, nn

import fused_merge as fm

RATE = 0.01
FUSED = "torch fused"

REAL = "Qwen2.5-0.5B, 4 of 24 layers"
ONE = "one of 16.8 M"
TINY = "600 of 16 elements"
# Without the embedding, a quarter of that model's weights that would take most of the time: 59.6 M in 49 tensors.
LISTS: dict[str, list[tuple[int, ...]]] = {
    REAL: LARGE._replace(layers=4).tensors()[1:],
    ONE: [(4096, 4096)],
    "one of 4.2 M": [(2048, 2048)],
    "one of 1 M": [(1024, 1024)],
    "300 of 8192 elements": 300 * [(64, 128)],
    TINY: 600 * [(16,)],
}
# Over torch fused, of every method that has a target; the methods' own hold from a million parameters on.
TINY_TARGET = 1.5

# Elements between the gradients of two rounds, at most, and what their distance is a multiple of.
SLACK, ALIGNMENT = 2**16, 16


class Tensors:
    """Weights of given shapes, with gradients, moments and a reference delta; everyone steps the same."""

    def __init__(self, shapes: Iterable[tuple[int, ...]]) -> None:
        torch.manual_seed(0)
        self.shapes = list(shapes)
        self.numel = sum(torch.Size(shape).numel() for shape in self.shapes)
        self.names = [f"layers.{i}.weight" for i in range(len(self.shapes))]
        self._weights = self._normal(0.02)
        self._params: dict[torch.dtype, list[nn.Parameter]] = {}
        self._gradients: dict[torch.dtype, Tensor] = {}

    def _normal(self, deviation: float) -> list[Tensor]:
        return [deviation * torch.randn(shape) for shape in self.shapes]

    def named(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        """Return tensors by name."""
        return dict(zip(self.names, tensors, strict=True))

    def params(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """Return the parameters of a dtype, with new gradients: torch-optimi's foreach step changes those it has."""
        if dtype not in self._params:
            self._params[dtype] = [nn.Parameter(x.to(dtype)) for x in self._weights]
        self._gradients[dtype] = (GRADIENT * torch.randn(self.numel + SLACK)).to(dtype)
        self.refresh()
        return self._params[dtype]

    def refresh(self) -> None:
        """Give every parameter another gradient, as a step of training would: ranked updates need that they differ."""
        for dtype, params in self._params.items():
            begin = random.randrange(0, SLACK, ALIGNMENT)
            for param in params:
                param.grad = self._gradients[dtype][begin : begin + param.numel()].view_as(param)
                begin += param.numel()

    @cached_property
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Both moments, as many steps on such gradients leave them."""
        first = self._normal(GRADIENT * ((1 - BETAS[0]) / (1 + BETAS[0])) ** 0.5)
        return first, [GRADIENT**2 * (1 + 0.02 * x).abs() for x in self._normal(1.0)]

    def started(self, optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return an optimizer that has taken many steps."""
        for param, first, second in zip(params, *self.moments, strict=True):
            state = {"step": torch.tensor(STEP), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
            optimizer.state[param].update(state)
        return optimizer

    @cached_property
    def delta(self) -> fm.ReferenceDelta:
        """The reference delta of two bf16 models."""
        base = [x.bfloat16() for x in self._weights]
        tuned = [(x + change).bfloat16() for x, change in zip(self._weights, self._normal(1e-3), strict=True)]
        return fm.ReferenceDelta.from_models(self.named(base), self.named(tuned))

    @cached_property
    def fused(self) -> Run:
        """A step of torch's fused AdamW on fp32 weights, which all others are compared with."""
        return torch_adamw(self, fused=True)


@lru_cache(maxsize=1)
def tensors_of(case: str) -> Tensors:
    """Return the tensors of a list; those of the list before are let go."""
    return Tensors(LISTS[case])


def torch_adamw(tensors: Tensors, dtype: torch.dtype = torch.float32, **options: bool) -> Run:
    params = tensors.params(dtype)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **options)
    # Its moments have the dtype of the weights.
    return (tensors.started(optimizer, params) if dtype == torch.float32 else optimizer).step


def optimi_adamw(tensors: Tensors, **options: bool) -> Run:
    import optimi

    return optimi.AdamW(tensors.params(), lr=LR, betas=BETAS, eps=1e-8, weight_decay=0.0, **options).step


def published(tensors: Tensors, method: str) -> Run:
    taus = [tensors.delta.tensor(name).float() for name in tensors.names]
    optimizer = PublishedOnlineMerging(tensors.params(), taus, method, RATE)
    return tensors.started(optimizer, tensors.params()).step


def merging(tensors: Tensors, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    params = tensors.params(dtype)
    named = tensors.named(params).items()
    return tensors.started(fm.MergingAdamW(named, reference_delta=tensors.delta, lr=LR, **options), params).step


def unmerged(tensors: Tensors) -> Run:
    """Our AdamW: the delta holds one other parameter, which has no gradient."""
    delta = fm.ReferenceDelta.from_models({"other": torch.zeros(1)}, {"other": torch.ones(1)})
    named = {**tensors.named(tensors.params()), "other": nn.Parameter(torch.zeros(1))}
    optimizer = fm.MergingAdamW(named.items(), reference_delta=delta, missing="plain", lr=LR)
    return tensors.started(optimizer, tensors.params()).step


class Contender(NamedTuple):
    """Someone who steps a list of tensors."""

    make: Callable[[Tensors], Run]
    bytes: float  # per parameter, that have to move
    target: float | None = None  # over torch fused
    dtype: torch.dtype = torch.float32
    cases: tuple[str, ...] = tuple(LISTS)
    steps: int = 1  # in a round

    def target_of(self, case: str) -> float | None:
        """Return the target on a list."""
        return TINY_TARGET if self.target is not None and case == TINY else self.target


def step_bytes(weight: int = 4, tau: float = 0.0, share: float = 1.0, more: float = 0.0) -> float:
    """Return the bytes per parameter of a step with fp32 moments that has to touch a share of the weights."""
    gradient, moments = weight, 4 * 4
    return gradient + moments + 2 * weight * share + tau + more


def sparse_bytes(weight: int = 4) -> float:
    """Return those of a step that keeps little of u and of tau: a line of 64 bytes is touched or it is not."""
    return step_bytes(weight, SPARSE_TAU, touched(1 - (1 - RATE) ** 2, weight, 64))


# Of bf16: all of it; or a bit an element, an offset a block, and what is kept.
DENSE_TAU, SPARSE_TAU = 2.0, 1 / 8 + 4 / 1024 + 2 * RATE
BF16 = torch.bfloat16
RANDOM, RANKED = {"method": "ondare", "reserve_rate": RATE}, {"method": "onties", "reserve_rate": RATE}
ROWS = {"method": "onproj", "project_over": "rows"}

# Of ours: options, bytes with fp32 and with bf16 weights, and the target over torch fused of both.
TARGETS: dict[str, tuple[dict[str, Any], tuple[float, float], float]] = {
    "ondare, p = 1": (
        {"method": "ondare", "reserve_rate": 1.0}, (step_bytes(4, DENSE_TAU), step_bytes(2, DENSE_TAU)), 1.2
    ),
    "ondare, p = 0.01": (RANDOM, (sparse_bytes(4), sparse_bytes(2)), 1.5),
    "onties, p = 0.01": (RANKED, (sparse_bytes(4), sparse_bytes(2)), 1.7),
    "onproj, tensor": (
        {"method": "onproj"},
        (step_bytes(4, DENSE_TAU, more=4 + DENSE_TAU), step_bytes(2, DENSE_TAU, more=2 + DENSE_TAU)),
        1.8,
    ),
    "onproj, rows": (ROWS, (step_bytes(4, DENSE_TAU), step_bytes(2, DENSE_TAU)), 1.5),
}  # fmt: skip
LARGE_ONES, EAGER_ONE = (REAL, ONE), ("one of 4.2 M",)

CONTENDERS: dict[str, Contender] = {
    # Against itself: how far a ratio is to be trusted.
    FUSED: Contender(partial(torch_adamw, fused=True), step_bytes()),
    "torch foreach": Contender(partial(torch_adamw, foreach=True), step_bytes()),
    "torch for-loop": Contender(partial(torch_adamw, foreach=False), step_bytes()),
    # All states in bf16 too: it takes no others.
    "torch fused, all bf16": Contender(partial(torch_adamw, dtype=BF16, fused=True), 7 * 2, None, BF16),
    "torch-optimi": Contender(optimi_adamw, step_bytes()),
    "torch-optimi foreach": Contender(partial(optimi_adamw, foreach=True), step_bytes()),
    "published ondare, p = 0.01": Contender(partial(published, method="ondare"), step_bytes(4, 4)),
    "published onties, p = 0.01": Contender(partial(published, method="onties"), step_bytes(4, 4)),
    "fused_merge adamw": Contender(unmerged, step_bytes()),
    **{
        name: Contender(partial(merging, **options), wide, target)
        for name, (options, (wide, _), target) in TARGETS.items()
    },
    **{
        f"{name}, bf16": Contender(partial(merging, dtype=BF16, **options), narrow, target, BF16, LARGE_ONES)
        for name, (options, (_, narrow), target) in TARGETS.items()
    },
    "ondare, p = 0.01, bf16, split master": Contender(
        partial(merging, dtype=BF16, master="split", **RANDOM),
        step_bytes(2, SPARSE_TAU, more=2 * 2),
        None,
        BF16,
        LARGE_ONES,
    ),
    "ondare, p = 0.01, K = 4": Contender(
        partial(merging, merge_every=4, **RANDOM),
        step_bytes(more=(8 + SPARSE_TAU) / 4),
        None,
        cases=LARGE_ONES,
        steps=4,
    ),
    "ondare, p = 0.01, statistics": Contender(
        partial(merging, stats_every=1, **RANDOM), sparse_bytes(), None, cases=LARGE_ONES
    ),
    "onties, p = 0.01, statistics": Contender(
        partial(merging, stats_every=1, **RANKED), sparse_bytes(), None, cases=LARGE_ONES
    ),
    "ondare, p = 0.01, eager": Contender(
        partial(merging, impl="eager", **RANDOM), sparse_bytes(), None, cases=EAGER_ONE
    ),
    "onties, p = 0.01, eager": Contender(
        partial(merging, impl="eager", **RANKED), sparse_bytes(), None, cases=EAGER_ONE
    ),
}
