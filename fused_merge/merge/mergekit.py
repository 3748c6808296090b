"""Merges written for mergekit: its YAML, read as the merge that it means.

This follows mergekit 0.1.5: `models:`, and `slices:` that keep every layer where it is; parameters of a model or
source, of a slice and of the file, the nearest first; numbers, gradients over the layers and lists of filters. As in
mergekit, a filter is a part of a tensor's name; a parameter that the method does not have is ignored, and so is one in
a place where the method does not look for it.

A file means something else here than in mergekit in these points:

- Arithmetic is fp32 (fp64 for fp64 tensors), rounded once at the end; mergekit computes in `dtype`, or in the widest
  dtype of the models. With `dtype: float32` both do the same, except for the order of additions.
- What DARE and DELLA keep is divided by the probability of keeping it, as in the papers, not rescaled to the L1 norm of
  the delta; masks are those of this library and depend on its seed. DELLA ranks along the last dimension of a tensor.
- All magnitudes equal to a threshold of a trim stay, where mergekit keeps as many as fit, and at least one does.
- Slerp, and nuslerp, between a zero tensor and another, or between two that are nearly on one line, is a straight line;
  weights of nuslerp that sum to 0 are refused.
- Of model stock a mean cosine below 0 counts as 0, and cosines of deltas are exact however small these are.
- Embeddings are merged row by row. `tokenizer_source` or `tokenizer` says whose tokenizer and chat template go along,
  and is refused where tokens would have to be moved, because tokenizers differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fused_merge.checkpoints.job import Job
from fused_merge.eager.merge import Coefficients
from fused_merge.io.files import expanded
from fused_merge.io.sources import PathLike
from fused_merge.merge.merge import merge_job
from fused_merge.merge.options import MergekitOptions, MergePlanOptions
from fused_merge.merge.tokenizers import vocabulary
from fused_merge.methods import MARGINS, MERGE_METHODS, MergeMethod, check_coefficients, check_count, merge_method
from fused_merge.names import layer_of
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import parse_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

_KEYS = (
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_PARAMETERS = ("weight", "density", "gamma", "epsilon", "t", "normalize", "rescale", "lambda")
# What only one method has, and the only value of it that is supported.
_FORMS = {
    "nuslerp_flatten": ("nuslerp", True, "it is of whole tensors, not of their rows or columns"),
    "filter_wise": ("model_stock", False, "it takes the angles of whole tensors, not of filters"),
}
# What may be written and changes nothing: how much memory a mask takes, and what nuslerp does without flattening.
_IDLE = ("int8_mask", "nuslerp_row_wise")
_USUAL = {"density": 1.0, **dict(MARGINS.values())}
# Tensors outside the layers that mergekit reads with the first slice; the others belong to the last.
_BEFORE_THE_LAYERS = ("embed", "wte", "wpe")


# Parameter -> conditions: a part of tensors' names ("" is part of all), and a number or the points of a gradient.
_Parameters: TypeAlias = "dict[str, tuple[tuple[str, tuple[float, ...]], ...]]"


class _Slice(NamedTuple):
    """Layers first to end - 1 of all its sources; end is None where it is the whole model."""

    sources: dict[Path, _Parameters]  # in the order of their sum
    scopes: tuple[_Parameters, ...]  # its own parameters and those of the file
    base: Path | None
    first: int = 0
    end: int | None = None


class MergeRecipe(NamedTuple):
    """The merge that a mergekit file asks for."""

    path: Path
    method: MergeMethod
    base: Path | None  # None for "linear"
    models: tuple[Path, ...]  # in the order of their sum
    options: Mapping[str, Any]  # what the file says of the options of `plan_merge`
    slices: tuple[_Slice, ...]

    def coefficients(self, names: Iterable[str]) -> dict[str, Coefficients]:
        """Return the weights and densities of each tensor.

        The layer of a tensor is the first numeric component of its name, as in `model.layers.3.mlp.up_proj.weight`, and
        the components before it are its stack. A gradient runs from the first to the last layer of a stack, or of the
        slice; tensors outside the layers have its first value, and those of a single layer its last. The names are
        those of all tensors of the models.

        Raises:
            ValueError: for a weight or t that is missing or out of range, or slices that are not all of the layers.
        """
        places = {name: layer_of(name) for name in names}
        layers: dict[str, int] = {}
        for stack, layer in filter(None, places.values()):
            layers[stack] = max(layers.get(stack, 0), layer + 1)
        if self.slices[-1].end is not None and [*layers.values()] != [self.slices[-1].end]:
            found = " and ".join(f"{count} ({stack})" for stack, count in layers.items()) or "0"
            raise ValueError(
                f"the slices of {self.path} are {self.slices[-1].end} layers, but the models have {found}; "
                "slices must be all of the layers, in order"
            )
        return {name: self._of(name, place, layers) for name, place in places.items()}

    def _of(self, name: str, place: tuple[str, int] | None, layers: Mapping[str, int]) -> Coefficients:
        part, t = self.slices[0], 0.0
        if place is not None:
            stack, layer = place
            part = next(part for part in self.slices if part.end is None or layer < part.end)
            count = (layers[stack] if part.end is None else part.end) - part.first
            t = (layer - part.first) / (count - 1) if count > 1 else 1.0
        elif "embed_out" in name or not any(word in name for word in _BEFORE_THE_LAYERS):
            part = self.slices[-1]

        scopes = {model: (own, *part.scopes) for model, own in part.sources.items()}
        margin, _ = MARGINS.get(self.method.sparsify, (None, 0.0))
        densities = margins = None
        if self.method.takes_t:
            weights: tuple[float, ...] = (self._value("t", name, t, part.scopes),)
        elif self.method.weights_from == "stock":
            weights = (1.0,) * len(self.models)
        else:
            weights = tuple(self._value("weight", name, t, scopes[own], f" in {str(own)!r}") for own in self.models)
        if self.method.sparsify != "none":
            densities = tuple(self._value("density", name, t, scopes[own]) for own in self.models)
        if margin is not None:
            margins = tuple(self._value(margin, name, t, scopes[own]) for own in self.models)
        try:
            check_coefficients(self.method, len(self.models), weights, densities, margins)
        except ValueError as error:
            raise ValueError(f"{self.path}, tensor {name!r}: {error}") from None
        return Coefficients(weights, densities, margins)

    def _value(self, key: str, name: str, t: float, scopes: Iterable[_Parameters], whose: str = "") -> float:
        """Return the value of the nearest scope that has one for a tensor, t of the way through its layers."""
        for scope in scopes:
            if values := next((values for part, values in scope.get(key, ()) if part in name), ()):
                at = t * (len(values) - 1)
                left = int(at)
                right = min(left + 1, len(values) - 1)
                return (1 - (at - left)) * values[left] + (at - left) * values[right]
        if key in _USUAL:
            return _USUAL[key]
        raise ValueError(f"{self.path} gives no {key} for {name!r}{whose}; write it under parameters")


@documented(MergekitOptions)
def plan_mergekit(config: PathLike, out: PathLike, **options: Unpack[MergekitOptions]) -> Job:
    """Check a merge written for mergekit and return the job without writing.

    Args:
        config: the YAML file; see this module for what is read and what it means.
        out: the folder to write.
        {options}

    Raises:
        ValueError: if the file asks for something that is not supported, or models do not fit.
        FileNotFoundError: if the file or a model is not there.
    """
    files, recipe = resolve(options, MergekitOptions), read_mergekit(config)
    models: dict[PathLike, dict[str, Any]] = {model: {} for model in recipe.models}
    plan = resolve({**recipe.options, **files}, MergePlanOptions)
    said = {"mergekit": recipe.path.read_text(encoding="utf-8")}
    return merge_job(recipe.base, models, recipe.method, recipe.coefficients, out, plan, said)


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
    path = expanded(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not one YAML document: {' '.join(str(error).split())}") from None

    top = _mapping(content, str(path), _KEYS, ("modules",))
    if top.get("modules") is not None:
        raise ValueError(f"{path}: modules are not supported; list whole models under models")
    if (template := top.get("chat_template")) not in (None, "auto"):
        raise ValueError(
            f"{path}: chat_template {template!r:.80} is not supported, since templates are only copied; "
            "leave it out or write auto, and that of the tokenizer goes along"
        )
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in MERGE_METHODS:
        raise ValueError(
            f"{path} has merge_method {method!r}; supported are {', '.join(map(repr, sorted(MERGE_METHODS)))}"
        )
    entry = MERGE_METHODS[method]
    slices = _slices(top, str(path))
    base = slices[0].base
    if entry.has_base and base not in slices[0].sources:
        raise ValueError(f"{path} has no base_model, or slices without it, and {method!r} starts from one")
    has_base = base is not None if entry.has_base is None else entry.has_base
    models = tuple(model for model in slices[0].sources if not (has_base and model == base))
    try:
        check_count(entry, len(models))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for key, (whose, value, why) in _FORMS.items():
        if method == whose and _constant(key, slices, path) not in (None, value):
            raise ValueError(f"{path}: {key} {not value} is not supported for {method!r}: {why}; leave it out")
    normalize, rescale, scale = (_constant(key, slices, path) for key in ("normalize", "rescale", "lambda"))
    if rescale and entry.has_thresholds:
        raise ValueError(f"{path}: rescale is not supported for {method!r}, whose paper scales nothing; leave it out")
    given = entry.weights_from == "given"
    decided: dict[str, Any] = {
        "normalize": normalize if given else None,
        "rescale": rescale if entry.is_random else None,
        "scale": scale if scale is not None and given and has_base else 1.0,
    }
    dtypes = [parse_dtype(top.get(key), what=f"{path}: {key}") for key in ("out_dtype", "dtype")]
    return MergeRecipe(
        path=path,
        method=merge_method(method, **decided).on_base(has_base),
        base=base if has_base else None,
        models=models,
        options={
            **decided,
            "dtype": dtypes[0] or dtypes[1],
            "config_from": base or models[0],
            "tokenizer_from": _tokenizer_from(top, base, models, path),
        },
        slices=slices,
    )


def _slices(top: Mapping[str, Any], where: str) -> tuple[_Slice, ...]:
    """Return what is merged; `models:` are one slice, which the base joins."""
    if (top.get("models") is None) == (top.get("slices") is None):
        raise ValueError(f"{where} must have either models or slices")
    base = None if top.get("base_model") is None else _folder(top["base_model"], f"{where}, base_model")
    outer = _parameters(top, where)
    if top.get("models") is not None:
        sources = _sources(top["models"], f"{where}, models", ("model", "parameters"))
        if base is not None:
            sources.setdefault(base, {})
        return (_Slice(sources, (outer,), base),)

    slices: list[_Slice] = []
    for inside, part in _entries(top["slices"], f"{where}, slices", ("sources", "base_model", "parameters")):
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
        kept = [(part.base, [*part.sources]) for part in (slices[0], slices[-1])]
        if kept[0] != kept[1]:
            raise ValueError(f"{inside} has other sources or another base than slices[0], or another order of them")
    return tuple(slices)


def _sources(items: Any, where: str, keys: Sequence[str]) -> dict[Path, _Parameters]:
    sources: dict[Path, _Parameters] = {}
    for inside, source in _entries(items, where, keys):
        model = _folder(source.get("model"), inside)
        if model in sources:
            raise ValueError(f"{where} names {str(model)!r} twice")
        sources[model] = _parameters(source, inside)
    return sources


def _range(source: Mapping[str, Any], where: str) -> tuple[int, int]:
    match source.get("layer_range"):
        case [int(first), int(end)] if 0 <= first < end:
            return first, end
    raise ValueError(f"{where} has layer_range {source.get('layer_range')!r}; write [first, last + 1]")


def _folder(reference: Any, where: str) -> Path:
    """Return the folder that a path, or mergekit's long form of one, names."""
    while isinstance(reference, dict):
        reference = dict(_mapping(reference, where, ("model", "path"), ("revision", "lora", "override_architecture")))
        inner = [reference.pop(key) for key in ("model", "path") if key in reference]
        for key, value in reference.items():
            if value is not None:
                raise ValueError(
                    f"{where} has the {key} {value!r}, which is not supported; name a folder of whole weights"
                )
        reference = inner[0] if len(inner) == 1 else None
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"{where} must name the folder of a model, got {reference!r}")
    folder = expanded(reference)
    if folder.is_dir():
        return folder
    if "@" in reference or "+" in reference:
        raise ValueError(
            f"{where} is {reference!r}, which is no folder; revisions (@) and adapters (+) are not supported"
        )
    raise FileNotFoundError(f"{where} is {reference!r}, but there is no such folder; nothing is downloaded")


