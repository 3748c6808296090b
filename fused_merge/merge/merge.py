"""Several finished models merged into one folder, streamed: the methods of `fused_merge.eager.merge` on checkpoints.

Most methods are elementwise and take one read. What a whole tensor or a whole model decides is found before, in reads
of its own: for a trim the exact k-th largest magnitude, from histograms of the integer patterns of magnitudes, 16 bits
a read; for slerp two norms and an inner product. Memory is that of blocks and histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fused_merge.checkpoints.align import align
from fused_merge.checkpoints.engine import Resources, workers
from fused_merge.checkpoints.folders import describe_source
from fused_merge.checkpoints.job import Job, Output
from fused_merge.checkpoints.options import StreamOptions, described
from fused_merge.checkpoints.plan import (
    AlignedSegment,
    AlignedTensor,
    CopyRule,
    OutputFile,
    Rule,
    Segment,
    lay_out_files,
    without_collection,
)
from fused_merge.eager.merge import mask_key, merge_block, slerp_coefficients
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.shard import ShardIndex
from fused_merge.eager.sparsify import kept_count
from fused_merge.io.files import expanded
from fused_merge.io.sources import PathLike, open_files
from fused_merge.merge.options import MergeOptions, MergePlanOptions
from fused_merge.merge.whole_tensors import Advance, Map, Pair, inner_products, kth_magnitude, lowest_bits
from fused_merge.methods import MergeMethod, check_coefficients, merge_method
from fused_merge.names import some
from fused_merge.options import documented, resolve, split
from fused_merge.per_tensor import PerTensor, per_tensor, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Elements that are merged at once, so that temporaries stay in a cache.
_BLOCK = 1 << 16


class Coefficients(NamedTuple):
    """The weights and densities of one tensor, checked for the method of the merge."""

    weights: tuple[float, ...]  # one per model, in the order of the models; for slerp t alone
    densities: tuple[float, ...] | None  # one per model; None keeps everything


class MergeTensorRule(NamedTuple):
    """The rule of one tensor that is merged; see `fused_merge.eager.merge.merge`."""

    name: str  # of the tensor
    method: MergeMethod  # as `merge_method` returned it
    weights: tuple[float, ...]  # one per model
    densities: tuple[float, ...] | None  # one per model, or None
    seed: int  # of the random masks
    thresholds: tuple[int, ...] | None = None  # of a trim, one per model; None while they are not known

    @property
    def telling(self) -> Sequence[int]:
        """The only output."""
        return (0,)

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Merge elements of the models; the first input is the base if the method has one."""
        (out,) = outs
        key = mask_key(self.name, self.seed)
        for start in range(0, out.numel(), _BLOCK):
            blocks = [tensor[start : start + _BLOCK] for tensor in inputs]
            base = blocks.pop(0) if self.method.has_base else None
            numel = len(blocks[0])
            own = key._replace(shard=ShardIndex(first + start, numel, numel))
            out[start : start + numel] = merge_block(
                base, blocks, self.weights, self.method, self.densities, self.thresholds, key=own, dtype=out.dtype
            )


@documented(MergeOptions)
def merge_checkpoints(
    base: PathLike | None,
    models: Mapping[PathLike, PerTensor],
    method: str,
    out: PathLike,
    **options: Unpack[MergeOptions],
) -> Path:
    """Merge finished models into one model folder, streaming from disk to disk.

    | method | theta | paper |
    |---|---|---|
    | `"linear"` | sum of w_i theta_i / sum of w_i | Wortsman et al. 2022 (arXiv 2203.05482) |
    | `"slerp"` | on the arc from the base to the one model, at its weight t | Shoemake 1985 |
    | `"task_arithmetic"` | theta0 + scale * sum of w_i tau_i | Ilharco et al. 2023 (arXiv 2212.04089) |
    | `"ties"` | tau_i trimmed to their largest, sign elected, mean of those that agree | Yadav et al. 2023 |
    | `"dare_linear"` | tau_i dropped at random, divided by the density | Yu et al. 2024 (arXiv 2311.03099) |
    | `"dare_ties"` | the same, sign elected, sum of those that agree | Yu et al. 2024 |

    tau_i = theta_i - theta0; TIES is arXiv 2306.01708. Arithmetic is fp32 (fp64 where a tensor is), rounded once.
    Tensors, files, resuming and errors are as for `interpolate_checkpoints`.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder. None for `"linear"`, which has none.
        models: the models and their weights: numbers, or mappings from names or regular expressions on whole names to
            numbers. For `"slerp"` one model, and its weight is t.
        method: a method of the table.
        out: the folder to write.
        {options}

    Returns:
        `out`.

    Raises:
        ValueError: if models, weights or options do not fit; the sentence names them.
        FileExistsError: if `out` exists and `overwrite` is false.
        OSError: as for `interpolate_checkpoints`.
        TypeError: if `models` is not a mapping, a model is not a path, a weight is not a number, or an option is
            unknown.
    """
    plan, run = split(options, MergePlanOptions, StreamOptions)
    (folder,) = plan_merge(base, models, method, out, **plan).run(**run)
    return folder


