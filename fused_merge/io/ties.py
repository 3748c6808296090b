"""Embeddings and heads that are one tensor: by storage, bit for bit, or because a configuration says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from fused_merge.io.sources import TensorSource, bits, same_bits
from fused_merge.names import kind_of

# The kinds of tensors that a model can tie: a copied layer is a layer.
TIEABLE = ("embeddings", "head")


def rows_apart(a: torch.Size, b: torch.Size, *, dims: int) -> bool:
    """Return whether two shapes of at least so many dimensions differ in the number of rows alone."""
    return len(a) == len(b) >= dims and a[1:] == b[1:] and a != b


def embedding_of(
    head: str, here: TensorSource, there: TensorSource, common: Sequence[str], any_rows: bool
) -> str | None:
    """Return the embedding that `there` uses as a head that only `here` has by itself, None if it is none."""
    if kind_of(head) != "head" or len(here.shape(head)) != 2 or not ties(there):
        return None
    shape = here.shape(head)
    fits = [
        name
        for name in common
        if kind_of(name) == "embeddings"
        and (there.shape(name) == shape or (any_rows and rows_apart(there.shape(name), shape, dims=2)))
    ]
    return fits[0] if len(fits) == 1 else None


def ties(source: TensorSource) -> bool | None:
    """Return whether the configuration of a source says that its head is its embedding; None without one."""
    nested = source.config.get("text_config")
    said = source.config.get("tie_word_embeddings")
    if said is None and isinstance(nested, Mapping):
        said = nested.get("tie_word_embeddings")
    # Transformers leaves out of a configuration what is its default, which is true.
    return bool(said is not False) if source.config else None


def find_tied(
    source: TensorSource, extra: Sequence[str], common: Sequence[str], may_tie: Sequence[str], owners: Sequence[str]
) -> dict[str, str]:
    """Return those `extra` tensors of a source that are tied to a `common` one, and to which.

    Those of one storage are; so are, of `may_tie`, those that are bit-equal to one of `owners`, unless they are sharded
    or the configuration says that they only happen to be.
    """
    first = {source.aliases.get(name, name): name for name in common} if source.aliases else {}
    tied = {name: first[owner] for name in extra if (owner := source.aliases.get(name, name)) in first}
    # Of sharded tensors no process alone has the bits; those of a module say by their storage whether they are tied.
    may_tie = [name for name in may_tie if name not in tied and source.fragment(name) is None]
    candidates: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in owners if may_tie and ties(source) is not False else ():
        candidates[_fingerprint(source, name)].append(name)
    for name in may_tie if candidates else ():
        alike = candidates.get(_fingerprint(source, name), ())
        if found := next((other for other in alike if _same_values(source, name, other)), None):
            tied[name] = found
    return tied


def _fingerprint(source: TensorSource, name: str) -> tuple[object, ...]:
    """Return what tied tensors have in common, from the beginning of a tensor alone."""
    head = bits(source.head(name, 1024).contiguous()).cpu().numpy().tobytes()
    return source.shape(name), source.dtype(name), head


def _same_values(source: TensorSource, name: str, other: str) -> bool:
    """Return whether two tensors of one fingerprint are bit-equal and not constant."""
    pattern = bits(source[name]).flatten()
    # Fresh norms and biases are constant and equal one another by accident.
    return bool((pattern != pattern[:1]).any()) and same_bits(source[name], source[other])