def _tokenizer_from(top: Mapping[str, Any], base: Path | None, models: Sequence[Path], path: Path) -> Path:
    """Return whose tokenizer goes along; ValueError if tokens would have to be moved for it."""
    key, source = "tokenizer_source", top.get("tokenizer_source")
    if top.get("tokenizer") is not None:
        if source is not None:
            raise ValueError(f"{path} has tokenizer and tokenizer_source; leave one of them out")
        section = _mapping(top["tokenizer"], f"{path}, tokenizer", ("source",), ("tokens", "pad_to_multiple_of"))
        if new := next((new for new in ("tokens", "pad_to_multiple_of") if section.get(new)), None):
            raise ValueError(f"{path}, tokenizer has {new}, but no embedding is made anew or padded; leave it out")
        key, source = "tokenizer", section.get("source") or "union"
    if source is None:
        return base or models[0]
    if source == "base" and base is None:
        raise ValueError(f"{path} has {key} 'base', but no base_model")
    own = {folder: vocabulary(folder) for folder in (base, *models) if folder is not None}
    if source == "union":
        chosen = next((folder for folder in own if own[folder] is not None), base or models[0])
    else:
        chosen = base if source == "base" and base is not None else _folder(source, f"{path}, {key}")
    if chosen not in own:
        raise ValueError(f"{path} has {key} {source!r}, which is neither the base nor a model of the merge")
    if other := next((folder for folder in own if own[folder] not in (None, own[chosen])), None):
        raise ValueError(
            f"{path}: {key} {source!r} would have to move tokens, for the tokenizer of {str(other)!r} is not that of "
            f"{str(chosen)!r}, and they are merged row by row; give the models one tokenizer, or leave {key} out"
        )
    return chosen