@documented(MergePlanOptions)
def plan_merge(
    base: PathLike | None,
    models: Mapping[PathLike, PerTensor],
    method: str,
    out: PathLike,
    **options: Unpack[MergePlanOptions],
) -> Job:
    """Check everything that `merge_checkpoints` would, and return the job without writing.

    Arguments and errors are those of `merge_checkpoints`. `Job.describe()` returns the plan in numbers, `Job.run()`
    carries it out.
    """
    plan = resolve(options, MergePlanOptions)
    if not isinstance(models, Mapping):
        raise TypeError(f"models must map paths to weights, got a {type(models).__name__}; write {{path: weight}}")
    density = plan["density"]
    densities = density if isinstance(density, Sequence) else [density] * len(models)
    if len(densities) != len(models):
        raise ValueError(f"{len(models)} models need one density or as many, got {len(densities)}")
    decided = merge_method(method, normalize=plan["normalize"], rescale=plan["rescale"], scale=plan["scale"])

    def coefficients(names: Sequence[str]) -> dict[str, Coefficients]:
        weights = [per_tensor(weight, names, what="weight") for weight in models.values()]
        kept = [per_tensor(1.0 if each is None else each, names, what="density") for each in densities]
        found = {}
        for name in names:
            shares = None if density is None else tuple(each[name] for each in kept)
            found[name] = Coefficients(tuple(each[name] for each in weights), shares)
            try:
                check_coefficients(decided, len(models), *found[name])
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        return found

    said: dict[PathLike, dict[str, Any]] = {
        path: {"weight": plain(each, what="weight")} for path, each in models.items()
    }
    for own, each in zip(said.values(), densities, strict=True):
        if each is not None:
            own["density"] = plain(each, what="density")
    return merge_job(base, said, decided, coefficients, out, plan)


@without_collection()
def merge_job(
    base: PathLike | None,
    models: Mapping[PathLike, Mapping[str, Any]],
    method: MergeMethod,
    coefficients: Callable[[Sequence[str]], Mapping[str, Coefficients]],
    out: PathLike,
    options: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
) -> Job:
    """Check a merge against its models and return the job; raise ValueError if models or options do not fit.

    `models` maps paths to what the recipe says of them, and `recipe` is what else it says. `coefficients` is called
    with the names of the tensors to merge. `method` and `options` are decided: by `merge_method` and `resolve`.
    """
    if options["trim"] == "model" and method.sparsify != "magnitude":
        raise ValueError(f"method {method.name!r} has no option trim='model': it trims nothing; leave it out")
    if (base is None) == method.has_base:
        raise ValueError(
            f"method {method.name!r} "
            + ("starts from a base; pass one" if base is None else "has no base; pass None, and it as a model")
        )
    if not models:
        raise ValueError("there is no model to merge; pass at least one")
    paths = [*models] if base is None else [base, *models]
    sources = [open_files(path, role="a model") for path in paths]
    config_source, files_from = 0, options["files_from"]
    if files_from is not None and not (files_from == "base" and method.has_base):
        same = [i for i, path in enumerate(paths) if expanded(path) == expanded(files_from)]
        if not same:
            listed = some(repr(str(path)) for path in paths)
            raise ValueError(f"files_from must be one of {listed}, got {str(files_from)!r}")
        config_source = same[0]
    tensors = align(sources, config_source, options)
    merged = [tensor for tensor in tensors if tensor.merged]
    decided = coefficients([tensor.name for tensor in merged])
    if options["trim"] == "model":
        precisions = {compute_dtype(*(each.dtype for each in tensor.segments[0].inputs)) for tensor in merged}
        if len({own.densities for own in decided.values()}) > 1 or len(precisions) > 1:
            raise ValueError(
                "trim='model' chooses the largest magnitudes of a whole model: give one density for each model, and "
                "tensors that are all float64 or none"
            )

    def rule_of(tensor: AlignedTensor, segment: AlignedSegment) -> Rule:
        if segment.merged:
            return MergeTensorRule(tensor.name, method, *decided[tensor.name], options["seed"])
        return CopyRule((config_source if len(segment.inputs) == len(sources) else 0,))

    inputs = [describe_source(source) for source in sources]
    own = inputs[1:] if method.has_base else inputs
    whole_recipe = {
        "operation": "merge",
        "method": method.name,
        **{name: options[name] for name in ("normalize", "rescale", "scale", "trim", "seed")},
        "base": inputs[0] if method.has_base else None,
        **(recipe or {}),
        "models": [{**model, **said} for model, said in zip(own, models.values(), strict=True)],
        **described(options),
        "files_from": sources[config_source].origin,
    }
    about = f"A merge of {len(models)} models by `{method.name}` ({method.paper}), in fp32 and rounded once."
    out = expanded(out)
    folder = out.absolute()
    needs_whole_tensors = method.spherical or method.sparsify == "magnitude"
    return Job(
        "merging",
        [Output(out, whole_recipe, folder.name, about)],
        sources,
        sources[config_source],
        lay_out_files(tensors, sources[0], rule_of, options["max_shard_size"]),
        work=folder.with_name(f".{folder.name}.part"),
        options=options,
        whole_tensor_pass=WholeTensorPass(over_model=options["trim"] == "model") if needs_whole_tensors else None,
    )


