"""Merges written for mergekit: its YAML, read as the merge that it means.

This follows mergekit 0.1.5: `models:`, and `slices:` that keep every layer where it is; parameters of a model or
source, of a slice and of the file, the nearest first; numbers, gradients over the layers and lists of filters. As in
mergekit, a filter is a part of a tensor's name; a parameter that the method does not have is ignored, and so is one in
a place where the method does not look for it.

A file means something else here than in mergekit in these points:

- Arithmetic is fp32 (fp64 for fp64 tensors), rounded once at the end; mergekit computes in `dtype`, or in the widest
  dtype of the models. With `dtype: float32` both do the same, except for the order of additions.
- What DARE keeps is divided by the density, as in the paper, not rescaled to the L1 norm of the delta; masks are those
  of this library and depend on its seed.
- All magnitudes equal to the threshold of a trim stay, where mergekit keeps as many as fit.
- Slerp between a zero tensor and another is a straight line.
- Embeddings are merged row by row: `tokenizer_source` says whose tokenizer goes along, and permutes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from fused_merge.checkpoints.job import Job
from fused_merge.checkpoints.options import FileOptions
from fused_merge.io.sources import PathLike
from fused_merge.merge.merge import Coefficients, merge_job
from fused_merge.merge.options import MergePlanOptions
from fused_merge.methods import MERGE_METHODS, MergeMethod, check_coefficients, merge_method
from fused_merge.names import layer_of
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import parse_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
_PARAMETERS = ("weight", "density", "t", "normalize", "rescale", "lambda", "int8_mask")
_REFUSED = {
    "modules": "modules are not supported; list whole models under models",
    "tokenizer": "a tokenizer section is not supported; write tokenizer_source",
    "chat_template": "chat templates are not written; leave it out, and that of tokenizer_source goes along",
}
# Tensors outside the layers that mergekit reads with the first slice; the others belong to the last.
_BEFORE_THE_LAYERS = ("embed", "wte", "wpe")


class _Condition(NamedTuple):
    """One condition of a parameter: a number, or the points of a gradient, for names that contain the filter."""

    filter: str  # "" is part of every name
    values: tuple[float, ...]


_Parameters: TypeAlias = "dict[str, tuple[_Condition, ...]]"


class _Source(NamedTuple):
    model: Path
    parameters: _Parameters


class _Slice(NamedTuple):
    """Layers first to end - 1 of all its sources; end is None where it is the whole model."""

    sources: tuple[_Source, ...]
    scopes: tuple[_Parameters, ...]  # its own parameters and those of the file
    base: Path | None
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """The merge that a mergekit file asks for.

    The folder of the base is None for "linear"; the folders of the models are in the order of their sum; `options` is
    what the file says of the options of `plan_merge`.
    """

    path: Path
    method: MergeMethod
    base: Path | None
    models: tuple[Path, ...]
    options: Mapping[str, Any]
    _slices: tuple[_Slice, ...] = field(repr=False)

    def coefficients(self, names: Iterable[str]) -> dict[str, Coefficients]:
        """Return the weights and densities of each tensor.

        The layer of a tensor is the first numeric component of its name, as in `model.layers.3.mlp.up_proj.weight`, and
        the components before it are its stack. A gradient runs from the first to the last layer of a stack, or of the
        slice; tensors outside the layers have its first value, and those of a single layer its last.

        Args:
            names: names of all tensors of the models.

        Raises:
            ValueError: for a weight or t that is missing or out of range, or slices that are not all of the layers.
        """
        places = {name: layer_of(name) for name in names}
        layers: dict[str, int] = {}
        for stack, layer in filter(None, places.values()):
            layers[stack] = max(layers.get(stack, 0), layer + 1)
        if self._slices[-1].end is not None and [*layers.values()] != [self._slices[-1].end]:
            found = " and ".join(f"{count} ({stack})" for stack, count in layers.items()) or "0"
            raise ValueError(
                f"the slices of {self.path} are {self._slices[-1].end} layers, but the models have {found}; "
                "slices must be all of the layers, in order"
            )
        return {name: self._of(name, place, layers) for name, place in places.items()}

    def _of(self, name: str, place: tuple[str, int] | None, layers: Mapping[str, int]) -> Coefficients:
        part, t = self._slices[0], 0.0
        if place is not None:
            stack, layer = place
            part = next(part for part in self._slices if part.end is None or layer < part.end)
            count = (layers[stack] if part.end is None else part.end) - part.first
            t = (layer - part.first) / (count - 1) if count > 1 else 1.0
        elif "embed_out" in name or not any(word in name for word in _BEFORE_THE_LAYERS):
            part = self._slices[-1]

        scopes = {source.model: (source.parameters, *part.scopes) for source in part.sources}
        densities = None
        if self.method.spherical:
            weights: tuple[float, ...] = (self._number("t", name, t, part.scopes),)
        else:
            weights = tuple(self._number("weight", name, t, scopes[model], model) for model in self.models)
        if self.method.sparsify != "none":
            found = [_evaluate("density", name, t, scopes[model]) for model in self.models]
            densities = tuple(1.0 if density is None else density for density in found)
        try:
            check_coefficients(self.method, len(self.models), weights, densities)
        except ValueError as error:
            raise ValueError(f"{self.path}, tensor {name!r}: {error}") from None
        return Coefficients(weights, densities)

    def _number(self, key: str, name: str, t: float, scopes: Sequence[_Parameters], model: Path | None = None) -> float:
        number = _evaluate(key, name, t, scopes)
        if number is None:
            whose = "" if model is None else f" in {str(model)!r}"
            raise ValueError(f"{self.path} gives no {key} for {name!r}{whose}; write it under parameters")
        return number


@documented(FileOptions)
def plan_mergekit(config: PathLike, out: PathLike, **options: Unpack[FileOptions]) -> Job:
    """Check a merge written for mergekit and return the job without writing.

    Args:
        config: the YAML file; see this module for what is read and what it means.
        out: the folder to write.
        {options}

    Raises:
        ValueError: if the file asks for something that is not supported, or models do not fit.
        FileNotFoundError: if the file or a model is not there.
    """
    files = resolve(options, FileOptions)
    recipe = read_mergekit(config)
    return merge_job(
        recipe.base,
        {model: {} for model in recipe.models},
        recipe.method,
        recipe.coefficients,
        out,
        resolve({**recipe.options, **files}, MergePlanOptions),
        {"mergekit": recipe.path.read_text(encoding="utf-8")},
    )


def read_mergekit(path: PathLike) -> MergeRecipe:
    """Read a YAML file that was written for mergekit.

    Folders are relative to the working directory, as in mergekit; names of a hub, revisions and adapters are refused.
    No tensor is read.

    Raises:
        ValueError: if the file is not YAML, or asks for something that is not supported; the sentence names the key.
        FileNotFoundError: if the file, or a folder that it names, is not there.
        ModuleNotFoundError: if PyYAML is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "files for mergekit are read with PyYAML: pip install 'fused_merge[cli]'", name=error.name
        ) from None
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not one YAML document: {' '.join(str(error).split())}") from None

    top = _mapping(content, str(path), (*_KEYS, *_REFUSED))
    for key, why in _REFUSED.items():
        if top.get(key) is not None:
            raise ValueError(f"{path}: {why}")
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in MERGE_METHODS:
        raise ValueError(
            f"{path} has merge_method {method!r}; supported are {', '.join(map(repr, sorted(MERGE_METHODS)))}"
        )
    entry = MERGE_METHODS[method]
    slices = _slices(top, str(path))
    base = slices[0].base
    sources = tuple(source.model for source in slices[0].sources)
    if entry.has_base and base not in sources:
        raise ValueError(f"{path} has no base_model, or slices without it, and {method!r} starts from one")
    models = tuple(model for model in sources if not (entry.has_base and model == base))
    if not models or (entry.spherical and len(models) > 1):
        count = "one model" if entry.spherical else "at least one model"
        raise ValueError(f"{path} names {len(models)} models besides base_model, and {method!r} takes {count}")

    normalize, rescale = _flag("normalize", slices, path), _flag("rescale", slices, path)
    if rescale and entry.sparsify == "magnitude":
        raise ValueError(f"{path}: rescale is not supported for {method!r}, whose paper scales nothing; leave it out")
    scale = _constant("lambda", slices, path)
    decided: dict[str, Any] = {
        "normalize": None if entry.spherical else normalize,
        "rescale": rescale if entry.sparsify == "random" else None,
        "scale": scale if scale is not None and entry.deltas else 1.0,
    }
    return MergeRecipe(
        path=path,
        method=merge_method(method, **decided),
        base=base if entry.has_base else None,
        models=models,
        options={**decided, "dtype": _dtype(top, path), "files_from": _files_from(top, base, models, path)},
        _slices=slices,
    )