def _parameters(part: Mapping[str, Any], where: str) -> _Parameters:
    where = f"{where}, parameters"
    given = (
        {} if part.get("parameters") is None else _mapping(part["parameters"], where, _PARAMETERS, (*_FORMS, *_IDLE))
    )
    return {key: tuple(_conditions(value, f"{where}, {key}")) for key, value in given.items()}


def _conditions(parameter: Any, where: str) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Read a parameter: a number, a gradient, or one or several conditions with a filter."""
    items = parameter if isinstance(parameter, list) else [parameter]
    if not any(isinstance(item, dict) for item in items):
        items = [{"value": parameter}]
    for item in items:
        condition = _mapping(item, where, ("filter", "value"))
        part, value = condition.get("filter"), condition.get("value")
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{where} has the filter {part!r}; write a part of tensors' names")
        try:
            # YAML reads 1e-3 as a string, and mergekit as the number.
            numbers = tuple(map(float, value if isinstance(value, list) else [value]))
        except (TypeError, ValueError):
            raise ValueError(f"{where} is {value!r}; write a number, or a list of numbers for a gradient") from None
        yield "" if part in (None, "*") else part, numbers


def _constant(key: str, slices: Sequence[_Slice], path: Path) -> float | None:
    """Return a parameter that must be one value for the whole merge, or None where it is not given."""
    given = {next((scope[key] for scope in part.scopes if key in scope), None) for part in slices}
    match [*given]:
        case [None]:
            return None
        case [(("", (float(number),)),)]:
            if key == "lambda":
                return number
            if number in (0.0, 1.0):
                return bool(number)
            raise ValueError(f"{path}: {key} must be true or false, got {number}")
    raise ValueError(f"{path}: {key} must be one value for all tensors; gradients and filters of it are not supported")


def _entries(value: Any, where: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with an entry, got {value!r}")
    for i, entry in enumerate(value):
        yield f"{where}[{i}]", _mapping(entry, f"{where}[{i}]", keys)


def _mapping(value: Any, where: str, keys: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """Return a mapping that has only known keys; messages list `keys`, and not what is known to be refused or idle."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    for key in value:
        if key not in (*keys, *more):
            raise ValueError(f"{where} has the key {key!r}; supported are {', '.join(keys)}")
    return value