class WholeTensorPass:
    """Completes the rules of a file, before it is written, with what whole tensors or whole models decide."""

    def __init__(self, *, over_model: bool) -> None:
        self._over_model = over_model
        # Of a trim over whole models: found once.
        self._thresholds: tuple[int, ...] | None = None

    def bytes_read(self, files: Sequence[OutputFile], mine: Sequence[OutputFile]) -> int:
        """Return the bytes that this reads for `mine` of the files of a job."""
        return sum(_bytes_read(*each) for file in (files if self._over_model else mine) for each in _merged(file))

    def complete(
        self, files: Sequence[OutputFile], file: OutputFile, resources: Resources, advance: Advance
    ) -> OutputFile:
        """Return one of the files of a job with rules that know all they need."""
        with workers(resources.threads, advance) as (pool, advance):
            if self._over_model and self._thresholds is None and _merged(file):
                merged = [each for any_file in files for each in _merged(any_file)]
                self._thresholds = _thresholds(merged, advance, pool.map)
            segments = pool.map(lambda segment: self._completed(segment, advance), file.segments)
            return file._replace(segments=tuple(segments))

    def _completed(self, segment: Segment, advance: Advance) -> Segment:
        rule = segment.rule
        if not isinstance(rule, MergeTensorRule):
            return segment
        if rule.method.spherical:
            a, b, both = inner_products(_pairs(segment)[0], advance)
            weights = slerp_coefficients(rule.weights[0], math.sqrt(a), math.sqrt(b), both)
            rule = rule._replace(method=merge_method("linear", normalize=False), weights=weights)
        else:
            thresholds = self._thresholds or _thresholds([(rule, _pairs(segment))], advance)
            rule = rule._replace(thresholds=thresholds)
        return segment._replace(rule=rule)


def _merged(file: OutputFile) -> list[tuple[MergeTensorRule, list[Pair]]]:
    """Return what a file merges, and the base of each with each model."""
    return [(each.rule, _pairs(each)) for each in file.segments if isinstance(each.rule, MergeTensorRule)]


def _pairs(segment: Segment) -> list[Pair]:
    base, *models = segment.inputs
    wide = compute_dtype(*(each.dtype for each in segment.inputs))
    return [Pair(base, model, segment.numel, wide) for model in models]


def _thresholds(
    merged: Sequence[tuple[MergeTensorRule, list[Pair]]], advance: Advance, each: Map = map
) -> tuple[int, ...]:
    """Return what trims the deltas of each model, taken over all the tensors together."""
    rule, _ = merged[0]
    found = []
    for model, density in enumerate(rule.densities or [1.0] * len(rule.weights)):
        pairs = [own[model] for _, own in merged]
        k = kept_count(sum(pair.numel for pair in pairs), density)
        found.append(0 if density == 1.0 else kth_magnitude(pairs, k, advance, each))
    return tuple(found)


def _bytes_read(rule: MergeTensorRule, pairs: Sequence[Pair]) -> int:
    """Return the bytes that are read of a tensor before it is merged."""
    if rule.method.spherical:
        return pairs[0].nbytes
    kept = zip(pairs, rule.densities or [1.0] * len(pairs), strict=True)
    return sum(len(lowest_bits(pair.wide)) * pair.nbytes for pair, density in kept if density < 1.0)
