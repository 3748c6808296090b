"""The line between two models: tensors and state dicts for many ratios, and a model moved along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from fused_merge import functional
from fused_merge.backend import check_impl
from fused_merge.names import canonical_name
from fused_merge.sources import SourceLike, TensorSource, match, open_source, same_bits

Model = TypeVar("Model", bound=nn.Module)

# Elements handed over at once: temporaries stay small whatever the tensor.
_CHUNK = 1 << 20


@overload
def interpolate(base: Tensor, tuned: Tensor, ratios: Sequence[float], *, impl: str = "auto") -> Tensor: ...


@overload
def interpolate(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], ratios: Sequence[float], *, impl: str = "auto"
) -> list[dict[str, Tensor]]: ...


def interpolate(
    base: Tensor | Mapping[str, Tensor],
    tuned: Tensor | Mapping[str, Tensor],
    ratios: Sequence[float],
    *,
    impl: str = "auto",
) -> Tensor | list[dict[str, Tensor]]:
    """Return theta(r) = base + r * (tuned - base) for R ratios, from one read of the two.

    Computed in fp32 (fp64 for fp64 tensors) from the nearer end and rounded once; r = 0 and r = 1 copy bits.
    Source: Lin et al. 2024 (arXiv 2309.06256). Nothing is mutated, and no gradient flows.

    Args:
        base: theta0: a floating tensor, or a state dict.
        tuned: theta1: of the same shape, dtype and device, or with the same names. A tied weight that only
            one state dict lists is accepted.
        ratios: R finite ratios; below 0 or above 1 they extrapolate.
        impl: `"auto"`, `"triton"` or `"eager"`.

    Returns:
        For tensors one tensor `[R, *shape]`. For state dicts a list of R dicts under the names of `base`;
        tied names share a tensor, and integer tensors are copies of `tuned`'s (`base`'s at r = 0).

    Raises:
        ValueError: for a ratio that is not finite, or tensors that do not match; the sentence names them.
        TypeError: if the two are not both tensors or both mappings.
    """
    ratios = check_ratios(ratios)
    if isinstance(base, Tensor) and isinstance(tuned, Tensor):
        return _points(base.detach(), tuned.detach(), ratios, impl)
    if not (isinstance(base, Mapping) and isinstance(tuned, Mapping)):
        raise TypeError(
            f"base and tuned must be two tensors or two state dicts, got a {type(base).__name__} "
            f"and a {type(tuned).__name__}; use interpolate_checkpoints for files, RatioSweep for modules"
        )
    start, end = open_source(base, role="base"), open_source(tuned, role="tuned")
    matched = match(start, end, same_dtype=True)
    points = {name: points_of(name, start, end, ratios, impl) for name in matched.names}
    stands_for = {raw: matched.resolve(canonical_name(raw)) for raw in base}
    return [{raw: points[name][i] for raw, name in stands_for.items()} for i in range(len(ratios))]


class RatioSweep(Generic[Model]):
    """Puts a model at any point of the line between two checkpoints, and back.

    ```python
    sweep = RatioSweep(model, "base/", "tuned/")
    for ratio in (0.0, 0.3, 0.6, 1.0):
        with sweep.at(ratio):
            print(ratio, evaluate(model))
    ```

    Only one tensor of each checkpoint is read at a time. Parameters and persistent buffers are written;
    integer ones are copied from `tuned` (from `base` at r = 0).

    Args:
        model: written in place inside `at`; its tensors keep their identity, device and strides.
        base: theta0, r = 0: a module, a state dict, a safetensors file or a Hugging Face folder.
        tuned: theta1, r = 1: the same.
        impl: `"auto"`, `"triton"` or `"eager"`.

    Raises:
        ValueError: if names, shapes or dtypes differ, if the model ties weights that `base` or `tuned` tell
            apart, or if it shares storage with them.
    """

    def __init__(self, model: Model, base: SourceLike, tuned: SourceLike, *, impl: str = "auto") -> None:
        self.model = model
        self._impl = check_impl(impl)
        self._ratio: float | None = None
        self._base = open_source(base, role="base")
        self._tuned = open_source(tuned, role="tuned")
        weights = self._open_model()
        ends = match(self._base, self._tuned, same_dtype=True)
        with_model = match(weights, self._base, same_dtype=True)
        # One entry for each tensor of the model: its first name, and its name in the checkpoints.
        self._plan: dict[str, str] = {}
        for name in weights:
            source_name = ends.resolve(with_model.resolve(name))
            owner = weights.aliases.get(name, name)
            self._check_tie(owner, name, self._plan.setdefault(owner, source_name), source_name)

    @contextmanager
    def at(self, ratio: float) -> Iterator[Model]:
        """Write theta(ratio) into the model for the duration of a `with` block.

        On leaving, also by an exception, every weight gets back the bits found on entry. They are kept as a
        copy on the CPU, except where they equal `base` or `tuned`, which are then read again.

        Args:
            ratio: any finite number; 0 is `base`, 1 is `tuned`.

        Raises:
            ValueError: if `ratio` is not finite, or the model now shares storage with `base` or `tuned`.
            RuntimeError: inside another `at` of this sweep.
        """
        (ratio,) = check_ratios([ratio])
        if self._ratio is not None:
            raise RuntimeError(f"the model is at ratio {self._ratio} already; leave that block first")
        weights = self._open_model()
        found: dict[str, Callable[[], Tensor]] = {}
        self._ratio = ratio
        try:
            for name, source_name in self._plan.items():
                weight = weights[name]
                ends = [source[source_name].to(weight.device) for source in (self._base, self._tuned)]
                found[name] = self._way_back(weight, source_name, ends)
                if weights.is_merged(name):
                    functional.interpolate(ends[:1], ends[1:], [ratio], [[weight]], impl=self._impl)
                else:
                    weight.copy_(ends[ratio != 0.0])
            yield self.model
        finally:
            self._ratio = None
            # Opened anew: the block may have moved the model to another device.
            weights = self._open_model()
            for name, way_back in found.items():
                weights[name].copy_(way_back())

    def _way_back(self, weight: Tensor, source_name: str, ends: Sequence[Tensor]) -> Callable[[], Tensor]:
        for source, end in zip((self._base, self._tuned), ends, strict=True):
            if same_bits(weight, end):
                return partial(source.__getitem__, source_name)
        copy = weight.to("cpu", copy=True)
        return lambda: copy

    def _open_model(self) -> TensorSource:
        weights = open_source(self.model, role="model")
        for source in (self._base, self._tuned):
            if _storages(weights) & _storages(source):
                raise ValueError(
                    f"the model shares storage with {source.origin}, which writing to it would change; "
                    "pass a deep copy or a saved checkpoint"
                )
        return weights

    def _check_tie(self, owner: str, name: str, first: str, second: str) -> None:
        for source in (self._base, self._tuned):
            if first != second and not same_bits(source[first], source[second]):
                raise ValueError(
                    f"the model ties {name!r} to {owner!r}, but {source.origin} holds other values for it; "
                    "untie them in the model (tie_word_embeddings=False)"
                )


def check_ratios(ratios: Sequence[float]) -> list[float]:
    """Return the ratios as a list of Python floats.

    Raises:
        ValueError: if there is none or one is not finite.
        TypeError: for a single number.
    """
    if isinstance(ratios, (int, float)):
        raise TypeError(f"ratios must be a sequence, got {ratios}; write [{ratios}]")
    if not list(ratios):
        raise ValueError("ratios is empty; give at least one number")
    return [functional.finite_ratio(ratio) for ratio in ratios]


def points_of(
    name: str, base: TensorSource, tuned: TensorSource, ratios: Sequence[float], impl: str
) -> Sequence[Tensor]:
    """Return R points of the tensor called `name`, which both sources hold, reading it once from each.

    Integer tensors are copies of `tuned`'s, `base`'s at r = 0.
    """
    ends = base[name], tuned[name]
    if base.is_merged(name):
        return _points(*ends, ratios, impl).unbind()
    return [ends[ratio != 0.0].clone() for ratio in ratios]


def _points(base: Tensor, tuned: Tensor, ratios: Sequence[float], impl: str) -> Tensor:
    if (base.shape, base.dtype, base.device) != (tuned.shape, tuned.dtype, tuned.device):
        raise ValueError(
            f"base is {list(base.shape)} {base.dtype} on {base.device} but tuned {list(tuned.shape)} "
            f"{tuned.dtype} on {tuned.device}; make shape, dtype and device the same"
        )
    points = torch.empty(len(ratios), base.numel(), dtype=base.dtype, device=base.device)
    bases, tuneds = (torch.split(end.reshape(-1), _CHUNK) for end in (base, tuned))
    outs = zip(*(torch.split(point, _CHUNK) for point in points), strict=True)
    functional.interpolate(bases, tuneds, ratios, list(outs), impl=impl)
    return points.view(len(ratios), *base.shape)


def _storages(source: TensorSource) -> set[int]:
    """Return the addresses of the memory behind a source; what is mapped from files is private to it."""
    if source.files():
        return set()
    return {tensor.untyped_storage().data_ptr() for tensor in source.values()} - {0}
