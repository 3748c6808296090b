"""Canonical names of tensors, and what follows from a name: the key of random masks, the layer, the kind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MAY_BE_WRAPPED = re.compile("|".join((*_WRAPPERS, "lora_", "modules_to_save")))

# What PEFT calls the tensors of an adapter in memory, where it inserts the adapter's name, and what in its files.
_IN_ADAPTERS = (
    (re.compile(r"(\.lora_[AB])\.(?P<adapter>[^.]+)(\.(?:weight|bias))$"), r"\1\3"),
    (re.compile(r"(\.lora_embedding_[AB])\.(?P<adapter>[^.]+)$"), r"\1"),
    (re.compile(r"(\.lora_magnitude_vector)\.(?P<adapter>[^.]+)\.weight$"), r"\1"),
    (re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)(\..+)$"), r"\2"),
)
# A factor of an adapter as its file names it, behind the module that it adapts.
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|embedding_[AB])")


def _compiled(**patterns: str) -> dict[str, re.Pattern[str]]:
    return {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in patterns.items()}


# What a list of layers is called: `layers` in Llama and most others, `h` in GPT-2, `layer` in BERT, `block` in T5.
_LISTS = re.compile(r"layers?|h|(res)?blocks?", re.IGNORECASE)

# What the components of a name say about a tensor; the first pattern that matches any of them decides. Outside the
# layers heads come first, which have norms and projections of their own (`cls.predictions.transform.LayerNorm`,
# `embed_out`), and embeddings before norms, for `embeddings.LayerNorm` and `word_embeddings_layernorm`; what normalizes
# them before the first layer counts as theirs (`ln_pre`, `pre_layrnorm`).
OUTSIDE = _compiled(
    head=r"(\w+_)?heads?|cls|(pre_)?classifier|score|pooler|output|qa_outputs|vocab_(transform|layer_norm|projector)"
    r"|embed_out|project_out",
    embeddings=r"\w*embed\w*|\w*emb|wte|wpe|shared|project_in|ln_pre|pre_la?ye?r_?norm",
    norm=r"\w*norm\w*|ln_\w+",
)
# Within a layer norms come first, which are named after what they stand before or behind (`post_attention_layernorm`,
# `attention.output.LayerNorm`, `self_attn.q_norm`), and attention before MLP, since BERT calls the last projection of
# either `output` and OPT has its MLP, `fc1` and `fc2`, in no module of its own.
_INSIDE = _compiled(
    norm=r"\w*norm\w*|ln(_\w+|\d+)?",
    attention=r"\w*attn\w*|\w*attention\w*",
    mlp=r"\w*mlp\w*|(\w+_)?ffn?(_\w+)?|feed_?forward\w*|DenseReluDense|\w*moe|\w*experts?|fc\d|intermediate|output",
)


def canonical_name(name: str) -> str:
    """Return `name` without what DDP, torch.compile, FSDP and checkpointing insert: `module._orig_mod.w` becomes `w`.

    The last component is the tensor's own name and always stays. A tensor of an adapter is called what PEFT calls it in
    files, without the adapter's name: `q_proj.lora_A.default.weight` becomes `q_proj.lora_A.weight`.
    """
    if not MAY_BE_WRAPPED.search(name):
        return name
    name = _unwrapped(name)
    for pattern, in_file in _IN_ADAPTERS:
        name = pattern.sub(in_file, name)
    return name


def adapter_of(name: str) -> str | None:
    """Return which adapter of a model of PEFT in memory a tensor belongs to, None if its name does not say so."""
    found = (pattern.search(_unwrapped(name)) for pattern, _ in _IN_ADAPTERS)
    return next((each["adapter"] for each in found if each), None)


def adapted_weight(name: str) -> str | None:
    """Return the weight that a factor of an adapter is for, as the model without it calls that; None for no factor.

    `name` is canonical: `"base_model.model.h.0.attn.lora_A.weight"` is for `"h.0.attn.weight"`.
    """
    found = _FACTOR.fullmatch(name)
    return found and f"{found[1]}.weight"


def _unwrapped(name: str) -> str:
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in _WRAPPERS] + [last])


@cache
def tensor_id(name: str) -> int:
    """Return the number that keys the random masks of a tensor, so that they depend on nothing about the run.

    It is the first four bytes, little endian, of the SHA-256 of the canonical name.
    """
    return int.from_bytes(hashlib.sha256(canonical_name(name).encode()).digest()[:4], "little")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return what comes before the first component of a name that is a number, and the number; None if there is none.

    `"model.layers.7.mlp.up.weight"` is in layer 7 of `"model.layers"`, and `"0.weight"` in layer 0 of `""`.
    """
    parts = name.split(".")
    return next(((".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()), None)


def kind_of(name: str) -> str | None:
    """Return "embeddings", "attention", "mlp", "norm" or "head", or None if the name of a tensor does not tell."""
    place = list_and_layer(name)
    return _kind_by(name, OUTSIDE) if place is None else _kind_by(name[len(place[0]) + 1 :], _INSIDE)


def is_outside(component: str) -> bool:
    """Return whether a component of a name tells what a tensor outside the layers is."""
    return _kind_by(component, OUTSIDE) is not None


def list_and_layer(name: str) -> tuple[str, int] | None:
    """Return stack and number of the layer that a tensor is in, or None for one outside the layers."""
    place = layer_of(name)
    # `classifier.0.weight` is in no layer, and neither is `v_head.layers.0.weight`.
    if place is None or not _LISTS.fullmatch(place[0].rpartition(".")[2]):
        return None
    return None if _kind_by(place[0], OUTSIDE) == "head" else place


def _kind_by(name: str, patterns: Mapping[str, re.Pattern[str]]) -> str | None:
    components = name.split(".")
    return next((kind for kind, pattern in patterns.items() if any(map(pattern.fullmatch, components))), None)


def some(items: Iterable[str], shown: int = 3) -> str:
    """Return the first few items and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of a tensor, for error messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
