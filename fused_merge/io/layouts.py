"""The names that a model has in memory, and how the tensors of its files become those: as Transformers defines it.

Transformers renames and packs some tensors when it loads a model and undoes that when it saves one: experts are one
tensor for each layer in memory and one for each expert on disk. Its own conversion is run here on descriptions of
tensors (`fused_merge.io.views`) instead of their data, so that a packed tensor is read expert by expert.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_merge.io.files import expanded, stamp_of
from fused_merge.io.sources import FileSource, MemorySource, PathLike, TensorSource, persistent_buffers
from fused_merge.io.transformers import check_transformers
from fused_merge.io.views import Assembly, Conversion, ViewSource
from fused_merge.names import canonical_name

logger = logging.getLogger("fused_merge")


class Layout(NamedTuple):
    """The tensors of a model in memory."""

    model: Any  # a `PreTrainedModel`, perhaps on the device "meta"
    shapes: Mapping[str, torch.Size]  # parameters in their order, then persistent buffers; tied ones under every name
    owners: Mapping[str, str]  # every further name of a tied parameter -> its first
    buffers: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Return the layout of a model of Transformers."""
        first: dict[int, str] = {}
        owners, shapes = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shapes[name] = parameter.shape
            if (owner := first.setdefault(id(parameter), name)) != name:
                owners[name] = owner
        buffers = {name: tensor.shape for name, tensor in persistent_buffers(model).items()}
        return cls(model, {**shapes, **buffers}, owners, frozenset(buffers))


def layout_of(source: TensorSource) -> Layout | None:
    """Return the layout of the model that a source holds, None where it is none that Transformers knows.

    Nothing is downloaded, and no code of a checkpoint is run.
    """
    if isinstance(source, MemorySource):
        return None if source.module is None else _of_module(source.module)
    config = source.config_path if isinstance(source, FileSource) else None
    if config is None or find_spec("transformers") is None:
        return None
    try:
        return _of_folder(config.parent, stamp_of(config))
    except Exception as error:
        # It fails in many ways on what it does not know; names are then those of the files.
        logger.debug("Transformers makes no model of %s: %s: %s", config.parent, type(error).__name__, error)
        return None


def layout_of_config(path: PathLike) -> Layout:
    """Return the layout of the model that the config.json of a folder describes.

    Raises:
        FileNotFoundError: if there is none.
        ImportError: without Transformers.
        ValueError: if Transformers does not know the model.
    """
    folder = expanded(path)
    config = folder if folder.name == "config.json" else folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist; give the folder with the configuration of the model")
    check_transformers()
    try:
        return _of_folder(config.parent, stamp_of(config))
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"Transformers makes no model of {config} ({why}); give the configuration of one") from error


def _of_module(module: nn.Module) -> Layout | None:
    # Whoever has such a model has imported its class.
    modeling = sys.modules.get("transformers.modeling_utils")
    model = next((part for part in module.modules() if modeling and isinstance(part, modeling.PreTrainedModel)), None)
    if model is None or {name for name, _ in model.named_parameters()} != {
        # DDP and torch.compile leave the names alone.
        canonical_name(name)
        for name, _ in module.named_parameters()
    }:
        return None
    # FSDP2 makes a class of its own, by whose name Transformers would not find the conversion.
    kind = next(each for each in type(model).__mro__ if not each.__name__.startswith("FSDP"))
    return Layout.of(model) if kind is type(model) else _without_data(kind, model.config)


@lru_cache(maxsize=8)
def _of_folder(folder: Path, stamp: tuple[int, int]) -> Layout:
    import transformers

    # What it would say of a configuration is of no use where no model is loaded.
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named: Sequence[str] = config.architectures or ()
        if len(named) != 1:
            raise ValueError(f"its 'architectures' are {named or 'missing'}, not one class")
        return _without_data(getattr(transformers, named[0]), config)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def _without_data(kind: Any, config: Any) -> Layout:
    with torch.device("meta"):
        return Layout.of(kind(config))


