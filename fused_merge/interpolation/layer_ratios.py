"""Ratios of their own for the parts of a network: by depth, by kind of module, by pattern, or tensor by tensor.

What a tensor is, is read off its name: `model.layers.7.self_attn.q_proj.weight` is attention in layer 7. No weight is
read.
"""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor, nn

from fused_merge.io.headers import load_json
from fused_merge.io.sources import PathLike, open_source
from fused_merge.io.writer import write_text
from fused_merge.names import canonical_name, layer_of, some
from fused_merge.per_tensor import NamedRatios, PerTensor, finite, match_keys, per_tensor

# A module, a state dict, the path of a checkpoint, or names.
Names: TypeAlias = "nn.Module | Mapping[str, Tensor] | PathLike | Iterable[str]"

# What a list of layers is called: `layers` in Llama and most others, `h` in GPT-2, `layer` in BERT, `block` in T5.
_LISTS = re.compile(r"layers?|h|(res)?blocks?", re.IGNORECASE)

# What the components of a name say about a tensor; the first row that describes any of them decides. Outside the layers
# heads come first, which have norms and projections of their own (`cls.predictions.transform.LayerNorm`, `embed_out`),
# and embeddings before norms, for `embeddings.LayerNorm` and `word_embeddings_layernorm`; what normalises them before
# the first layer counts as theirs (`ln_pre`, `pre_layrnorm`).
_OUTSIDE = (
    (
        "head",
        r"(\w+_)?heads?|cls|(pre_)?classifier|score|pooler|output|qa_outputs|vocab_(transform|layer_norm|projector)"
        r"|embed_out|project_out",
    ),
    ("embeddings", r"\w*embed\w*|\w*emb|wte|wpe|shared|project_in|ln_pre|pre_la?ye?r_?norm"),
    ("norm", r"\w*norm\w*|ln_\w+"),
)
# Within a layer norms come first, which are named after what they stand before or behind (`post_attention_layernorm`,
# `attention.output.LayerNorm`, `self_attn.q_norm`), and attention before MLP, since BERT calls the last projection of
# either `output` and OPT has its MLP, `fc1` and `fc2`, in no module of its own.
_INSIDE = (
    ("norm", r"\w*norm\w*|ln(_\w+|\d+)?"),
    ("attention", r"\w*attn\w*|\w*attention\w*"),
    (
        "mlp",
        r"\w*mlp\w*|(\w+_)?ffn?(_\w+)?|feed_?forward\w*|DenseReluDense|\w*moe|\w*experts?|fc\d|intermediate|output",
    ),
)
_KINDS = ("embeddings", "attention", "mlp", "norm", "head", "other")

_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")

# The order of several stacks, which that of names in a file does not tell: towers feed encoders, and these decoders.
# The first component that says something decides, as in `decoder.bert.encoder.layer`; a stack of no such name is third.
_STACKS = ((0, r"\w*(vision|visual|image|audio)\w*"), (1, r"\w*encoder\w*"), (3, r"\w*decoder\w*"))


