"""Merges of adapters: as an adapter of the summed rank, or into the model that they were trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fused_merge.checkpoints.adapters import addable, check_options, combined_adapter, into_base, weights_of
from fused_merge.checkpoints.plan import OutputFile
from fused_merge.eager.merge import Coefficients
from fused_merge.io.adapters import is_adapter, read_adapters
from fused_merge.io.sources import FileSource
from fused_merge.methods import MergeMethod

# The weighted sums that are linear in the models, so that a merge of products is a sum of products.
_LINEAR = "linear", "task_arithmetic"


class Merged(NamedTuple):
    """What a merge writes."""

    files: list[OutputFile]
    share: float  # of its bytes that is merged and not copied
    fitting: list[int]  # the models whose tokenizer the output may have
    config_values: Mapping[str, Any]  # what its configuration has to say
    adapter: Mapping[str, Any] | None = None  # its `adapter_config.json`


def merged_adapters(
    sources: Sequence[FileSource],
    method: MergeMethod,
    coefficients: Callable[[Sequence[str]], Mapping[str, Coefficients]],
    config_source: int | None,
    folder: str,
    options: Mapping[str, Any],
) -> Merged:
    """Return a merge of adapters, with or without a base, which may be an adapter or a model.

    Args:
        sources: the base if the method has one, and the models; at least one is an adapter.
        method: a method, decided.
        coefficients: is called with the names of the adapted weights.
        config_source: the source whose configuration goes along, None if that is left open.
        folder: the name of the output.
        options: `MergePlanOptions`, resolved.

    Raises:
        ValueError: if the method is not defined on products, models and adapters are mixed, or anything does not fit.
    """
    first, *models = sources
    on_base = method.has_base and not is_adapter(first)
    whole = next((each for each in (models if on_base else sources) if not is_adapter(each)), None)
    if whole is not None:
        adapter = next(filter(is_adapter, sources))
        raise ValueError(
            f"{adapter.origin} is an adapter and {whole.origin} a model; merge adapters with adapters, or each into "
            f"its base first, with merge_checkpoints(base, {{adapter: 1.0}}, 'task_arithmetic', out)"
        )
    if not (addable(method) if on_base else method.name in _LINEAR):
        raise ValueError(
            f"method {method.name!r} is not defined on the factors of adapters: it looks at whole weights; merge each "
            "adapter into its base first, with merge_checkpoints(base, {adapter: 1.0}, 'task_arithmetic', out), and "
            "merge these"
        )
    check_options(options, into_base=bool(on_base), config_source=config_source)
    adapters = read_adapters(models if on_base else sources)
    decided = coefficients(weights_of(adapters))
    fitting = list(range(len(sources)))
    if on_base:
        files, share = into_base(first, adapters, method, {name: [own] for name, own in decided.items()}, options)
        return Merged(files, share, fitting, {})
    numbers = {name: _numbers(method, own.weights) for name, own in decided.items()}
    like = config_source or 0
    file, said = combined_adapter(adapters, numbers, config_source=like, dtype=options["dtype"], only=folder)
    return Merged([file], 1.0, fitting, {}, said)


def _numbers(method: MergeMethod, weights: Sequence[float]) -> list[float]:
    """Return the number of each adapter, the base first if there is one, in a merge that is linear in them."""
    total = sum(weights) if method.normalize else 1.0
    # As `consensus` divides.
    shares = [weight / (total if abs(total) >= 1e-8 else 1.0) for weight in weights]
    if not method.has_base:
        return shares
    scaled = [method.scale * share for share in shares]
    return [1.0 - sum(scaled), *scaled]
