"""Which tensors of two models belong together, and whether they may be combined: the one answer for every command.

Tensors belong together by name: after prefixes and renamings that the caller gave; else by the names that both have in
the memory of a model of Transformers; a head that one model ties to its embedding is that embedding. Nothing is read
but headers, configurations and, of tied weights, data.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from fused_merge.io.adapters import check_adapters
from fused_merge.io.configs import check_configs
from fused_merge.io.layouts import Layout, in_memory, layout_of, layout_of_config
from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.sources import MemorySource, PathLike, TensorSource
from fused_merge.io.ties import TIEABLE, embedding_of, find_tied, rows_apart
from fused_merge.io.views import Assembly, Box, Conversion, Piece, ViewSource
from fused_merge.names import kind_of, some

# Beginnings of names that a refusal tries to strip.
_LONGEST_PREFIX = 4


@dataclass(frozen=True)
class Match:
    """What two sources have in common.

    Attributes:
        first, second: the sources, as views under the names by which they are paired where those are not their own.
        pairs: what belongs together: name -> its name in the first and in the second, tied tensors once. In the order
            of the first.
        aliases: every further name of either source -> the one of `pairs` that holds the same bits.
        only: the names of each that the other lacks.
        untied: those of `pairs` that one of the two ties to its embedding and the other does not.
        faults: why the two cannot be combined, as sentences.
    """

    first: TensorSource
    second: TensorSource
    pairs: Mapping[str, tuple[str, str]]
    aliases: Mapping[str, str]
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    untied: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def resolve(self, name: str) -> str:
        """Return the one of `pairs` that stands for `name`."""
        return self.aliases.get(name, name)

    @property
    def converted(self) -> list[str]:
        """The pairs of which a source has other names or other boxes than those by which it is paired."""
        return [name for name, own in self.pairs.items() if any(map(_is_made, (self.first, self.second), own))]

    def report(self) -> list[dict[str, Any]]:
        """Return a dict for each pair, tie and tensor without a counterpart.

        It holds `kind`, `name`, what of the `first` and of the `second` source it is, as lists of names, and `bytes`.
        Kinds are `"same name"`, `"converted"` (another name, or another packing), `"tied"` (bit-equal to another tensor
        of its model), `"untied"` (a head that one model ties to its embedding), `"first only"`, `"second only"`.
        """
        converted, untied = set(self.converted), set(self.untied)
        found: list[tuple[str, str, tuple[str | None, str | None]]] = [
            ("untied" if name in untied else "converted" if name in converted else "same name", name, own)
            for name, own in self.pairs.items()
        ]
        found += [
            ("tied", owner, (name if name in self.first else None, name if name in self.second else None))
            for name, owner in self.aliases.items()
        ]
        found += [("first only", name, (name, None)) for name in self.only[0]]
        found += [("second only", name, (None, name)) for name in self.only[1]]
        entries = []
        for kind, name, own in found:
            held = {
                side: (source, each)
                for side, source, each in zip(("first", "second"), (self.first, self.second), own, strict=True)
                if each is not None
            }
            names = {side: own_names(*held[side]) if side in held else [] for side in ("first", "second")}
            entries.append({"kind": kind, "name": name, **names, "bytes": _nbytes(*next(iter(held.values())))})
        return entries

    @property
    def shares(self) -> tuple[float, float]:
        """The share of the bytes of each source that belongs to a pair or an alias of one."""
        sources = (self.first, self.second)
        lonely = [sum(_nbytes(source, name) for name in only) for source, only in zip(sources, self.only, strict=True)]
        whole = [sum(_nbytes(source, name) for name in source) for source in sources]
        first, second = (1.0 - part / max(1, all_) for part, all_ in zip(lonely, whole, strict=True))
        return first, second


def match(first: TensorSource, second: TensorSource, **options: Any) -> Match:
    """Pair the tensors of two sources, or raise a ValueError that names those that do not fit; as `explain`."""
    found = explain(first, second, **options)
    if found.faults:
        raise ValueError("; ".join(found.faults))
    return found


def explain(
    first: TensorSource,  # gives the order of the result and, unless `memory`, its names
    second: TensorSource,
    *,
    same_dtype: bool = False,  # also require equal dtypes
    unmatched: str = "error",  # anything else: tensors that only one holds are listed instead of refused
    align_vocabulary: bool = False,  # accept tensors that differ along dim 0 only, as those of other vocabularies do
    strip_prefix: Sequence[str] = (),  # beginnings of names to leave out
    rename: Mapping[str, str] | None = None,  # regular expressions -> what they are replaced with, as by `re.sub`
    any_architecture: bool = False,  # accept configurations that name another architecture in each
    memory: bool = False,  # where names differ, pair under those that a model has in memory, if Transformers knows them
    parameters: bool = False,  # only parameters: no buffers and nothing that neither merges; in the order of the model
    config: PathLike | None = None,  # folder with the configuration of a model, for sources that have none
) -> Match:
    """Pair the tensors of two sources and say what is in the way.

    A name that only one source holds is accepted if it is that of an embedding or a head and, there, bit-equal to a
    tensor that both hold: tied weights that one checkpoint writes out and the other does not. A head that only one
    source holds, of a model that the other ties, belongs to the embedding of the other.
    """
    for source in (first, second):
        # The steps of an optimizer move each of two factors by itself, and a delta of theirs is what these add.
        check_mergeable(source, factors=parameters)
    check_adapters(first, second)
    check_configs([source for source in (first, second) if source.files()], any_architecture=any_architecture)
    apart: dict[str, Any] = {"same_dtype": same_dtype, "any_rows": align_vocabulary, "parameters": parameters}
    sources = first, second
    if strip_prefix or rename:
        a, b = (_renamed(source, strip_prefix, rename or {}) for source in sources)
        # As files of the first are to be written, under its own names.
        sources = (a, b) if memory else (first, _in_names_of(a, b))
    found, hint = _paired(*sources, **apart), ""
    # For the order of the parameters, too, unless the caller has names of his own.
    asked = config is not None or any(found.only) or found.faults or (parameters and not (strip_prefix or rename))
    layout = None if config is None else layout_of_config(config)
    views = _as_in_memory((first, second), sources, layout) if asked else None
    if views is not None:
        loaded = _paired(*views, **apart)
        if memory or not all(isinstance(view, ViewSource) for view in views):
            found = min(loaded, found, key=_misfits)
        else:
            found = min(_paired(sources[0], _in_names_of(*views), **apart), found, key=_misfits)
            hint = _layouts(found) if _misfits(loaded) < _misfits(found) else ""
    return _with_faults(found, unmatched, hint or _prefix_hint(found))


def _paired(first: TensorSource, second: TensorSource, *, same_dtype: bool, any_rows: bool, parameters: bool) -> Match:
    """Pair two sources by the names that they have."""
    if first.is_like(second) and not (parameters or (first.aliases and second.aliases)):
        # So it is nearly always, and there may be hundreds of thousands.
        for name in first.dtypes.values():
            first.is_merged(name)
        return Match(first, second, {name: (name, name) for name in first}, {})
    ignore: set[str] = set()
    if parameters:
        buffers = first.buffers | second.buffers
        named = [(source, name) for source in (first, second) for name in source if name not in buffers]
        ignore = {*first, *second} - {name for source, name in named if source.is_merged(name)}
    common = [name for name in first if name in second and name not in ignore]
    pairs: dict[str, tuple[str, str]] = {}
    aliases: dict[str, str] = {}
    firsts: dict[tuple[str, str], str] = {}
    for name in common:
        # Tied in both sources: one tensor under its first name.
        owners = (first.aliases.get(name, name), second.aliases.get(name, name))
        if firsts.setdefault(owners, name) == name:
            pairs[name] = (name, name)
        else:
            aliases[name] = firsts[owners]

    only: list[tuple[str, ...]] = []
    untied: list[str] = []
    named_alike = list(pairs)
    for i, (here, there) in enumerate(((first, second), (second, first))):
        extra = [name for name in here if name not in there and name not in ignore]
        may_tie = [name for name in extra if kind_of(name) in TIEABLE]
        # Of thousands of tensors only those that could be one with another.
        sizes = {here.shape(name)[any_rows:] for name in may_tie}
        alike = [name for name in named_alike if may_tie and here.shape(name)[any_rows:] in sizes]
        can_own = [name for name in alike if kind_of(name) in TIEABLE]
        aliases |= find_tied(here, extra, named_alike, may_tie, can_own)
        for name in may_tie:
            if name not in aliases and (owner := embedding_of(name, here, there, can_own, any_rows)):
                pairs[name] = (name, owner) if i == 0 else (owner, name)
                untied.append(name)
        only.append(tuple(name for name in extra if name not in aliases and name not in pairs))
    faults = _differences(first, second, pairs, same_dtype, any_rows)
    return Match(first, second, pairs, aliases, (only[0], only[1]), tuple(untied), tuple(faults))


def _differences(
    first: TensorSource,
    second: TensorSource,
    pairs: Mapping[str, tuple[str, str]],
    same_dtype: bool,
    any_rows: bool,
) -> Iterator[str]:
    """Yield a sentence if tensors that belong together differ in kind."""
    changed, rows = {}, {}
    for name, (a, b) in pairs.items():
        shapes, dtypes = (first.shape(a), second.shape(b)), (first.dtype(a), second.dtype(b))
        if shapes[0] != shapes[1] and any_rows and rows_apart(*shapes, dims=1):
            rows[name] = (shapes[0][0], shapes[1][0])
        elif shapes[0] != shapes[1]:
            changed[name] = f"{name!r} is {list(shapes[0])} and {list(shapes[1])}"
        elif first.is_merged(a) != second.is_merged(b) or (same_dtype and dtypes[0] != dtypes[1]):
            changed[name] = f"{name!r} is {dtypes[0]} and {dtypes[1]}"
    if changed:
        way_out = "both must be of one architecture" + " and one dtype" * same_dtype
        shapes_of = [(first.shape(pairs[name][0]), second.shape(pairs[name][1])) for name in changed]
        if all(rows_apart(*shapes, dims=2) for shapes in shapes_of):
            way_out = "pass align_vocabulary=True, or resize one model to the vocabulary of the other"
        yield f"{first.origin} and {second.origin} do not match: {some(changed.values())}; {way_out}"
    if len(set(rows.values())) > 1:
        listed = some(f"{name!r} has {a} and {b} rows" for name, (a, b) in rows.items())
        yield f"{listed}: these are not two sizes of one vocabulary; resize the models first"


def names_in_memory(source: TensorSource) -> dict[str, list[str]]:
    """Return for each tensor of a source what it belongs to in the memory of a model; none where that is not known."""
    layout = layout_of(source)
    found: defaultdict[str, list[str]] = defaultdict(list)
    if (view := layout and in_memory(source, layout)) is not None:
        for name in view:
            for part in own_names(view, name):
                found[part].append(name)
    return dict(found)


def stored_whole(source: TensorSource) -> dict[str, str]:
    """Return the tensors of a source under their own names and those that they have in the memory of a model.

    What a model packs, or has in another order of elements, is under its own name alone.
    """
    layout = layout_of(source)
    view = layout and in_memory(source, layout)
    found = {name: name for name in source}
    for name, tensor in view.tensors.items() if view is not None else ():
        if isinstance(tensor, Assembly) and (own := tensor.renamed(source)) is not None:
            found[name] = own
    return found


def named_as(source: TensorSource, names: Collection[str]) -> TensorSource:
    """Return a source under its own names or under those that a model has in memory: whichever more of `names` are."""
    if all(name in source for name in names):
        return source
    layout = layout_of(source)
    view = layout and in_memory(source, layout)
    return source if view is None else max((source, view), key=lambda each: sum(name in each for name in names))


def has_first_rows(shape: torch.Size, whole: torch.Size) -> bool:
    """Return whether a shape is that of the first rows of another."""
    return len(shape) == len(whole) > 0 and shape[1:] == whole[1:] and shape[0] < whole[0]


def _with_faults(found: Match, unmatched: str, hint: str) -> Match:
    """Return a match with what is wrong with tensors that only one source holds."""
    sources, faults = (found.first, found.second), [*found.faults]
    lacking = [
        f"{there.origin} lacks {some(map(repr, only))} of {here.origin}"
        for here, there, only in zip(sources, reversed(sources), found.only, strict=True)
        if only
    ]
    if not found.pairs:
        origins = " and ".join(source.origin for source in sources)
        faults.append(f"no tensor is in both of {origins}{hint}; check the paths")
    elif lacking and min(found.shares) < 0.5:
        share, origin = min(zip(found.shares, (source.origin for source in sources), strict=True))
        faults.append(
            f"only {share:.0%} of the bytes of {origin} belong to a tensor of the other: {'; '.join(lacking)}"
            f"{hint}; two models of one architecture are needed"
        )
    elif lacking and unmatched == "error":
        way_out = "both must hold the same tensors, tied copies apart, or say what becomes of others with unmatched="
        faults.append(f"{'; '.join(lacking)}{hint}; {way_out}")
    return replace(found, faults=tuple(faults))


def _prefix_hint(found: Match) -> str:
    """Return which prefixes would make more tensors belong together, as a part of a sentence, or nothing."""
    most, best = common_prefixes(*found.only)
    prefixes = [repr(prefix) for prefix in dict.fromkeys(best) if prefix]
    given = prefixes[0] if len(prefixes) == 1 else f"({', '.join(prefixes)})"
    return f"; {most} of them would match with strip_prefix={given}" if most else ""


def common_prefixes(ours: Collection[str], theirs: Collection[str]) -> tuple[int, tuple[str, str]]:
    """Return how many names of two models would be equal without a prefix of each, and the two that make it most."""
    starts = []
    for names in (ours, theirs):
        counts = Counter(start for name in names for start in _beginnings(name))
        # Few are left to be tried: those that most of the names have.
        starts.append(["", *(start for start, count in counts.items() if 2 * count > len(names))])
    most, best = 0, ("", "")
    for a in starts[0]:
        stripped = {name.removeprefix(a) for name in ours}
        for b in starts[1]:
            fit = sum(name.removeprefix(b) in stripped for name in theirs)
            if fit > most:
                most, best = fit, (a, b)
    return most, best


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for i in range(1, min(len(parts), _LONGEST_PREFIX) + 1):
        yield ".".join(parts[:i]) + "."


def _layouts(found: Match) -> str:
    """Return that the files of one architecture are laid out in two ways, as a part of a sentence."""
    ours, theirs = ((only or ("nothing else",))[0] for only in found.only)
    return (
        f"; they are one architecture in two layouts, with {ours!r} and {theirs!r}, of other orders of elements: "
        "write one of them anew with from_pretrained and save_pretrained of Transformers, or, for a reference delta, "
        "use ReferenceDelta.from_models(base_model, sft_model)"
    )


def _misfits(found: Match) -> tuple[int, int]:
    return len(found.faults) + (not found.pairs), sum(map(len, found.only))


def _renamed(source: TensorSource, prefixes: Sequence[str], rename: Mapping[str, str]) -> ViewSource:
    """Return a source under the names that the caller wants."""
    names: dict[str, str] = {}
    for name in source:
        new = name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))
        for pattern, replacement in rename.items():
            new = re.sub(pattern, replacement, new)
        if new in names:
            raise ValueError(f"{names[new]!r} and {name!r} of {source.origin} would both be called {new!r}; rename one")
        names[new] = name
    views = {new: Assembly.whole(name, source.shape(name)) for new, name in names.items()}
    buffers = {new for new, name in names.items() if name in source.buffers}
    return ViewSource(source, views, buffers=buffers, ordered=source.ordered)


def _as_in_memory(
    sources: tuple[TensorSource, TensorSource], renamed: tuple[TensorSource, TensorSource], given: Layout | None
) -> tuple[Any, Any] | None:
    """Return two sources under the names of a model in memory, a module as it is; None if they are not known.

    A `given` layout is that of a source that has none.
    """
    modules = [isinstance(source, MemorySource) and source.module is not None for source in sources]
    if all(modules):
        return None
    layouts = [layout_of(source) or given for source in sources]
    views: list[TensorSource | None] = []
    for i, source in enumerate(renamed):
        # What a module of the caller is called counts more than what its files say.
        layout = layouts[1 - i] if modules[1 - i] or layouts[i] is None else layouts[i]
        views.append(source if modules[i] else layout and in_memory(source, layout))
    return None if None in views else (views[0], views[1])


def _in_names_of(first: ViewSource, second: ViewSource) -> ViewSource:
    """Return what lies behind the second of two views in memory under the names that lie behind the first."""
    tensors: dict[str, Assembly | Conversion] = {
        name: Assembly.whole(name, second.source.shape(name)) for name in first.source if name in second.source
    }
    pieces: defaultdict[str, list[Piece]] = defaultdict(list)
    for name, ours in first.tensors.items():
        theirs = second.tensors.get(name)
        if theirs is None or isinstance(ours, Conversion) or isinstance(theirs, Conversion):
            continue
        whole = [each.renamed(source) for each, source in ((ours, first.source), (theirs, second.source))]
        if whole[0] is not None and whole[1] is not None:
            # Even if the two differ in their rows.
            tensors.setdefault(whole[0], Assembly.whole(whole[1], second.source.shape(whole[1])))
            continue
        # Of two files that pack nothing, hundreds of experts in each, a piece of one is a piece of the other.
        same = {_corners(other.box): other for other in theirs.pieces}
        for piece in ours.pieces:
            found = same.get(_corners(piece.box))
            parts = [found] if found else [part for each in theirs.pieces if (part := each.within(piece.box))]
            for part in parts:
                own = piece.within(part.box)
                assert own is not None
                sides = [both for both in zip(own.source, part.source, strict=True) if both != (None, None)]
                box, source = zip(*sides, strict=True) if sides else ((), ())
                pieces[piece.name].append(Piece(box, part.name, source))
    for name, own_pieces in pieces.items():
        made = Assembly(first.source.shape(name), own_pieces)
        # Files are read in ranges, not in boxes.
        in_ranges = not second.files() or ViewSource(second.source, {name: made}).ranges(name) is not None
        if made.is_full and in_ranges:
            tensors.setdefault(name, made)
    used = {part for tensor in tensors.values() if isinstance(tensor, Assembly) for part in tensor.names}
    rest = {name: Assembly.whole(name, second.source.shape(name)) for name in second.source if name not in used}
    return ViewSource(second.source, {**rest, **tensors})


def _corners(box: Box) -> tuple[tuple[int, int] | None, ...]:
    return tuple(side and (side.start, side.stop) for side in box)


def own_names(source: TensorSource, name: str) -> list[str]:
    """Return what the tensors behind one of a view are called."""
    if not isinstance(source, ViewSource):
        return [name]
    return [own for part in source.tensors[name].names for own in own_names(source.source, part)]


def _is_made(source: TensorSource, name: str) -> bool:
    if not isinstance(source, ViewSource):
        return False
    tensor = source.tensors[name]
    return isinstance(tensor, Conversion) or tensor.renamed(source.source) != name


def _nbytes(source: TensorSource, name: str) -> int:
    return prod(source.shape(name)) * source.dtype(name).itemsize