def _slices(top: Mapping[str, Any], where: str) -> tuple[_Slice, ...]:
    """Return what is merged; `models:` are one slice, which the base joins."""
    if (top.get("models") is None) == (top.get("slices") is None):
        raise ValueError(f"{where} must have either models or slices")
    base = None if top.get("base_model") is None else _folder(top["base_model"], f"{where}, base_model")
    outer = _parameters(top, where)
    if top.get("models") is not None:
        sources = _sources(top["models"], f"{where}, models", ("model", "parameters"))
        if base is not None and base not in [source.model for source in sources]:
            sources += (_Source(base, {}),)
        return (_Slice(sources, (outer,), base),)

    slices: list[_Slice] = []
    for i, item in enumerate(_list(top["slices"], f"{where}, slices")):
        inside = f"{where}, slices[{i}]"
        part = _mapping(item, inside, ("sources", "base_model", "parameters"))
        own = base if part.get("base_model") is None else _folder(part["base_model"], f"{inside}, base_model")
        sources = _sources(part.get("sources"), f"{inside}, sources", ("model", "layer_range", "parameters"))
        ranges = {_range(source, f"{inside}, sources") for source in part["sources"]}
        first, end = min(ranges)
        if len(ranges) > 1 or first != (slices[-1].end if slices else 0):
            raise ValueError(
                f"{inside} does not take the layers that follow, the same of all its sources, but {sorted(ranges)}; "
                "stacking layers anew is not supported"
            )
        slices.append(_Slice(sources, (_parameters(part, inside), outer), own, first, end))
        kept = [(part.base, [source.model for source in part.sources]) for part in (slices[0], slices[-1])]
        if kept[0] != kept[1]:
            raise ValueError(f"{inside} has other sources or another base than slices[0], or another order of them")
    return tuple(slices)


