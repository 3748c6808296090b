"""What `config.json` says of the weights beside it: whether two models mean the same by theirs, what it declares."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from fused_merge.io.sources import TensorSource
from fused_merge.names import layer_of

logger = logging.getLogger("fused_merge")

# Parts of the keys that decide what a model computes with the same weights; what decides their shapes need not be here.
_MEANS = re.compile(
    r"model_type|^tie_|head|(^|_)eps|(^|_)act|feed_forward_proj|norm|softcap|scal|multiplier|residual|window|pattern|"
    r"layer_types|chunk_size|rope|rotary|alibi|position_embedding_type|causal|bidirectional|topk|experts_per_tok|"
    r"n_group|scoring_func|feature_layer|select|merge_size"
)
_MEANS_NOT = re.compile(r"loss|init|dropout|drop_|_token|dtype|logging|cache")

# Other spellings of one thing: of Transformers before v5, and of single architectures.
_ROPE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "rope_local_base_freq": "rope_local_base_freq",
    "local_rope_theta": "rope_local_base_freq",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
_ROPE_TYPES = {"su": "longrope", "mrope": "default"}

_MTP = re.compile(r"(mtp|nextn)\w*layers$")


def check_configs(sources: Sequence[TensorSource], *, any_architecture: bool = False) -> None:
    """Compare the configuration of the first model with the others', where the meaning of weights depends on it.

    Such are the type of the model, rotary embeddings, heads, norms, activations, ties, windows, scales and routing,
    also of nested configurations. What both give is compared, in whatever spelling; a rotary embedding that only one
    gives is compared with the default of Transformers, if that is installed. One warning lists keys and both values.
    Sources without a configuration are passed over.

    Raises:
        ValueError: if the architectures differ and `any_architecture` is false, or a configuration cannot be read.
    """
    configs = [(source.origin, source.config) for source in sources if source.config]
    differences = []
    for origin, config in configs[1:]:
        first, base = configs[0]
        kinds = _architectures(base), _architectures(config)
        if all(kinds) and kinds[0] != kinds[1] and not any_architecture:
            raise ValueError(
                f"{first} is a {'/'.join(kinds[0])} and {origin} a {'/'.join(kinds[1])}; "
                "take models of one architecture, or pass any_architecture=True"
            )
        if listed := [f"{key} ({_short(a)} against {_short(b)})" for key, a, b in _differences(base, config)]:
            differences.append(f"{first} and {origin} differ in {', '.join(listed)}")
    if differences:
        _warn("; ".join(differences))


@cache
def _warn(differences: str) -> None:
    """Say it once, however often two models are paired in a job."""
    logger.warning(
        "%s: the same weights mean something else in each, so check that what lies between is of use", differences
    )


def declared_but_missing(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return what a configuration, nested ones included, declares and no tensor of `names` belongs to.

    Such are layers for multi-token prediction, called `mtp` or numbered beyond the others, and the last of the layers.
    Each is said as in `"num_nextn_predict_layers = 1"`.
    """
    if not any("layers" in key for _, own in _nested(config) for key in own):
        return []
    places = [place for name in names if (place := layer_of(name)) and "vis" not in place[0]]
    stacks: dict[str, set[int]] = {}
    for stack, layer in places:
        stacks.setdefault(stack, set()).add(layer)
    found = []
    for path, own in _nested(config):
        layers = own.get("num_hidden_layers")
        for key, value in own.items():
            if not _MTP.search(key) or not isinstance(value, int) or value < 1:
                continue
            beyond = isinstance(layers, int) and any(layer >= layers for _, layer in places)
            if not beyond and not any("mtp" in name.lower() or "nextn" in name.lower() for name in names):
                found.append(f"{path}{key} = {value}")
        # A stack of one may be a layer that is used several times.
        most = max(map(len, stacks.values()), default=0)
        if "vis" not in path and isinstance(layers, int) and 1 < most < layers and "num_hidden_groups" not in own:
            found.append(f"{path}num_hidden_layers = {layers}")
    return found


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Return what a configuration calls its classes, without what FSDP makes of such a name."""
    listed = config.get("architectures")
    return sorted(str(each).removeprefix("FSDP") for each in listed) if isinstance(listed, list) else []


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the keys in which two configurations differ, with both values."""
    found = []
    if ("text_config" in a) != ("text_config" in b):
        # Before v5, Transformers kept what is in there beside it.
        a, b = ({**text, **each} if isinstance(text := each.get("text_config"), dict) else each for each in (a, b))
    others = dict(_nested(b))
    for path, own in _nested(a):
        if path not in others:
            continue
        values = _meaning(own), _meaning(others[path])
        ropes = _rope(own), _rope(others[path])
        if ropes[0] != ropes[1]:
            ropes = _with_defaults(own, ropes[0]), _with_defaults(others[path], ropes[1])
        for one, other in (values, ropes):
            found += [(path + key, one[key], other[key]) for key in one if key in other and one[key] != other[key]]
    return found


def _nested(config: Mapping[str, Any], path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Return a configuration and those that it consists of, such as `text_config`, each with what precedes its keys."""
    found = [(path, config)]
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            found += _nested(value, f"{path}{key}.") if not re.search("quantiz|compress|generation", key) else []
    return found


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the meaning of weights, rotary embeddings apart."""
    unused = {*_ROPE, "rope_scaling"}
    if config.get("use_sliding_window") is False:
        unused |= {"sliding_window", "max_window_layers"}
    means = (key for key in config if _MEANS.search(key) and not _MEANS_NOT.search(key) and key not in unused)
    # A number of heads, or their size, that is left open is derived from others.
    return {
        key: value
        for key in means
        if not isinstance(value := config[key], dict) and not (value is None and "head" in key)
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of rotary embeddings: theta and scaling, in the spelling of Transformers v5."""
    found = {_ROPE[key]: value for key, value in config.items() if key in _ROPE}
    given = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    scaling = {key: value for each in given if isinstance(each, dict) for key, value in each.items()}
    # By the type of the layers: those without a window are what older files speak of.
    local, whole = scaling.pop("sliding_attention", None), scaling.pop("full_attention", None)
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    scaling |= whole if isinstance(whole, dict) else {}
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind)
    found |= scaling
    if found or any(key in config for key in ("rope_scaling", "rope_parameters")):
        found["rope_type"] = "default" if kind is None else _ROPE_TYPES.get(str(kind), kind)
    return {key: value for key, value in found.items() if value is not None}


def _with_defaults(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary embeddings with what Transformers takes where a configuration of this type says nothing."""
    with suppress(Exception):
        from transformers import CONFIG_MAPPING

        return {**_rope(CONFIG_MAPPING[str(config["model_type"])]().to_dict()), **rope}
    return dict(rope)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