def in_memory(source: TensorSource, layout: Layout) -> ViewSource | None:
    """Return the tensors of a source as a model of that layout has them, None if Transformers cannot convert them.

    What the model does not know keeps its name and comes last, but for what Transformers leaves out, too.
    """
    try:
        found, unknown = _converted(source, layout)
    except Exception as error:
        logger.debug("no conversion of %s: %s: %s", source.origin, type(error).__name__, error)
        return None
    # Of a tied parameter a file may have either name.
    for name, owner in layout.owners.items():
        if name in found and owner not in found:
            found[owner] = found.pop(name)
    tensors = {name: found[name] for name in layout.shapes if name in found}
    if 2 * len(tensors) < len(layout.shapes):
        return None
    complete = all(name in found or name in layout.owners or name in layout.buffers for name in layout.shapes)
    ordered = complete and not any(source.is_merged(name) for name in unknown)
    return ViewSource(
        source,
        tensors | {name: Assembly.whole(name, source.shape(name)) for name in unknown if name not in tensors},
        buffers=layout.buffers & tensors.keys(),
        ordered=ordered,
    )


def _converted(source: TensorSource, layout: Layout) -> tuple[dict[str, Assembly | Conversion], list[str]]:
    """Return the tensors that a model of a layout finds in a source, and the names that it does not know.

    The same as `transformers.core_model_loading.convert_and_load_state_dict_in_model`, without loading.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = layout.model
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    known, prefix = dict.fromkeys(layout.shapes, True), model.base_model_prefix
    found: dict[str, Assembly | Conversion] = {}
    # First target of each conversion -> a pattern of the converter, and for each of its patterns what it collected.
    collected: dict[str, tuple[str, dict[str, list[str]]]] = {}
    unknown = []
    for name in sorted(source, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = loading.rename_source_key(name, [], [], prefix, known)
        if renamed not in known:
            unknown.append(name)
        elif pattern is None:
            found.setdefault(renamed, Assembly.whole(name, source.shape(name)))
        else:
            collected.setdefault(renamed, (pattern, {}))[1].setdefault(pattern, []).append(name)

    def convert(first: str, pattern: str, parts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        converter = deepcopy(converter_of[pattern])
        for own, tensors in parts.items():
            converter.collected_tensors[own] = list(tensors)
        made = converter.convert(first, model=model, config=model.config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    for first, (pattern, names) in collected.items():
        pieces = {own: [Assembly.whole(name, source.shape(name)) for name in listed] for own, listed in names.items()}
        try:
            found |= convert(first, pattern, pieces)
        except (TypeError, AttributeError):
            # Boxes do not describe it. What it makes is seen on tensors without data.
            empty = {
                own: [torch.empty(source.shape(name), dtype=source.dtype(name), device="meta") for name in listed]
                for own, listed in names.items()
            }
            needed = tuple(name for listed in names.values() for name in listed)
            for target, tensor in convert(first, pattern, empty).items():

                def read(
                    data: Mapping[str, Tensor],
                    target: str = target,
                    call: tuple[str, str] = (first, pattern),
                    names: Mapping[str, list[str]] = names,
                ) -> Tensor:
                    parts = {own: [data[name] for name in listed] for own, listed in names.items()}
                    made: Tensor = convert(*call, parts)[target]
                    return made

                found[target] = Conversion(tensor.shape, needed, read)
    left_out = _left_out(model)
    return found, [name for name in unknown if not any(re.search(each, name) for each in left_out)]


def _left_out(model: Any) -> set[str]:
    """Return the patterns of names that Transformers leaves out of a file without a word."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    # Buffers that files of old versions hold and that are made anew.
    for pattern in (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"):
        if any(re.search(pattern, name) for name in buffers):
            patterns.add(pattern)
    return patterns
