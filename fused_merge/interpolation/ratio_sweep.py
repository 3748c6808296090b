"""A model moved along the path between two others, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor, nn

from fused_merge import functional
from fused_merge.distributed import local_box, local_part, reshard
from fused_merge.functional.backend import check_impl
from fused_merge.io.match import match
from fused_merge.io.sources import SourceLike, TensorSource, open_source, same_bits
from fused_merge.per_tensor import PerTensor, is_tuned, per_tensor

Model = TypeVar("Model", bound=nn.Module)


class RatioSweep(Generic[Model]):
    """Puts a model at any point of the path between two models, and back.

    ```python
    sweep = RatioSweep(model, "base/", "tuned/")
    for ratio in (0.0, 0.3, 0.6, 1.0):
        with sweep.at(ratio):
            print(ratio, evaluate(model))
    ```

    Only one tensor of each checkpoint is read at a time. Parameters and persistent buffers are written; integer ones
    are copied from `tuned` (from `base` where every ratio is 0). If the model has another floating dtype than `base`
    and `tuned`, each point is rounded once to the model's. If it is sharded with FSDP2, each process reads and writes
    its own elements.

    Args:
        model: written in place inside `at`; its tensors keep their identity, device and strides. It may be wrapped in
            DDP, or sharded with FSDP2.
        base: theta0, r = 0: a module, a state dict, a safetensors file or a Hugging Face folder.
        tuned: theta1, r = 1: the same.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`, as for `functional.interpolate`.

    Raises:
        ValueError: if names, shapes or dtypes do not fit, the model ties weights that `base` or `tuned` tell apart, it
            shares storage with them, or its shards are no boxes of tensors.
        TypeError: if `model` is no module.
    """

    def __init__(self, model: Model, base: SourceLike, tuned: SourceLike, *, impl: str = "auto") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got a {type(model).__name__}; use interpolate for state dicts")
        self.model = model
        self._impl = check_impl(impl)
        # Inside `at`: where the model is, and what brings back its bits: a source with them or a copy.
        self._ratio: PerTensor | None = None
        self._originals: dict[str, Tensor | TensorSource] = {}
        self._ends = start, end = open_source(base, role="base"), open_source(tuned, role="tuned")
        weights = self._open_model()
        ends, with_model = match(start, end, same_dtype=True), match(weights, start)
        # For each tensor of the model, its first name -> its name in the checkpoints.
        self._source_names: dict[str, str] = {}
        for name in weights:
            source_name = ends.resolve(with_model.resolve(name))
            stored = start.dtype(source_name)
            if weights.dtype(name) != stored and not weights.is_merged(name):
                raise ValueError(
                    f"{name!r} is {weights.dtype(name)} in the model and {stored} in {start.origin}; integers "
                    "are copied as they are, so both must have one dtype"
                )
            owner = weights.aliases.get(name, name)
            first = self._source_names.setdefault(owner, source_name)
            for source in self._ends:
                if first != source_name and not same_bits(source[first], source[source_name]):
                    raise ValueError(
                        f"the model ties {name!r} to {owner!r}, but {source.origin} holds other values for it; "
                        "untie them in the model (tie_word_embeddings=False)"
                    )
        self.names = tuple(name for name in self._source_names if weights.is_merged(name))
        """The tensors that have a ratio, tied ones once under the model's first name."""

    @contextmanager
    def at(self, ratio: PerTensor) -> Iterator[Model]:
        """Write theta(ratio) into the model for the duration of a `with` block.

        On leaving, also by an exception, every weight gets back the bits found on entry. They are kept as a
        copy on the CPU, except where they equal `base` or `tuned`, which are then read again.

        `ratio` is any finite number; 0 is `base`, 1 is `tuned`. Or a mapping, such as `LayerRatios`, from names or
        regular expressions on whole names to numbers. Raises ValueError if it is not finite or does not fit, or the
        model now shares storage with either end; RuntimeError inside another `at` of this sweep.
        """
        decided = per_tensor(ratio, self.names, what="ratio")
        if self._ratio is not None:
            raise RuntimeError(f"the model is at ratio {self._ratio} already; leave that block, or use move_to")
        self._ratio = ratio
        try:
            self._write(ratio, decided)
            yield self.model
        finally:
            originals, self._originals, self._ratio = self._originals, {}, None
            # Opened anew: the block may have moved the model to another device.
            weights = self._open_model() if originals else {}
            for name, original in originals.items():
                if isinstance(original, TensorSource):
                    original = original.box(self._source_names[name], local_box(weights[name]))
                local_part(weights[name]).copy_(original)

    def move_to(self, ratio: PerTensor) -> None:
        """Write another point of the path into the model, inside `at`: two reads and one write of each weight.

        Raises as `at`; the model then stays where it is. RuntimeError outside `at`.
        """
        if self._ratio is None:
            raise RuntimeError("call move_to() inside `with sweep.at(ratio):`")
        self._write(ratio, per_tensor(ratio, self.names, what="ratio"))
        self._ratio = ratio

    def ends_of(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `base` and `tuned` hold of the model's tensor `weight`: this process's part, on its device."""
        where, device = (self._source_names[name], local_box(weight)), local_part(weight).device
        base, tuned = (end.box(*where).to(device) for end in self._ends)
        return base, tuned

    def _write(self, ratio: PerTensor, decided: Mapping[str, float]) -> None:
        weights = self._open_model()
        for name in self._source_names:
            base, tuned = ends = self.ends_of(name, weights[name])
            local = local_part(weights[name])
            if name not in self._originals:
                held = (source for source, end in zip(self._ends, ends, strict=True) if same_bits(local, end))
                self._originals[name] = next(held, None) or local.to("cpu", copy=True)
            if name not in decided:
                local.copy_(ends[is_tuned(ratio, decided)])
            elif decided[name] in (0.0, 1.0):
                local.copy_(ends[int(decided[name])])
            elif local.dtype == base.dtype:
                functional.interpolate([base], [tuned], [decided[name]], [[local]], impl=self._impl)
            else:
                # Contiguous all: with other strides the point would be rounded to the dtype of the ends first.
                base, tuned, point = base.contiguous(), tuned.contiguous(), local.contiguous()
                functional.interpolate([base], [tuned], [decided[name]], [[point]], impl=self._impl)
                if point is not local:
                    local.copy_(point)

    def _open_model(self) -> TensorSource:
        reshard(self.model)
        weights = open_source(self.model, role="model")
        addresses = {local_part(tensor).untyped_storage().data_ptr() for tensor in weights.values()} - {0}
        for end in self._ends:
            # What is mapped from files is private to the source.
            tensors = () if end.files() else end.values()
            if any(local_part(tensor).untyped_storage().data_ptr() in addresses for tensor in tensors):
                raise ValueError(
                    f"the model shares storage with {end.origin}, which writing to it would change; "
                    "pass a deep copy or a saved checkpoint"
                )
        return weights
