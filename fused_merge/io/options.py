"""The options of pairing two models and of loading one with Transformers. Nothing here waits for torch."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fused_merge.options import Option, definition, one_of, optional
from fused_merge.per_tensor import parse_dtype
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import torch


def check_dtype(name: str, dtype: Any) -> Any:
    """Return a dtype from its name, or raise ValueError."""
    return parse_dtype(dtype, what=name)


def _check_prefixes(name: str, prefixes: Any) -> tuple[str, ...]:
    return (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)


def _check_renamings(name: str, renamings: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    """Return what is renamed; on the command line each is PATTERN=REPLACEMENT."""
    if isinstance(renamings, Mapping):
        return dict(renamings)
    split = [text.partition("=") for text in renamings]
    if wrong := [pattern for pattern, equals, _ in split if not (pattern and equals)]:
        raise ValueError(f"{name} must be a regular expression and what replaces it, 'layer=layers', got {wrong[0]!r}")
    return {pattern: replacement for pattern, _, replacement in split}


def _absolute(name: str, path: "str | os.PathLike[str]") -> str:
    return os.path.abspath(os.path.expanduser(path))


@definition
class PairingOptions(TypedDict, total=False):
    """Which tensors of two models belong together, beside those of one name.

    Options:
        align_vocabulary: pair embeddings and heads with other numbers of rows; only the rows that both have are merged.
        strip_prefix: beginnings of names, such as `"net."`, that are left out before names are compared.
        rename: regular expressions, and what replaces them in names before these are compared.
        any_architecture: pair tensors of models even if `config.json` names another architecture in each.
    """

    align_vocabulary: Annotated[bool, Option(False, cli={})]
    strip_prefix: Annotated[
        "str | Iterable[str]", Option((), _check_prefixes, cli={"type": list[str], "metavar": "PREFIX"})
    ]
    rename: Annotated[
        "Mapping[str, str] | Iterable[str]",
        Option((), _check_renamings, cli={"type": list[str], "metavar": "PATTERN=REPLACEMENT"}),
    ]
    any_architecture: Annotated[bool, Option(False, cli={})]


@definition
class DeltaOptions(PairingOptions, total=False):
    """How the two models of a reference delta are paired.

    Options:
        unmatched: what happens to tensors that only one model holds: `"error"`, or `"ignore"`: they have no tau.
        config: folder with the `config.json` of the model, for files that have none beside them; it says, by way of
            Transformers, how tensors are called, packed and ordered in memory, and an optimizer that is given
            parameters without names needs that order.
    """

    unmatched: Annotated[str, Option("error", one_of("error", "ignore"), cli={})]
    config: Annotated[
        "str | os.PathLike[str] | None", Option(None, optional(_absolute), cli={"type": Path, "metavar": "FOLDER"})
    ]


@definition
class PathOptions(PairingOptions, total=False):
    """How a model in memory is paired with the ends of a path.

    Options:
        unmatched: what happens to tensors that not all three hold: `"error"`; `"copy"`: the model gets those that one
            end holds; `"ignore"`: the model keeps its own.
    """

    unmatched: Annotated[str, Option("error", one_of("error", "copy", "ignore"), cli={})]


@definition
class OutputOptions(PairingOptions, total=False):
    """How models are paired whose merge is written.

    Options:
        unmatched: what happens to tensors that not all models hold: `"error"`, `"copy"` or `"drop"`; a copy goes to
            every output, from the model whose configuration goes along, else from the first that holds the tensor.
    """

    unmatched: Annotated[str, Option("error", one_of("error", "copy", "drop"), cli={})]


@definition
class LoadingOptions(TypedDict, total=False):
    """What the model is.

    Options:
        trust_remote_code: run Python code that the folder of `tuned` brings with it; only for folders that you trust.
        loader: function that returns the model, as `"module:function"`; called with (folder, device, dtype), it returns
            a model, or (model, tokenizer): for what Transformers does not load by itself. See
            `fused_merge.io.transformers.ModelLoader`.
    """

    trust_remote_code: Annotated[bool, Option(False, cli={})]
    loader: Annotated["str | None", Option(None, cli={"metavar": "MODULE:FUNCTION"})]


@definition
class ModelOptions(LoadingOptions, ProgressOption, total=False):
    """How the model is loaded and watched.

    Options:
        device: where the model runs, such as `"cuda:0"`.
        dtype: dtype of the loaded model, such as `"bfloat16"`; None is that of the files of `tuned`.
    """

    device: Annotated[str, Option("cpu", cli={})]
    dtype: Annotated["torch.dtype | str | None", Option(None, check_dtype, cli={"show_default": "as stored"})]
