"""Adapters side by side: what they add to each weight, written as one adapter or into the weights of their base.

An adapter adds scale * B A to a weight, and the sum of several such products is again one: c1 s1 B1 A1 + c2 s2 B2 A2 =
s [B1, B2] [c1 s1/s A1; c2 s2/s A2]. So a linear combination of adapters is an adapter of the summed rank: the columns
of all B side by side, as they are, and the rows of all A, each times its number and rounded once. Nothing is ever
merged but the product: the mean of two A times the mean of two B is no mean of anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.checkpoints.plan import (
    AlignedSegment,
    AlignedTensor,
    CopyRule,
    OutputFile,
    Rule,
    lay_out_file,
    lay_out_files,
    merged_share,
)
from fused_merge.eager.low_rank import low_rank_delta
from fused_merge.eager.merge import Coefficients, mask_key, merge_deltas
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.shard import ShardIndex
from fused_merge.io.adapters import Adapter, Factors
from fused_merge.io.files import reading
from fused_merge.io.formats import ADAPTER_FILE
from fused_merge.io.match import stored_whole
from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.sources import FileRange, FileSource, read_range
from fused_merge.io.ties import TIEABLE, ties
from fused_merge.methods import MergeMethod
from fused_merge.names import kind_of

# Elements of a weight that are made at once, so that temporaries stay in a cache.
_BLOCK = 1 << 16

# Where the modules of an adapter are chosen in its configuration.
_TARGETS = "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"
# Options that pair tensors by name, and what they are where they do nothing.
_PAIRING = {
    "unmatched": "error",
    "align_vocabulary": False,
    "strip_prefix": (),
    "rename": {},
    "any_architecture": False,
}


class ScaleRule(NamedTuple):
    """The rule of rows of A: the input times a number."""

    factor: float

    @property
    def telling(self) -> Sequence[int]:
        """The only output."""
        return (0,)

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Scale."""
        wide = compute_dtype(inputs[0].dtype)
        factor = torch.tensor(self.factor, dtype=wide, device=inputs[0].device)
        outs[0].copy_(inputs[0].to(wide) * factor)


class ColumnsRule(NamedTuple):
    """The rule of B: the columns of several matrices, each a place and its number of columns, side by side."""

    places: tuple[tuple[FileRange, int], ...]
    rows: int
    copies: bool  # whether all have the dtype of the output

    @property
    def telling(self) -> Sequence[int]:
        """The only output, unless it is a copy."""
        return () if self.copies else (0,)

    @property
    def bytes_read(self) -> int:
        """Bytes of all columns."""
        return self.rows * sum(place.dtype.itemsize * columns for place, columns in self.places)

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Read the rows that the elements lie in."""
        (out,) = outs
        width, numel = sum(columns for _, columns in self.places), out.numel()
        start, stop = first // width, -(-(first + numel) // width)
        parts = []
        for place, columns in self.places:
            with reading(place.file) as handle:
                part = read_range(handle, place, start * columns, (stop - start) * columns)
            parts.append(part.view(-1, columns).to(out.dtype))
        out.copy_(torch.cat(parts, dim=1).view(-1)[first - start * width :][:numel])


class Product(NamedTuple):
    """What an adapter adds to a weight, seen as `[rows, columns]`."""

    a: FileRange
    b: FileRange
    rank: int
    scale: float
    transposed: bool
    inner: tuple[int, int]  # the columns of A and the rows of B

    def block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return some rows, for which no more of one factor and all of the other is read."""
        columns, rows = self.inner
        with reading(self.a.file) as a, reading(self.b.file) as b:
            if self.transposed:
                own = [read_range(a, self.a, k * columns + start, stop - start) for k in range(self.rank)]
                left = torch.stack(own, dim=1)
                right = read_range(b, self.b, 0, rows * self.rank).view(rows, self.rank).T
            else:
                left = read_range(b, self.b, start * self.rank, (stop - start) * self.rank).view(-1, self.rank)
                right = read_range(a, self.a, 0, self.rank * columns).view(self.rank, columns)
        return low_rank_delta(left.to(dtype), right.to(dtype), self.scale)


