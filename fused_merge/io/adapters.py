"""Adapters of PEFT: what a file of LoRA factors adds to which weights, and whether two adapters fit together.

To a weight an adapter adds scale * B A, with A `[r, in]` and B `[out, r]` (Hu et al. 2021, arXiv 2106.09685). What the
factors are called and the scale follow PEFT, whose `adapter_config.json` stands beside them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from fused_merge.io.formats import ADAPTER_CONFIG, MERGE_ADAPTER
from fused_merge.io.mergeable import check_mergeable, factor_in
from fused_merge.io.sources import FileSource, TensorSource
from fused_merge.names import adapted_weight, some

logger = logging.getLogger("fused_merge")

# Keys of a configuration with which an adapter is still a sum of products, each on the base as it is. Any other one
# that is set may mean more: magnitudes of DoRA, biases, whole modules.
_PLAIN = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout"),
        *("fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config"),
    }
)
# How factors begin; other ways, such as PiSSA, change the base, too.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# What decides the scale of a product, and so what the same factors mean.
_SCALE_KEYS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_dora")
_IN_MEMORY = "merge it into its base first, with merge_and_unload() of PEFT"


class Factors(NamedTuple):
    """What an adapter adds to one weight: scale * B A, transposed for embeddings and where `fan_in_fan_out` says so."""

    a: str  # the name of A, `[r, ...]`
    b: str  # the name of B, `[out, r, ...]`
    rank: int
    scale: float
    transposed: bool


class Adapter(NamedTuple):
    """An adapter whose every tensor is a factor."""

    source: FileSource
    config: Mapping[str, Any]
    factors: Mapping[str, Factors]  # by the weight that they are for, as the model without an adapter calls it


def is_adapter(source: TensorSource) -> bool:
    """Return whether a source is an adapter, with or without its configuration; a model among factors is none."""
    if isinstance(source, FileSource) and source.adapter is not None:
        return True
    return factor_in(source) is not None and None not in map(adapted_weight, source)


def read_adapters(sources: Sequence[FileSource]) -> list[Adapter]:
    """Return several adapters, as `read_adapter`; warn if they name different bases."""
    adapters = [read_adapter(source) for source in sources]
    bases = {str(each.config.get("base_model_name_or_path")): each.source.origin for each in adapters}
    if len(bases) > 1:
        listed = some(f"{base} ({origin})" for base, origin in bases.items())
        logger.warning("the adapters were trained on bases of different names: %s; check that these are one", listed)
    return adapters


def read_adapter(source: FileSource) -> Adapter:
    """Return the products that a folder or file of an adapter stands for; reads no tensor.

    Raises:
        ValueError: if there is no configuration, which says the scale, or the adapter is more than products: DoRA,
            biases, `modules_to_save`, factors that begin with a part of the base; the sentence names the key or tensor.
    """
    config = source.adapter
    if config is None:
        raise ValueError(
            f"{source.origin} holds factors of an adapter, such as {factor_in(source)!r}, and no {ADAPTER_CONFIG} "
            "stands beside it that says their scale; give the folder of the adapter"
        )
    empty: tuple[Any, ...] = (None, False, "none", "", [], {})
    more = [key for key, value in config.items() if key not in _PLAIN and value not in empty]
    if config.get("init_lora_weights", True) not in _STARTS:
        more.append("init_lora_weights")
    if more:
        listed = some(f"{key} = {config[key]!r:.60}" for key in more)
        raise ValueError(f"{source.origin} is more than products of factors, as {listed} says; {_IN_MEMORY}")
    check_mergeable(source, factors=True)
    found: dict[str, dict[str, str]] = {}
    for name in source:
        if (weight := adapted_weight(name)) is None:
            if ".base_layer." in name:
                raise ValueError(
                    f"{source.origin} holds {name!r}, a weight of its base, as PEFT saves it with embeddings; save the "
                    "adapter again with save_pretrained(..., save_embedding_layers=False)"
                )
            raise ValueError(f"{source.origin} holds {name!r}, which is no factor of LoRA; {_IN_MEMORY}")
        found.setdefault(weight, {})["A" if re.search(r"_A(\.weight)?$", name) else "B"] = name
    factors = {weight: _factors(weight, both, source, config) for weight, both in found.items()}
    if not factors:
        raise ValueError(f"{source.origin} holds no factors; save the adapter again")
    return Adapter(source, config, factors)


def check_adapters(first: TensorSource, second: TensorSource) -> None:
    """Raise ValueError if one of two sources holds an adapter and the other does not; warn if their scales differ."""
    factors = factor_in(first), factor_in(second)
    if (factors[0] is None) != (factors[1] is None):
        one, other = (first, second) if factors[0] else (second, first)
        raise ValueError(
            f"{one.origin} holds factors of an adapter, such as {factors[0] or factors[1]!r}, and {other.origin} holds "
            f"none; give two adapters, such as the one at the start and the one after training, or {MERGE_ADAPTER}"
        )
    configs = [each.adapter for each in (first, second) if isinstance(each, FileSource) and each.adapter is not None]
    if len(configs) == 2:
        a, b = configs
        if apart := [
            f"{key} ({a.get(key)!r} against {b.get(key)!r})" for key in _SCALE_KEYS if a.get(key) != b.get(key)
        ]:
            logger.warning(
                "%s and %s differ in %s: the same factors mean another product in each, so check that what lies "
                "between is of use",
                *(first.origin, second.origin, ", ".join(apart)),
            )


def _factors(weight: str, names: Mapping[str, str], source: FileSource, config: Mapping[str, Any]) -> Factors:
    """Return the two factors of a weight, whose shapes fit each other and the configuration."""
    if len(names) < 2:
        raise ValueError(
            f"{source.origin} holds only one of two factors, {next(iter(names.values()))!r}; save it again"
        )
    a, b = names["A"], names["B"]
    key = weight.removesuffix(".weight")
    try:
        rank = _by_pattern(config.get("rank_pattern"), key, config.get("r"))
        alpha = _by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha"))
    except (re.error, AttributeError) as error:
        raise ValueError(
            f"{source.origin}: rank_pattern and alpha_pattern of {ADAPTER_CONFIG} must map regular expressions to "
            f"numbers ({error}); save the adapter again"
        ) from error
    shapes = tuple(source.shape(a)), tuple(source.shape(b))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{source.origin}: {ADAPTER_CONFIG} gives {weight!r} the rank {rank!r} and alpha {alpha!r}")
    if min(map(len, shapes)) < 2 or shapes[0][0] != rank or shapes[1][1] != rank or prod(shapes[1][2:]) != 1:
        raise ValueError(
            f"{source.origin}: {a!r} is {list(shapes[0])} and {b!r} {list(shapes[1])}, which are no factors of the "
            f"rank {rank} that {ADAPTER_CONFIG} says; save the adapter again"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(a, b, rank, scale, "lora_embedding_" in a or bool(config.get("fan_in_fan_out")))


def _by_pattern(patterns: Any, key: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT reads them."""
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", key))
    return next(matching, default)