def _sources(items: Any, where: str, keys: Sequence[str]) -> tuple[_Source, ...]:
    sources = []
    for i, item in enumerate(_list(items, where)):
        source = _mapping(item, f"{where}[{i}]", keys)
        sources.append(_Source(_folder(source.get("model"), f"{where}[{i}]"), _parameters(source, f"{where}[{i}]")))
        if sources[-1].model in [earlier.model for earlier in sources[:-1]]:
            raise ValueError(f"{where} names {str(sources[-1].model)!r} twice")
    return tuple(sources)


def _range(source: Mapping[str, Any], where: str) -> tuple[int, int]:
    match source.get("layer_range"):
        case [int(first), int(end)] if 0 <= first < end:
            return first, end
    raise ValueError(f"{where} has layer_range {source.get('layer_range')!r}; write [first, last + 1]")


def _folder(reference: Any, where: str) -> Path:
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"{where} must name the folder of a model, got {reference!r}")
    if "@" in reference or "+" in reference:
        raise ValueError(f"{where} is {reference!r}, but revisions (@) and adapters (+) are not supported")
    if not Path(reference).is_dir():
        raise FileNotFoundError(f"{where} is {reference!r}, but there is no such folder; nothing is downloaded")
    return Path(reference)


def _files_from(top: Mapping[str, Any], base: Path | None, models: Sequence[Path], path: Path) -> Path:
    source = top.get("tokenizer_source")
    if source is None:
        return models[0] if base is None else base
    if source == "union":
        raise ValueError(f"{path}: tokenizer_source 'union' is not supported; name the base or a model")
    if source == "base":
        if base is None:
            raise ValueError(f"{path} has tokenizer_source 'base', but no base_model")
        return base
    folder = _folder(source, f"{path}, tokenizer_source")
    if folder not in (base, *models):
        raise ValueError(f"{path} has tokenizer_source {source!r}, which is neither the base nor a model of the merge")
    return folder


def _dtype(top: Mapping[str, Any], path: Path) -> torch.dtype | None:
    try:
        written, arithmetic = (parse_dtype(top.get(key), what=key) for key in ("out_dtype", "dtype"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return written or arithmetic


def _parameters(part: Mapping[str, Any], where: str) -> _Parameters:
    where = f"{where}, parameters"
    parameters = part.get("parameters")
    if parameters is None:
        return {}
    return {
        key: _conditions(value, f"{where}, {key}") for key, value in _mapping(parameters, where, _PARAMETERS).items()
    }


def _conditions(parameter: Any, where: str) -> tuple[_Condition, ...]:
    items = [parameter] if isinstance(parameter, dict) else parameter
    if not isinstance(items, list) or not any(isinstance(item, dict) for item in items):
        return (_Condition("", _numbers(parameter, where)),)
    conditions = []
    for item in items:
        condition = _mapping(item, where, ("filter", "value"))
        part = condition.get("filter")
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{where} has the filter {part!r}; write a part of tensors' names")
        conditions.append(_Condition("" if part in (None, "*") else part, _numbers(condition.get("value"), where)))
    return tuple(conditions)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    try:
        # YAML reads 1e-3 as a string, and mergekit as the number.
        return tuple(float(number) for number in (value if isinstance(value, list) else [value]))
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}; write a number, or a list of numbers for a gradient") from None


def _evaluate(key: str, name: str, t: float, scopes: Iterable[_Parameters]) -> float | None:
    """Return the value of the nearest scope that has one for a tensor, t of the way through its layers."""
    for scope in scopes:
        values = next((each.values for each in scope.get(key, ()) if each.filter in name), ())
        if values:
            at = t * (len(values) - 1)
            left = int(at)
            right = min(left + 1, len(values) - 1)
            return (1 - (at - left)) * values[left] + (at - left) * values[right]
    return None


def _constant(key: str, slices: Sequence[_Slice], path: Path) -> float | None:
    """Return a parameter that must be one number for the whole merge, or None where it is not given."""
    given = {next((scope[key] for scope in part.scopes if key in scope), None) for part in slices}
    match [*given]:
        case [None]:
            return None
        case [(("", (float(number),)),)]:
            return number
    raise ValueError(f"{path}: {key} must be one value for all tensors; gradients and filters of it are not supported")


def _flag(key: str, slices: Sequence[_Slice], path: Path) -> bool | None:
    number = _constant(key, slices, path)
    if number not in (None, 0.0, 1.0):
        raise ValueError(f"{path}: {key} must be true or false, got {number}")
    return None if number is None else bool(number)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with an entry, got {value!r}")
    return value


def _mapping(value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    for key in value:
        if key not in keys:
            raise ValueError(f"{where} has the key {key!r}; supported are {', '.join(keys)}")
    return value