class LayerRatios(NamedRatios):
    """An immutable mapping from canonical names of tensors to ratios, which are equal within each part of the network.

    Taken wherever a ratio is. It may hold more tensors than are interpolated, and must hold those that are.
    `print` shows it as a table; two are equal if their parts and ratios are. Source: Lin et al. 2024
    (arXiv 2309.06256), who average the low, middle and high layers of two models at ratios of their own.

    ```python
    low_to_high = fm.LayerRatios.by_parts("sft/", [0.2, 0.5, 0.9])
    fm.interpolate_checkpoints("sft/", "rlhf/", [0.5, low_to_high], "line/")
    ```

    Args:
        parts: label -> names of the tensors, each in one part alone. Names are made canonical.
        ratios: one finite number for each part; below 0 or above 1 they extrapolate.
        history: what an optimiser records of its way here, one mapping of plain data for each step.

    Attributes:
        history: as given, a tuple of dicts.

    Raises:
        ValueError: if a part is empty, a tensor stands in two, a ratio is not finite, or their numbers differ.
        TypeError: if a ratio is no number, or a label or name no string.
    """

    def __init__(
        self,
        parts: Mapping[str, Iterable[str]],
        ratios: Iterable[float],
        *,
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._parts: dict[str, tuple[str, ...]] = {}
        self._by_name: dict[str, float] = {}
        given = _listed(ratios)
        if len(given) != len(parts):
            raise ValueError(f"{len(parts)} parts need as many ratios, got {len(given)}")
        self._ratios = tuple(
            finite(ratio, what=f"ratio of {label!r}") for label, ratio in zip(parts, given, strict=True)
        )
        for (label, names), ratio in zip(parts.items(), self._ratios, strict=True):
            self._add(label, _canonical(names), ratio)
        self.history: tuple[dict[str, Any], ...] = tuple(map(dict, history))

    def _add(self, label: str, names: tuple[str, ...], ratio: float) -> None:
        if not isinstance(label, str):
            raise TypeError(f"a part must be called by a string, got {label!r}")
        if not names:
            raise ValueError(f"part {label!r} holds no tensor; give it one or leave it out")
        if twice := [name for name in names if name in self._by_name]:
            other = next(other for other, others in self._parts.items() if twice[0] in others)
            raise ValueError(f"{some(map(repr, twice))} of part {label!r} stands in part {other!r} too; choose one")
        self._parts[label] = names
        self._by_name.update(dict.fromkeys(names, ratio))

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

        Layer i of L is in part ⌊i·K/L⌋. Of what is outside the layers, embeddings are in the first part, the head and
        the pooler in the last, and a final norm is with the last layer of its own stack: `encoder.final_layer_norm`
        with that of `encoder.block`. Layers of several stacks are counted through: towers, encoders, decoders.

        Args:
            model_or_names: a module, a state dict, the path of a checkpoint, or names. Of tied weights the first name
                counts, and integers have no ratio; of names alone all do.
            ratios: K numbers, for the lowest layers first.
            boundaries: the first layers of parts 2 to K, instead of equal parts: `[8, 16]` for layers 0-7, 8-15 and
                all above.
            outside: the part, from 0 or from the end (-1), of `"embeddings"`, `"norm"` and `"head"`, as in
                `{"embeddings": 0, "norm": 2, "head": 2}`; or of names or regular expressions on whole names, which then
                are outside the layers whatever they are called.

        Raises:
            ValueError: if a tensor is neither in a layer nor called like something outside them, or ratios,
                boundaries or parts do not fit the number of layers; the sentence names the tensor or number.
        """
        names = _names_of(model_or_names)
        ratios = _listed(ratios)
        outside = {key: _part(part, len(ratios), key) for key, part in (outside or {}).items()}
        chosen = _chosen(outside, names)
        places = {name: place for name in names if name not in chosen and (place := _place(name)) is not None}
        stacks = _stacks(places.values())
        if not stacks:
            raise ValueError(
                f"no name is that of a numbered layer, such as 'layers.0.weight', but {some(map(repr, names))}; "
                "use by_patterns or per_tensor"
            )
        depth = sum(map(len, stacks.values()))
        firsts = _firsts(depth, len(ratios), boundaries)
        parts: list[list[str]] = [[] for _ in ratios]
        lost = []
        for name in names:
            if name in chosen:
                part = chosen[name]
            elif name in places:
                stack, number = places[name]
                part = bisect_right(firsts, stacks[stack][number]) - 1
            elif (kind := _kind(name)) is None:
                lost.append(name)
                continue
            elif kind in outside:
                part = outside[kind]
            elif kind == "norm":
                part = bisect_right(firsts, stacks[_nearest(name, stacks)][-1]) - 1
            else:
                part = 0 if kind == "embeddings" else len(ratios) - 1
            parts[part].append(name)
        if lost:
            others = f", nor {some(map(repr, lost[1:]))}" if len(lost) > 1 else ""
            raise ValueError(
                f"cannot tell where {lost[0]!r} belongs{others}: it is in no list of layers, and not called like "
                f"embeddings, a norm or a head; give its part with outside={{{lost[0]!r}: 0}}, or use by_patterns"
            )
        lasts = [first - 1 for first in [*firsts[1:], depth]]
        labels = [
            f"layers {first}-{last}" if first < last else f"layer {last}"
            for first, last in zip(firsts, lasts, strict=True)
        ]
        return cls(dict(zip(labels, parts, strict=True)), ratios)

    @classmethod
    def by_patterns(cls, model_or_names: Names, ratios: Mapping[str, float]) -> LayerRatios:
        """Make a part of all tensors that belong to one key.

        Args:
            model_or_names: as for `by_parts`.
            ratios: name or regular expression on whole names -> number. A name that is a key is in its part; any other
                in that of the first key that matches it.

        Raises:
            ValueError: if a tensor has no key, or a key no tensor, or is no regular expression.
        """
        names = _names_of(model_or_names)
        keys = match_keys(ratios, names, what="ratio")
        return cls({key: [name for name in names if keys[name] == key] for key in ratios}, ratios.values())

    @classmethod
    def by_kind(cls, model_or_names: Names, ratios: Mapping[str, float]) -> LayerRatios:
        """Make a part of all tensors of a kind.

        Args:
            model_or_names: as for `by_parts`.
            ratios: kind -> number. Kinds are `"embeddings"`; `"attention"`, `"mlp"` and `"norm"` of the layers, where
                norms within attention count as norms; `"norm"` also of the final norms; `"head"`, which is also that
                of a classifier, and the pooler; and `"other"`, which is everything that is not listed.

        Raises:
            ValueError: if the kind of a tensor has no ratio, or a kind that has one does not occur.
        """
        if odd := [kind for kind in ratios if kind not in _KINDS]:
            raise ValueError(f"there is no kind {odd[0]!r}; kinds are {', '.join(map(repr, _KINDS))}")
        parts: dict[str, list[str]] = {kind: [] for kind in ratios}
        for name in _names_of(model_or_names):
            kind = _kind(name)
            if kind not in parts and "other" not in parts:
                raise ValueError(
                    f"cannot tell what kind {name!r} is; give a ratio for 'other', or use by_patterns"
                    if kind is None
                    else f"{name!r} is of the kind {kind!r}, which has no ratio; add it, or 'other' for all not listed"
                )
            parts["other" if kind is None or kind not in parts else kind].append(name)
        if idle := [kind for kind, members in parts.items() if not members]:
            raise ValueError(f"no tensor is of the kind {' or '.join(map(repr, idle))}; leave it out")
        return cls(parts, ratios.values())

    @classmethod
    def per_tensor(cls, model_or_names: Names, ratio: PerTensor) -> LayerRatios:
        """Make each tensor a part of its own.

        Args:
            model_or_names: as for `by_parts`.
            ratio: a number for all; or a mapping from names or regular expressions on whole names to numbers; or other
                `LayerRatios`, whose parts are taken apart.

        Raises:
            ValueError: if a tensor has no ratio, or a key no tensor.
        """
        names = _names_of(model_or_names)
        decided = per_tensor(ratio, names, what="ratio")
        return cls({name: (name,) for name in names}, decided.values())

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
        return math.fsum(self._ratios) / len(self._ratios)

    def replace(self, ratios: Iterable[float]) -> LayerRatios:
        """Return the same parts with other ratios, and without history."""
        return type(self)(self._parts, ratios)

    def save(self, path: PathLike) -> None:
        """Write parts, ratios and history as text to read and edit: JSON if the path ends in `.json`, else YAML.

        Args:
            path: the file; an existing one is replaced when the new one is whole.

        Raises:
            ImportError: for YAML without PyYAML.
            TypeError: if the history is not plain data.
            OSError: if the file cannot be written.
        """
        path = Path(path)
        content: dict[str, Any] = {
            "parts": {
                label: {"ratio": ratio, "tensors": list(names)}
                for (label, names), ratio in zip(self._parts.items(), self._ratios, strict=True)
            }
        }
        if self.history:
            content["history"] = self.history
        try:
            text = json.dumps(content, indent=2) + "\n"
        except TypeError as error:
            raise TypeError(f"the history cannot be written to {path}: {error}; record plain data") from error
        if not _is_json(path):
            # From JSON, which has no tuples and no subclasses of numbers: the two forms say the same.
            text = _yaml(path).safe_dump(json.loads(text), sort_keys=False, width=math.inf)
        write_text(path, text)

    @classmethod
    def load(cls, path: PathLike) -> LayerRatios:
        """Read what `save` wrote, edited or not.

        Args:
            path: of a file `{parts: {label: {ratio: 0.2, tensors: [...]}}}`, JSON if it ends in `.json`, else YAML.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it says something else; the sentence names the file.
            ImportError: for YAML without PyYAML.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; give a file that LayerRatios.save wrote")
        content = _read(path)
        if not isinstance(content, dict) or not {"parts"} <= content.keys() <= {"parts", "history"}:
            raise ValueError(f"{path} is not a mapping of parts, and history if there is any; correct it")
        parts, history = content["parts"], content.get("history", [])
        if not isinstance(parts, dict) or not parts:
            raise ValueError(f"{path} has no mapping from parts to their ratio and tensors under 'parts'; correct it")
        for label, part in parts.items():
            if (
                not isinstance(part, dict)
                or part.keys() != {"ratio", "tensors"}
                or not isinstance(part["tensors"], list)
            ):
                raise ValueError(f"{path} gives part {label!r} not just a ratio and a list of tensors; correct it")
        if not isinstance(history, list) or not all(isinstance(step, dict) for step in history):
            raise ValueError(f"{path} has a history that is no list of mappings; correct it")
        try:
            return cls(
                {label: part["tensors"] for label, part in parts.items()},
                [_number(part["ratio"], label) for label, part in parts.items()],
                history=history,
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __getitem__(self, name: str) -> float:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __eq__(self, other: object) -> bool:
        # The order of tensors within a part is that of where the names came from, and says nothing.
        return isinstance(other, LayerRatios) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(tuple(self._content()))

    def _content(self) -> list[tuple[str, frozenset[str], float]]:
        parts = zip(self._parts.items(), self._ratios, strict=True)
        return [(label, frozenset(names), ratio) for (label, names), ratio in parts]

    def __repr__(self) -> str:
        shown = some(f"{label!r}: {ratio:.6g}" for label, ratio in zip(self._parts, self._ratios, strict=True))
        return f"<LayerRatios of {len(self)} tensors: {shown}>"

    def __str__(self) -> str:
        rows = [("part", "holds", "tensors", "ratio")]
        for (label, names), ratio in zip(self._parts.items(), self._ratios, strict=True):
            rows.append((label, some(_modules(names)), str(len(names)), f"{ratio:.6g}"))
        part, holds, tensors, number = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{a:<{part}}  {b:<{holds}}  {c:>{tensors}}  {d:>{number}}" for a, b, c, d in rows)


def _names_of(model_or_names: Names) -> tuple[str, ...]:
    """Return the canonical names of all tensors that are interpolated, tied ones once."""
    if isinstance(model_or_names, (nn.Module, Mapping, str, os.PathLike)):
        source = open_source(model_or_names, role="model")
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


def _place(name: str) -> tuple[str, int] | None:
    """Return stack and number of the layer that a tensor is in, or None for one outside the layers.

    `classifier.0.weight` is in no layer, and neither is `v_head.layers.0.weight`.
    """
    place = layer_of(name)
    if place is None or not _LISTS.fullmatch(place[0].rpartition(".")[2]):
        return None
    return None if _described(place[0], _OUTSIDE[:1]) else place


def _kind(name: str) -> str | None:
    """Return what a tensor is, one of `_KINDS`, or None if its name does not tell."""
    place = _place(name)
    if place is None:
        return _described(name, _OUTSIDE)
    stack, _ = place
    return _described(name[len(stack) + 1 :], _INSIDE)


def _described(name: str, rows: Iterable[tuple[str, str]]) -> str | None:
    components = name.split(".")
    for kind, pattern in rows:
        if any(re.fullmatch(pattern, component, re.IGNORECASE) for component in components):
            return kind
    return None


def _stacks(places: Iterable[tuple[str, int]]) -> dict[str, range]:
    """Return the layers of each stack, counted through all stacks in their order."""
    depths: dict[str, int] = {}
    for stack, number in places:
        depths[stack] = max(depths.get(stack, 0), number + 1)
    stacks, first = {}, 0
    for stack in sorted(depths, key=lambda stack: (_rank(stack), stack)):
        stacks[stack] = range(first, first + depths[stack])
        first += depths[stack]
    return stacks


def _rank(stack: str) -> int:
    ranks = (
        rank
        for component in stack.split(".")
        for rank, pattern in _STACKS
        if re.fullmatch(pattern, component, re.IGNORECASE)
    )
    return next(ranks, 2)


def _nearest(name: str, stacks: Iterable[str]) -> str:
    """Return the stack that a norm outside the layers belongs to: that with which it shares most of its path."""
    module = name.rpartition(".")[0]

    def shared(stack: str) -> tuple[int, bool]:
        pairs = zip(module.split("."), stack.split("."), strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return common, module.rpartition(".")[0] == stack.rpartition(".")[0]

    # Of those that share the same, the last.
    return max(reversed([*stacks]), key=shared)


def _firsts(depth: int, count: int, boundaries: Sequence[int] | None) -> list[int]:
    """Return the first layer of each part."""
    if count > depth:
        raise ValueError(f"{count} parts need as many layers, and there are {depth}; give fewer ratios")
    if boundaries is None:
        return [-(-part * depth // count) for part in range(count)]
    given = list(boundaries) if isinstance(boundaries, Iterable) else []
    firsts = [0, *(int(layer) for layer in given if layer in range(1, depth))]
    if len(firsts) != count or len(given) != count - 1 or firsts != sorted(set(firsts)):
        raise ValueError(
            f"boundaries must be the first layers of all parts but the first, {count - 1} rising numbers from 1 to "
            f"{depth - 1}, got {boundaries!r}"
        )
    return firsts


def _part(part: int, count: int, key: str) -> int:
    if part not in range(-count, count):
        raise ValueError(f"outside puts {key!r} into part {part!r}, but parts are 0 to {count - 1}, or -1 for the last")
    return int(part) % count


def _chosen(outside: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Return the parts of tensors that are given one by name or regular expression."""
    kinds = [kind for kind, _ in _OUTSIDE]
    keys = {key: part for key, part in outside.items() if key not in kinds}
    try:
        found = match_keys(keys, names, what="part", partial=True)
    except ValueError as error:
        raise ValueError(f"outside takes {', '.join(map(repr, kinds))} and names, but {error}") from error
    return {name: keys[key] for name, key in found.items()}


def _modules(names: Iterable[str]) -> list[str]:
    """Return what a part holds, in a few words: lists with the numbers of their layers, then modules."""
    lists: dict[str, set[int]] = {}
    modules: dict[str, None] = {}
    for name in names:
        if place := layer_of(name):
            lists.setdefault(place[0], set()).add(place[1])
        else:
            parts = name.split(".")
            # `bert.embeddings` and not each of the modules in it.
            telling = (i for i, part in enumerate(parts, 1) if _described(part, _OUTSIDE))
            modules[".".join(parts[: next(telling, max(len(parts) - 1, 1))])] = None
    return [f"{stack} {_ranges(numbers)}".strip() for stack, numbers in lists.items()] + [*modules]


def _ranges(numbers: Iterable[int]) -> str:
    """Return "0-3+7" for 0, 1, 2, 3 and 7."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return "+".join("-".join(map(str, ends)) for ends in ranges)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _read(path: Path) -> Any:
    text = path.read_bytes()
    if _is_json(path):
        try:
            return load_json(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); correct it") from error
    yaml = _yaml(path)

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """Refuses a key that stands twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            for key, count in Counter(str(key.value) for key, _ in pairs).items():
                if count > 1:
                    raise ValueError(f"{key!r} stands in it twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from error


def _number(ratio: Any, label: str) -> Any:
    """Return a ratio as it is meant; the constructor refuses whatever else is no number."""
    if isinstance(ratio, bool):
        raise TypeError(f"a ratio of {label!r} must be a number, got {ratio}")
    # YAML takes 1e-3, which lacks the point, for text.
    return float(ratio) if isinstance(ratio, str) and _EXPONENT.fullmatch(ratio) else ratio


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{path} needs PyYAML: pip install 'fused_merge[cli]', or take a .json file") from error
    return yaml
