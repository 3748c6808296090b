"""A model moved along the path between two others, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from fused_merge import functional
from fused_merge.distributed import local_box, local_part, reshard
from fused_merge.functional.backend import check_impl
from fused_merge.io.match import match, own_names
from fused_merge.io.options import PathOptions
from fused_merge.io.sources import SourceLike, TensorSource, open_source, same_bits, whole_box
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import PerTensor, is_tuned, per_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


@documented(PathOptions)
class RatioSweep(Generic[Model]):
    """Puts a model at any point of the path between two models, and back.

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
        {options}

    Raises:
        ValueError: if names, shapes or dtypes do not fit, the model ties weights that `base` or `tuned` tell apart, it
            shares storage with them, or its shards are no boxes of tensors.
        TypeError: if `model` is no module.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("rlhf/")
        >>> sweep = fm.RatioSweep(model, "sft/", "rlhf/")
        >>> tokens, losses = torch.tensor([[1, 2, 3, 4]]), {}
        >>> for ratio in (0.0, 0.5, 1.0):
        ...     with sweep.at(ratio):
        ...         losses[ratio] = model(tokens, labels=tokens).loss.item()
        >>> losses[1.0] == model(tokens, labels=tokens).loss.item()  # the weights are back
        True
    """

    def __init__(
        self, model: Model, base: SourceLike, tuned: SourceLike, *, impl: str = "auto", **options: Unpack[PathOptions]
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got a {type(model).__name__}; use interpolate for state dicts")
        given = resolve(options, PathOptions)
        self.model = model
        self._impl = check_impl(impl)
        # Inside `at`: where the model is, and what brings back its bits: the number of an end or a copy.
        self._ratio: PerTensor | None = None
        self._originals: dict[str, Tensor | int] = {}
        opened = open_source(base, role="base"), open_source(tuned, role="tuned")
        ends = match(*opened, same_dtype=True, memory=True, **given)
        self._ends: tuple[TensorSource, ...] = (ends.first, ends.second)
        weights = self._open_model()
        matches = [match(weights, end, **given) for end in self._ends]
        self._ends = tuple(each.second for each in matches)
        # For each tensor of the model, its first name -> its name in each of the ends.
        self._source_names: dict[str, tuple[str | None, ...]] = {}
        for name in weights:
            pairs = [each.pairs.get(each.resolve(name)) for each in matches]
            held = tuple(pair and pair[1] for pair in pairs)
            if not any(held) or (given["unmatched"] != "copy" and not all(held)):
                continue
            self._check_dtype(name, weights, held)
            owner = weights.aliases.get(name, name)
            first = self._source_names.setdefault(owner, held)
            for source, a, b in zip(self._ends, first, held, strict=True):
                if a is not None and b is not None and a != b and not same_bits(source[a], source[b]):
                    raise ValueError(
                        f"the model ties {name!r} to {owner!r}, but {source.origin} holds other values for it; "
                        "untie them in the model (tie_word_embeddings=False)"
                    )
        self.names = tuple(n for n, own in self._source_names.items() if weights.is_merged(n) and None not in own)
        """The tensors that have a ratio, tied ones once under the model's first name."""

    @contextmanager
    def at(self, ratio: PerTensor) -> Iterator[Model]:
        """Write theta(ratio) into the model for the duration of a `with` block.

        On leaving, also by an exception, every weight gets back the bits found on entry. They are kept as a
        copy on the CPU, except where they equal `base` or `tuned`, which are then read again.

        Args:
            ratio: any finite number; 0 is `base`, 1 is `tuned`. Or a mapping, such as `LayerRatios`, from names or
                regular expressions on whole names to numbers.

        Yields:
            The model, mutated.

        Raises:
            ValueError: if the ratio is not finite or does not fit, or the model now shares storage with either end.
            RuntimeError: inside another `at` of this sweep.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> before = model.weight.detach().clone()
            >>> sweep = fm.RatioSweep(model, {"weight": torch.zeros(1, 2)}, {"weight": torch.ones(1, 2)})
            >>> with sweep.at(0.25):
            ...     print(model.weight.tolist())
            [[0.25, 0.25]]
            >>> torch.equal(model.weight, before)
            True
        """
        decided = self._decide(ratio)
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
                if isinstance(original, int):
                    original = self.ends_of(name, weights[name])[original]
                local_part(weights[name]).copy_(original)

    def move_to(self, ratio: PerTensor) -> None:
        """Write another point of the path into the model, inside `at`: two reads and one write of each weight.

        Args:
            ratio: as for `at`.

        Raises:
            ValueError: as for `at`; the model then stays where it is.
            RuntimeError: outside `at`.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> sweep = fm.RatioSweep(model, {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)})
            >>> with sweep.at(0.0):
            ...     for ratio in (0.25, 0.5):
            ...         sweep.move_to(ratio)
            ...         print(ratio, model.weight.item())
            0.25 0.25
            0.5 0.5
        """
        if self._ratio is None:
            raise RuntimeError("call move_to() inside `with sweep.at(ratio):`")
        self._write(ratio, self._decide(ratio))
        self._ratio = ratio

    def ends_of(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `base` and `tuned` hold of the model's tensor `weight`: this process's part, on its device.

        What one of them lacks, a tensor or rows of a larger vocabulary, is as in the other.
        """
        places = list(zip(self._ends, self._source_names[name], strict=True))
        base, tuned = (self._read(order, weight) for order in (places, places[::-1]))
        return base, tuned

    def _decide(self, ratio: PerTensor) -> dict[str, float]:
        """Return the ratio of every tensor, given by its name or by what it is called in the files of `base`."""
        base = self._ends[0]

        def in_files() -> dict[str, list[str]]:
            return {name: own_names(base, str(self._source_names[name][0])) for name in self.names}

        return per_tensor(ratio, self.names, what="ratio", also=in_files)

    def _read(self, places: Sequence[tuple[TensorSource, str | None]], weight: Tensor) -> Tensor:
        """Return this process's part of a tensor from the first place that has it, and further rows from the next."""
        device, held = local_part(weight).device, [(end, own) for end, own in places if own is not None]
        end, own = held[0]
        box = local_box(weight)
        if end.shape(own) == weight.shape:
            return end.box(own, box).to(device)
        rows, *columns = box or whole_box(weight.shape)
        parts, row = [], rows.start
        for end, own in held:
            if (stop := min(rows.stop, end.shape(own)[0])) > row:
                parts.append(end.box(own, (slice(row, stop), *columns)).to(device))
                row = stop
        return torch.cat([*parts, local_part(weight)[row - rows.start :].to(parts[0])])

    def _write(self, ratio: PerTensor, decided: Mapping[str, float]) -> None:
        weights = self._open_model()
        for name in self._source_names:
            base, tuned = ends = self.ends_of(name, weights[name])
            local = local_part(weights[name])
            if name not in self._originals:
                same = (i for i, end in enumerate(ends) if same_bits(local, end))
                found = next(same, None)
                self._originals[name] = local.to("cpu", copy=True) if found is None else found
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

    def _check_dtype(self, name: str, weights: TensorSource, held: Sequence[str | None]) -> None:
        end, own = next((end, own) for end, own in zip(self._ends, held, strict=True) if own is not None)
        if weights.dtype(name) != end.dtype(own) and not weights.is_merged(name):
            raise ValueError(
                f"{name!r} is {weights.dtype(name)} in the model and {end.dtype(own)} in {end.origin}; integers "
                "are copied as they are, so both must have one dtype"
            )

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