class AddProductsRule(NamedTuple):
    """The rule of a weight of the base: for each output a merge of the products, as deltas, onto the input."""

    name: str  # of the tensor
    method: MergeMethod
    own: tuple[Coefficients, ...]  # of each output
    products: tuple[Product | None, ...]  # of each adapter; None where it has none for this weight
    shape: tuple[int, int]  # of the weight as a matrix
    seed: int

    @property
    def telling(self) -> Sequence[int]:
        """Every output."""
        return range(len(self.own))

    @property
    def bytes_read(self) -> int:
        """Bytes of all factors, each counted once."""
        held = [each for each in self.products if each is not None]
        return sum(p.rank * (p.a.dtype.itemsize * p.inner[0] + p.b.dtype.itemsize * p.inner[1]) for p in held)

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Make the products row by row, and merge them."""
        (weight,) = inputs
        held = [each for each in self.products if each is not None]
        wide = compute_dtype(weight.dtype, *(place.dtype for each in held for place in (each.a, each.b)))
        columns, key, last = self.shape[1], mask_key(self.name, self.seed), first + weight.numel()
        rows = max(1, _BLOCK // columns)
        for row in range(first // columns, -(-last // columns), rows):
            begin, end = max(first, row * columns), min(last, (row + rows) * columns)
            here, cut = slice(begin - first, end - first), slice(begin - row * columns, end - row * columns)
            start, until = weight[here].to(wide), -(-end // columns)
            deltas = [
                torch.zeros_like(start) if each is None else each.block(row, until, wide).view(-1)[cut].to(start.device)
                for each in self.products
            ]
            block = key._replace(shard=ShardIndex(begin, end - begin, end - begin))
            for out, own in zip(outs, self.own, strict=True):
                if not any(own.weights):
                    # As it is, a negative zero and all.
                    out[here].copy_(weight[here])
                    continue
                out[here] = merge_deltas(start, deltas, self.method, own, row=columns, key=block, dtype=out.dtype)


def check_options(options: Mapping[str, Any], *, into_base: bool, config_source: int | None) -> None:
    """Raise ValueError for an option that means nothing where adapters are merged."""
    if into_base and config_source not in (None, 0):
        raise ValueError("config_from must be the base: an adapter has no configuration of a model")
    idle = dict(_PAIRING) if into_base else {**_PAIRING, "max_shard_size": None}
    for option, value in idle.items():
        if options[option] != value:
            what = "pairs tensors of whole models" if option in _PAIRING else "splits no adapter, which is one file"
            raise ValueError(f"{option} {what}, and here adapters are merged; leave it out")


def weights_of(adapters: Sequence[Adapter]) -> list[str]:
    """Return the weights that adapters are for, as their base calls them."""
    return list(dict.fromkeys(weight for adapter in adapters for weight in adapter.factors))


def combined_adapter(
    adapters: Sequence[Adapter],
    numbers: Mapping[str, Sequence[float]],
    *,
    config_source: int,
    dtype: torch.dtype | None,
    only: str,
) -> tuple[OutputFile, dict[str, Any]]:
    """Return the file of the sum of numbers[i] times what adapter i adds to each weight, and its configuration.

    An adapter whose number is 0 takes no rank. One alone with the number 1 is copied, as its configuration is.

    Args:
        adapters: the adapters.
        numbers: for each of `weights_of`, a number for each adapter.
        config_source: whose configuration decides what is not of factors.
        dtype: dtype of the factors written; None is that of the adapters, which must agree.
        only: the name of the output folder.

    Raises:
        ValueError: if factors of one weight differ in shape or dtype, or nothing is left.
    """
    tensors: list[AlignedTensor] = []
    rules: dict[str, Iterator[Rule]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    used: set[int] = set()
    for weight in weights_of(adapters):
        parts = [
            (adapter, adapter.factors[weight], number)
            for adapter, number in zip(adapters, numbers[weight], strict=True)
            if number and weight in adapter.factors
        ]
        if not parts:
            continue
        used.update(i for i, number in enumerate(numbers[weight]) if number and weight in adapters[i].factors)
        _check_alike(weight, parts, dtype)
        scales = {factors.scale for _, factors, _ in parts}
        scale = scales.pop() if len(scales) == 1 else 1.0
        adapter, factors, _ = parts[0]
        rank = sum(own.rank for _, own, _ in parts)
        ranks[weight.removesuffix(".weight")] = rank, scale
        rows: list[AlignedSegment] = []
        rows_by: list[Rule] = []
        for each, own, number in parts:
            factor = number if own.scale == scale else number * own.scale / scale
            rows.append(AlignedSegment(prod(each.source.shape(own.a)), (each.source.file_range(own.a),), factor != 1.0))
            rows_by.append(CopyRule((0,)) if factor == 1.0 else ScaleRule(factor))
        shape, written = adapter.source.kind(factors.a)
        tensors.append(AlignedTensor(factors.a, dtype or written, (rank, *shape[1:]), tuple(rows)))
        rules[factors.a] = iter(rows_by)
        shape, written = adapter.source.kind(factors.b)
        places = tuple((each.source.file_range(own.b), own.rank) for each, own, _ in parts)
        whole = AlignedSegment(shape[0] * rank, (places[0][0],) if len(places) == 1 else (), False)
        tensors.append(AlignedTensor(factors.b, dtype or written, (shape[0], rank, *shape[2:]), (whole,)))
        copies = all(place.dtype == (dtype or written) for place, _ in places)
        rules[factors.b] = iter([CopyRule((0,)) if len(places) == 1 else ColumnsRule(places, shape[0], copies)])
    if not tensors:
        raise ValueError(f"every number of {', '.join(each.source.origin for each in adapters)} is 0; nothing is left")
    file = lay_out_file(ADAPTER_FILE, tensors, lambda tensor, _: next(rules[tensor.name]), {"format": "pt"})
    contributing = [adapters[i] for i in sorted(used)]
    if len(contributing) == 1:
        config = dict(contributing[0].config)
    else:
        config = _configuration(adapters[config_source], contributing, ranks)
    return file._replace(only=only), config


def into_base(
    base: FileSource,
    adapters: Sequence[Adapter],
    method: MergeMethod,
    own: Mapping[str, Sequence[Coefficients]],
    options: Mapping[str, Any],
) -> tuple[list[OutputFile], float]:
    """Return the files of the base with a merge of what adapters add to its weights, and the share that is merged.

    Args:
        base: the model that the adapters are for.
        adapters: the adapters.
        method: a method of `addable`.
        own: for each of `weights_of`, the coefficients of each output.
        options: `dtype`, `max_shard_size` and `seed`.

    Raises:
        ValueError: if the base lacks a weight, has it in another shape, or ties it to another.
    """
    check_mergeable(base)
    places, products = stored_whole(base), {}
    for weight in weights_of(adapters):
        held = [each.factors.get(weight) and _product(each, each.factors[weight]) for each in adapters]
        if (name := places.get(weight)) is None:
            raise ValueError(
                f"{base.origin} has no tensor {weight!r}, which {_of(adapters, weight)} adapts; give the base that the "
                "adapter was trained on"
            )
        if kind_of(weight) in TIEABLE and ties(base):
            raise ValueError(
                f"{base.origin} may tie {weight!r} to another weight, which {_of(adapters, weight)} does not adapt; "
                "merge it with merge_and_unload() of PEFT, after untying them"
            )
        shape = tuple(base.shape(name))
        for each in filter(None, held):
            matrix = each.inner if each.transposed else each.inner[::-1]
            if not shape or (shape[0], prod(shape[1:])) != matrix or not base.is_merged(name):
                raise ValueError(
                    f"{name!r} of {base.origin} is {list(shape)}, and {_of(adapters, weight)} adds {list(matrix)} to "
                    "it; give the base that the adapter was trained on"
                )
        matrix = shape[0], prod(shape[1:])
        products[name] = AddProductsRule(name, method, tuple(own[weight]), tuple(held), matrix, options["seed"])
    tensors = []
    for name in base:
        shape, written = base.kind(name)
        if options["dtype"] is not None and base.is_merged(name):
            written = options["dtype"]
        segment = AlignedSegment(prod(shape), (base.file_range(name),), name in products)
        tensors.append(AlignedTensor(name, written, tuple(shape), (segment,)))
    outputs = len(next(iter(own.values())))

    def rule_of(tensor: AlignedTensor, _: AlignedSegment) -> Rule:
        return products.get(tensor.name) or CopyRule((0,) * outputs)

    return lay_out_files(tensors, base, rule_of, options["max_shard_size"]), merged_share(tensors)


def addable(method: MergeMethod) -> bool:
    """Return whether a method merges deltas element by element, so that products can be its deltas."""
    given = method.deltas and method.weights_from == "given"
    return given and not method.has_thresholds and method.sparsify != "ranked"


def _product(adapter: Adapter, factors: Factors) -> Product:
    a, b = adapter.source.shape(factors.a), adapter.source.shape(factors.b)
    places = adapter.source.file_range(factors.a), adapter.source.file_range(factors.b)
    return Product(*places, factors.rank, factors.scale, factors.transposed, (prod(a[1:]), b[0]))


def _of(adapters: Sequence[Adapter], weight: str) -> str:
    """Return the first adapter that is for a weight, as messages call it."""
    return next(each.source.origin for each in adapters if weight in each.factors)


def _check_alike(weight: str, parts: Sequence[tuple[Adapter, Factors, float]], dtype: torch.dtype | None) -> None:
    """Raise ValueError if factors of one weight do not fit side by side."""
    first, factors, _ = parts[0]
    for other, own, _ in parts[1:]:
        for a, b, dim in ((factors.a, own.a, 0), (factors.b, own.b, 1)):
            kinds = first.source.kind(a), other.source.kind(b)
            cut = [(*shape[:dim], *shape[dim + 1 :]) for shape, _ in kinds]
            if cut[0] != cut[1] or factors.transposed != own.transposed:
                raise ValueError(
                    f"the factors of {weight!r} do not fit: {a!r} is {list(kinds[0][0])} in {first.source.origin} and "
                    f"{list(kinds[1][0])} in {other.source.origin}; give adapters of one base"
                )
            if dtype is None and kinds[0][1] != kinds[1][1]:
                raise ValueError(
                    f"{a!r} is {kinds[0][1]} in {first.source.origin} and {kinds[1][1]} in {other.source.origin}; say "
                    "which to write with dtype='bfloat16' or another"
                )


def _configuration(
    like: Adapter, adapters: Sequence[Adapter], ranks: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """Return the configuration of an adapter whose modules have these ranks and scales."""
    alphas = {module: rank * scale for module, (rank, scale) in ranks.items()}
    rank = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        **like.config,
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {f"^{re.escape(module)}": own for module, (own, _) in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(module)}": _number(own) for module, own in alphas.items() if own != alpha},
    }
    chosen = [[_unordered(each.config.get(key)) for key in _TARGETS] for each in adapters]
    same_modules = all(each.factors.keys() == adapters[0].factors.keys() for each in adapters)
    if not same_modules or any(each != chosen[0] for each in chosen):
        # Whatever chose them in each: all of them by name.
        config |= {**dict.fromkeys(_TARGETS), "target_modules": sorted(ranks)}
    return config


def _number(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _unordered(chosen: Any) -> Any:
    return set(map(str, chosen)) if isinstance(chosen, (list, tuple)) else chosen
