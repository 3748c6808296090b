"""A ratio for each part of a network: by depth, by kind of module, by pattern, or tensor by tensor."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor, nn

from fused_merge.interpolation.parts import slices_by_depth, summarize
from fused_merge.io.files import expanded
from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.plain import plain_text, read_plain
from fused_merge.io.sources import PathLike, open_source
from fused_merge.io.writer import write_text
from fused_merge.names import canonical_name, kind_of, some
from fused_merge.per_tensor import NamedRatios, PerTensor, finite, match_keys, per_tensor

# A module, a state dict, the path of a checkpoint, or names.
Names: TypeAlias = "nn.Module | Mapping[str, Tensor] | PathLike | Iterable[str]"

_KINDS = ("embeddings", "attention", "mlp", "norm", "head", "other")

_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


class LayerRatios(NamedRatios):
    """An immutable mapping from canonical names of tensors to ratios, which are equal within each part of the network.

    Taken wherever a ratio is. It may hold more tensors than are interpolated, and must hold those that are.
    `print` shows it as a table; two are equal if their parts and ratios are. Source: Lin et al. 2024
    (arXiv 2309.06256), who average the low, middle and high layers of two models at ratios of their own.

    Its constructors take as `model_or_names` a module, a state dict, the path of a checkpoint, or names. Tied weights
    count under their first name, and integers have no ratio; of a list of names all have.

    Args:
        parts: label -> names of the tensors, each in one part only. Names are made canonical.
        ratios: one finite number for each part; below 0 or above 1 they extrapolate.
        history: what an optimizer recorded, one mapping of plain data for each step; kept as a tuple of dicts.

    Raises:
        ValueError: if a part is empty, a tensor stands in two, a ratio is not finite, or their numbers differ.
        TypeError: if a ratio is no number, or a label or name no string.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> ratios = fm.LayerRatios({"low": ["layers.0.weight"], "high": ["layers.1.weight"]}, [0.25, 0.75])
        >>> print(ratios)
        part  holds     tensors  ratio
        low   layers 0        1   0.25
        high  layers 1        1   0.75
        >>> base, tuned = {name: torch.zeros(1) for name in ratios}, {name: torch.ones(1) for name in ratios}
        >>> fm.interpolate(base, tuned, [ratios])
        [{'layers.0.weight': tensor([0.2500]), 'layers.1.weight': tensor([0.7500])}]
    """

    def __init__(
        self, parts: Mapping[str, Iterable[str]], ratios: Iterable[float], *, history: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        given = _listed(ratios)
        if len(given) != len(parts):
            raise ValueError(f"{len(parts)} parts need as many ratios, got {len(given)}")
        self._ratios = tuple(finite(r, what=f"ratio of {label!r}") for label, r in zip(parts, given, strict=True))
        self._parts: dict[str, tuple[str, ...]] = {}
        self._by_name: dict[str, float] = {}
        for label, ratio in zip(parts, self._ratios, strict=True):
            names = _canonical(parts[label])
            if not isinstance(label, str):
                raise TypeError(f"a part must be called by a string, got {label!r}")
            if not names:
                raise ValueError(f"part {label!r} holds no tensor; give it one or leave it out")
            if twice := [name for name in names if name in self._by_name]:
                other = next(other for other, others in self._parts.items() if twice[0] in others)
                raise ValueError(f"{some(map(repr, twice))} of part {label!r} stands in part {other!r} too; choose one")
            self._parts[label] = names
            self._by_name.update(dict.fromkeys(names, ratio))
        self.history: tuple[dict[str, Any], ...] = tuple(map(dict, history))

    @classmethod
    def by_parts(
        cls,
        model_or_names: Names,
        ratios: Iterable[float],
        *,
        boundaries: Sequence[int] | None = None,
        outside: Mapping[str, int] | None = None,
    ) -> LayerRatios:
        """Cut the network by depth into K parts.

        Layer i of L is in part ⌊i·K/L⌋. Outside the layers, embeddings are in the first part, head and pooler in
        the last, and a final norm is with the last layer of its own stack: `encoder.final_layer_norm` with that of
        `encoder.block`. Layers of several stacks are counted through: towers, encoders, decoders.

        Args:
            model_or_names: a module, a state dict, the path of a checkpoint, or names.
            ratios: K numbers, for the lowest layers first.
            boundaries: the first layers of parts 2 to K, instead of equal parts: `[8, 16]` for layers 0-7, 8-15 and
                all above.
            outside: the part, from 0 or from the end (-1), of `"embeddings"`, `"norm"` and `"head"`, as in
                `{"embeddings": 0, "norm": 2, "head": 2}`; or of names or regular expressions on whole names, which then
                are outside the layers whatever they are called.

        Returns:
            K parts, labeled `"layers 0-7"` and so on.

        Raises:
            ValueError: if a tensor is neither in a layer nor called like something outside them, or ratios,
                boundaries or parts do not fit the number of layers; the sentence names the tensor or number.

        Example:
            >>> import fused_merge as fm
            >>> ratios = fm.LayerRatios.by_parts("sft/", [0.2, 0.9])
            >>> ratios
            <LayerRatios of ... tensors: 'layer 0': 0.2, 'layer 1': 0.9>
            >>> ratios["model.embed_tokens.weight"], ratios["model.norm.weight"]
            (0.2, 0.9)
        """
        ratios = _listed(ratios)
        return cls(slices_by_depth(_names_of(model_or_names), len(ratios), boundaries, outside or {}), ratios)

    @classmethod
    def by_patterns(cls, model_or_names: Names, ratios: Mapping[str, float]) -> LayerRatios:
        """Make a part of all tensors that belong to one key, a name or a regular expression on whole names.

        A name that is a key is in its part; any other in that of the first key that matches it. Raises ValueError if a
        tensor has no key, or a key no tensor, or is no regular expression.
        """
        names = _names_of(model_or_names)
        keys = match_keys(ratios, names, what="ratio")
        return cls({key: [name for name in names if keys[name] == key] for key in ratios}, ratios.values())

    @classmethod
    def by_kind(cls, model_or_names: Names, ratios: Mapping[str, float]) -> LayerRatios:
        """Make a part of all tensors of a kind.

        Kinds are `"embeddings"`; `"attention"`, `"mlp"` and `"norm"` of the layers, where norms within attention count
        as norms; `"norm"` also of the final norms; `"head"`, which is also that of a classifier, and the pooler; and
        `"other"`, which is everything that is not listed. Raises ValueError if the kind of a tensor has no ratio, or a
        kind that has one does not occur.
        """
        if odd := [kind for kind in ratios if kind not in _KINDS]:
            raise ValueError(f"there is no kind {odd[0]!r}; kinds are {', '.join(map(repr, _KINDS))}")
        parts: dict[str, list[str]] = {kind: [] for kind in ratios}
        for name in _names_of(model_or_names):
            kind = kind_of(name)
            if (members := parts.get(kind or "other", parts.get("other"))) is None:
                raise ValueError(
                    f"{name!r} is of the kind {kind!r}, which has no ratio; add it, or 'other' for all not listed"
                    if kind
                    else f"cannot tell what kind {name!r} is; give a ratio for 'other', or use by_patterns"
                )
            members.append(name)
        if idle := [kind for kind, members in parts.items() if not members]:
            raise ValueError(f"no tensor is of the kind {' or '.join(map(repr, idle))}; leave it out")
        return cls(parts, ratios.values())

    @classmethod
    def per_tensor(cls, model_or_names: Names, ratio: PerTensor) -> LayerRatios:
        """Make each tensor a part of its own.

        `ratio` is a number for all, or a mapping from names or regular expressions on whole names to numbers, or other
        `LayerRatios`, whose parts are taken apart. Raises ValueError if a tensor has no ratio, or a key no tensor.
        """
        decided = per_tensor(ratio, _names_of(model_or_names), what="ratio")
        return cls({name: (name,) for name in decided}, decided.values())

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Label -> canonical names of its tensors."""
        return MappingProxyType(self._parts)

    @property
    def ratios(self) -> tuple[float, ...]:
        """One for each part, in their order."""
        return self._ratios

    @property
    def mean(self) -> float:
        """The mean of the ratios over the parts, each counted once whatever its size, as in the paper."""
        return fmean(self._ratios)

    def replace(self, ratios: Iterable[float]) -> LayerRatios:
        """Return the same parts with other ratios, and without history."""
        return type(self)(self._parts, ratios)

    def save(self, path: PathLike) -> None:
        """Write parts, ratios and history as text to read and edit: JSON if the path ends in `.json`, else YAML.

        An existing file is replaced when the new one is whole. Raises ImportError for YAML without PyYAML, TypeError
        if the history is not plain data, OSError if the file cannot be written.
        """
        path = expanded(path)
        parts = {label: {"ratio": ratio, "tensors": list(names)} for label, names, ratio in self._rows()}
        content = {"parts": parts} | ({"history": self.history} if self.history else {})
        try:
            text = plain_text(path, content)
        except TypeError as error:
            raise TypeError(f"the history cannot be written to {path}: {error}; record plain data") from error
        write_text(path, text)

    @classmethod
    def load(cls, path: PathLike) -> LayerRatios:
        """Read what `save` wrote, edited or not: `{parts: {label: {ratio: 0.2, tensors: [...]}}}`.

        Raises FileNotFoundError if the file is not there, ValueError if it says something else, ImportError for YAML
        without PyYAML.
        """
        path = expanded(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file that LayerRatios.save wrote")
        content = read_plain(path)
        if not isinstance(content, dict) or not {"parts"} <= content.keys() <= {"parts", "history"}:
            raise ValueError(f"{path} is not a mapping of parts, and history if there is any; correct it")
        parts, history = content["parts"], content.get("history", [])
        if not isinstance(parts, dict) or not parts:
            raise ValueError(f"{path} has no mapping from parts to their ratio and tensors under 'parts'; correct it")
        for label, own in parts.items():
            if not isinstance(own, dict) or own.keys() != {"ratio", "tensors"} or not isinstance(own["tensors"], list):
                raise ValueError(f"{path} gives part {label!r} not just a ratio and a list of tensors; correct it")
        if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
            raise ValueError(f"{path} has a history that is no list of mappings; correct it")
        try:
            ratios = [_number(own["ratio"], label) for label, own in parts.items()]
            return cls({label: own["tensors"] for label, own in parts.items()}, ratios, history=history)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __getitem__(self, name: str) -> float:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerRatios) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[tuple[str, frozenset[str], float], ...]:
        # The order of tensors within a part is that of where the names came from, and says nothing.
        return tuple((label, frozenset(names), ratio) for label, names, ratio in self._rows())

    def _rows(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        return zip(self._parts, self._parts.values(), self._ratios, strict=True)

    def __repr__(self) -> str:
        shown = some(f"{label!r}: {ratio:.6g}" for label, _, ratio in self._rows())
        return f"<LayerRatios of {len(self)} tensors: {shown}>"

    def __str__(self) -> str:
        rows = (
            (label, some(summarize(names)), str(len(names)), f"{ratio:.6g}") for label, names, ratio in self._rows()
        )
        table = [("part", "holds", "tensors", "ratio"), *rows]
        part, holds, tensors, number = (max(map(len, column)) for column in zip(*table, strict=True))
        return "\n".join(f"{a:<{part}}  {b:<{holds}}  {c:>{tensors}}  {d:>{number}}" for a, b, c, d in table)


def _names_of(model_or_names: Names) -> tuple[str, ...]:
    """Return the canonical names of all tensors that are interpolated, tied ones once."""
    if isinstance(model_or_names, (nn.Module, Mapping, str, os.PathLike)):
        source = open_source(model_or_names, role="model")
        check_mergeable(source)
        names = tuple(name for name in source if name not in source.aliases and source.is_merged(name))
    else:
        names = _canonical(model_or_names)
    if not names:
        raise ValueError("there is no floating tensor to give a ratio; pass a model, a checkpoint or names")
    return names


def _canonical(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names must be an iterable of strings, got {names!r}")
    counts: Counter[str] = Counter()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"a tensor must be given by its name, got a {type(name).__name__}; pass strings")
        counts[canonical_name(name)] += 1
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{some(map(repr, twice))} is named twice when prefixes of wrappers are dropped; leave one")
    return tuple(counts)


def _listed(ratios: Iterable[float]) -> list[float]:
    if not isinstance(ratios, Iterable) or isinstance(ratios, (str, Mapping)):
        raise TypeError(f"ratios must be a sequence of numbers, one for each part, got {ratios!r}")
    if not (listed := list(ratios)):
        raise ValueError("ratios is empty; give a number for each part")
    return listed


def _number(ratio: Any, label: str) -> Any:
    """Return a ratio as it is meant; the constructor refuses whatever else is no number."""
    if isinstance(ratio, bool):
        raise TypeError(f"a ratio of {label!r} must be a number, got {ratio}")
    # YAML takes 1e-3, which lacks the point, for text.
    return float(ratio) if isinstance(ratio, str) and _EXPONENT.fullmatch(ratio) else ratio
