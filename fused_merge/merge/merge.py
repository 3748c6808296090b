"""Several finished models merged into one folder, streamed: the methods of `fused_merge.eager.merge` on checkpoints.

Most methods are elementwise and take one read. What a tensor or a model as a whole decides is found before, in reads
of its own: for a trim the k-th largest magnitude, exactly, from histograms of the integer patterns of magnitudes, 16
bits a read; for slerp two norms and an inner product. Memory is that of blocks and histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.checkpoints.align import AlignedTensor, Span, align, lay_out_files
from fused_merge.checkpoints.engine import Resources, workers
from fused_merge.checkpoints.folders import describe_source
from fused_merge.checkpoints.job import Job, Output, job_of
from fused_merge.checkpoints.plan import CopyRule, OutputFile, Rule, Segment
from fused_merge.eager.merge import check_coefficients, merge, merge_method, slerp_coefficients
from fused_merge.eager.shard import ShardIndex
from fused_merge.eager.sparsify import kept_count
from fused_merge.io.sources import FileRange, FileSource, PathLike, open_files
from fused_merge.merge.mergekit import Coefficients, MergeRecipe, read_mergekit
from fused_merge.merge.whole_tensors import Advance, Map, Pair, inner_products, kth_magnitude, reads_of_kth
from fused_merge.names import some
from fused_merge.per_tensor import Setting, finite, parse_bytes, parse_dtype, per_tensor, plain

# Elements that are merged at once, to keep temporaries in a cache.
_PIECE = 1 << 16
TRIMS = ("tensor", "model")


@dataclass(frozen=True)
class Merge:
    """The rule of one tensor that is merged; see `fused_merge.eager.merge.merge`.

    Attributes:
        name: of the tensor.
        method: a key of `MERGE_METHODS`.
        weights: one per model.
        densities: one per model, or None.
        thresholds: what trims, one per model; None where nothing does or it is not known yet.
    """

    name: str
    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...] | None
    normalize: bool | None
    rescale: bool | None
    scale: float
    seed: int
    thresholds: tuple[int, ...] | None = None

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Merge elements of the models, the base before them if the method has one."""
        has_base = merge_method(self.method).has_base
        (out,) = outs
        for start in range(0, out.numel(), _PIECE):
            pieces = [tensor[start : start + _PIECE] for tensor in inputs]
            numel = len(pieces[0])
            merged = merge(
                pieces[0] if has_base else None,
                pieces[1:] if has_base else pieces,
                self.weights,
                method=self.method,
                name=self.name,
                densities=self.densities,
                normalize=self.normalize,
                rescale=self.rescale,
                scale=self.scale,
                seed=self.seed,
                thresholds=self.thresholds,
                shard=ShardIndex(first + start, numel, numel),
                dtype=out.dtype,
            )
            out[start : start + numel] = merged


def merge_checkpoints(
    base: PathLike | None,
    models: Mapping[PathLike, Setting],
    method: str,
    out: PathLike,
    *,
    density: Setting | Sequence[Setting] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    scale: float = 1.0,
    trim: str = "tensor",
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    unmatched: str = "refuse",
    align_vocabulary: bool = False,
    files_from: PathLike | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
    progress: bool = True,
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
    Tensors, files, resuming and errors are as for `interpolate_checkpoints`; integer tensors come from the model whose
    files go along.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder. None for `"linear"`, which has none.
        models: the models and their weights: numbers, or mappings from names or regular expressions on whole names to
            numbers. For `"slerp"` one model, and its weight is t.
        method: a row of the table.
        out: the folder to write.
        density: share of each delta to keep, in (0, 1]: one for all models or a list with one for each; None keeps
            everything. Ties at the threshold of a trim all stay.
        normalize: divide by the sum of the weights; None: `"linear"` and `"ties"` do.
        rescale: divide what a random drop keeps by the density; None: DARE does.
        scale: what the merged delta is multiplied by.
        trim: the largest magnitudes are chosen in each `"tensor"` or over the whole `"model"`, as the paper of TIES
            has it; the density is then one number for each model.
        seed: of the random masks; the mask of the first model is that of a saved `ReferenceDelta`.
        dtype: as for `interpolate_checkpoints`.
        unmatched: as for `interpolate_checkpoints`; `"copy"` takes them from the one that `files_from` names, else
            from the first that holds them.
        align_vocabulary: as for `interpolate_checkpoints`.
        files_from: the base or the model whose configuration and tokenizer go along; None is the base, without one
            the first model.
        max_shard_size: as for `interpolate_checkpoints`, like all that follow.
        overwrite: replace `out`.
        threads: that read, compute and write.
        max_memory: of all buffers.
        device: that computes.
        verify: read everything again.
        progress: show a progress bar.

    Returns:
        `out`.

    Raises:
        ValueError: if models, weights or options do not fit; the sentence names them.
        FileExistsError: if `out` exists and `overwrite` is false.
        OSError: as for `interpolate_checkpoints`.
        TypeError: if `models` is no mapping, a model is not a path, or a number is none.
    """
    plan_merge(
        base,
        models,
        method,
        out,
        density=density,
        normalize=normalize,
        rescale=rescale,
        scale=scale,
        trim=trim,
        seed=seed,
        dtype=dtype,
        unmatched=unmatched,
        align_vocabulary=align_vocabulary,
        files_from=files_from,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    ).run(threads=threads, max_memory=max_memory, device=device, verify=verify, progress=progress)
    return Path(out)


def plan_merge(
    base: PathLike | None,
    models: Mapping[PathLike, Setting],
    method: str,
    out: PathLike,
    *,
    density: Setting | Sequence[Setting] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    scale: float = 1.0,
    trim: str = "tensor",
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    unmatched: str = "refuse",
    align_vocabulary: bool = False,
    files_from: PathLike | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> Job:
    """Check everything that `merge_checkpoints` would, and return the job without writing.

    Args and errors are those of `merge_checkpoints`. `Job.describe()` is the plan in numbers, `Job.run()` does it.
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"models must map paths to weights, got a {type(models).__name__}; write {{path: weight}}")
    if not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    shares = list(density) if isinstance(density, Sequence) else [density] * len(models)
    if len(shares) != len(models):
        raise ValueError(f"{len(models)} models need one density or as many, got {len(shares)}")

    def coefficients(names: Sequence[str]) -> dict[str, Coefficients]:
        weights = [per_tensor(weight, names, what="weight") for weight in models.values()]
        kept = None
        if density is not None:
            kept = [per_tensor(1.0 if share is None else share, names, what="density") for share in shares]
        return {
            name: Coefficients(
                tuple(own[name] for own in weights), None if kept is None else tuple(own[name] for own in kept)
            )
            for name in names
        }

    described = {
        "models": [
            {
                "weight": plain(weight, what="weight"),
                **({} if share is None else {"density": plain(share, what="density")}),
            }
            for weight, share in zip(models.values(), shares, strict=True)
        ]
    }
    return _plan(
        base,
        list(models),
        _Options(method, normalize, rescale, finite(scale, what="scale"), trim, int(seed)),
        coefficients,
        described,
        out,
        dtype=parse_dtype(dtype),
        unmatched=unmatched,
        align_vocabulary=align_vocabulary,
        files_from=files_from,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def plan_mergekit(
    config: PathLike | MergeRecipe, out: PathLike, *, max_shard_size: int | str | None = None, overwrite: bool = False
) -> Job:
    """Check a merge written for mergekit and return the job without writing.

    Args:
        config: the YAML file; see `fused_merge.merge.mergekit` for what is read and what it means.
        out: the folder to write.
        max_shard_size: as for `interpolate_checkpoints`.
        overwrite: replace `out`.

    Raises:
        ValueError: if the file asks for what is not supported, or models do not fit.
        FileNotFoundError: if the file or a model is not there.
    """
    recipe = config if isinstance(config, MergeRecipe) else read_mergekit(config)
    return _plan(
        recipe.base,
        recipe.models,
        _Options(recipe.method, recipe.normalize, recipe.rescale, recipe.scale, "tensor", 0),
        recipe.coefficients,
        {"mergekit": recipe.path.read_text(encoding="utf-8")},
        out,
        dtype=recipe.dtype,
        unmatched="refuse",
        align_vocabulary=False,
        files_from=recipe.files_from,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


class _Options(NamedTuple):
    """What a merge is, but for its coefficients."""

    method: str
    normalize: bool | None
    rescale: bool | None
    scale: float
    trim: str
    seed: int


def _plan(
    base: PathLike | None,
    models: Sequence[PathLike],
    options: _Options,
    coefficients: Callable[[Sequence[str]], Mapping[str, Coefficients]],
    described: Mapping[str, Any],
    out: PathLike,
    *,
    dtype: torch.dtype | None,
    unmatched: str,
    align_vocabulary: bool,
    files_from: PathLike | None,
    max_shard_size: int | str | None,
    overwrite: bool,
) -> Job:
    row = merge_method(options.method, normalize=options.normalize, rescale=options.rescale, scale=options.scale)
    if options.trim not in TRIMS or (options.trim == "model" and row.sparsify != "magnitude"):
        raise ValueError(
            f"trim must be {' or '.join(map(repr, TRIMS))}, and 'model' only where something is trimmed, "
            f"got {options.trim!r} with method {options.method!r}"
        )
    if (base is None) == row.has_base:
        raise ValueError(
            f"method {options.method!r} "
            + ("starts from a base; pass one" if base is None else "has no base; pass None, and it as a model")
        )
    if not models:
        raise ValueError("there is no model to merge; pass at least one")
    paths = [*models] if base is None else [base, *models]
    sources = [open_files(path, role="a model") for path in paths]
    leader = 0 if files_from is None or (files_from == "base" and row.has_base) else _index(files_from, paths)
    tensors = align(sources, leader=leader, dtype=dtype, unmatched=unmatched, align_vocabulary=align_vocabulary)
    merged = [tensor.name for tensor in tensors if tensor.spans[0].merged]
    decided = coefficients(merged)
    for name in merged:
        try:
            check_coefficients(options.method, len(models), *decided[name], normalize=options.normalize)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
    if options.trim == "model":
        wide = {_wide(tensor.spans[0].inputs) for tensor in tensors if tensor.spans[0].merged}
        if len({own.densities for own in decided.values()}) > 1 or len(wide) > 1:
            raise ValueError(
                "trim='model' chooses the largest of a whole model: give one density for each model, and tensors that "
                "are all float64 or none"
            )

    def rule_of(tensor: AlignedTensor, span: Span) -> Rule:
        if not span.merged:
            return CopyRule((leader if len(span.inputs) == len(sources) else 0,))
        weights, densities = decided[tensor.name]
        return Merge(
            tensor.name,
            options.method,
            weights,
            densities,
            options.normalize,
            options.rescale,
            options.scale,
            options.seed,
        )

    shard_size = None if max_shard_size is None else parse_bytes(max_shard_size, what="max_shard_size")
    recipe = {
        **_recipe(options, described, sources, base is not None),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "unmatched": unmatched,
        "align_vocabulary": align_vocabulary,
        "files_from": sources[leader].origin,
        "max_shard_size": shard_size,
    }
    folder = Path(out).absolute()
    return job_of(
        "merging",
        [
            Output(
                Path(out),
                recipe,
                folder.name,
                f"A merge of {len(models)} models by `{options.method}` ({row.paper}), in fp32 and rounded once.",
            )
        ],
        sources,
        sources[leader],
        lambda most: lay_out_files(tensors, sources[0], rule_of, most),
        work=folder.with_name(f".{folder.name}.part"),
        options={"dtype": dtype, "max_shard_size": shard_size, "overwrite": overwrite},
        whole_tensor_pass=_Wholes(options.trim) if row.spherical or row.sparsify == "magnitude" else None,
    )


def _index(files_from: PathLike, paths: Sequence[PathLike]) -> int:
    for i, path in enumerate(paths):
        if Path(path) == Path(files_from):
            return i
    raise ValueError(f"files_from must be one of {some(repr(str(path)) for path in paths)}, got {str(files_from)!r}")


def _recipe(
    options: _Options,
    described: Mapping[str, Any],
    sources: Sequence[FileSource],
    has_base: bool,
) -> dict[str, Any]:
    inputs = [describe_source(source) for source in sources]
    models = inputs[1:] if has_base else inputs
    own = described.get("models", [{}] * len(models))
    return {
        "operation": "merge",
        **options._asdict(),
        "base": inputs[0] if has_base else None,
        **described,
        "models": [{**model, **setting} for model, setting in zip(models, own, strict=True)],
    }


class _Wholes:
    """Finds, before a file is written, what whole tensors or whole models decide, and completes its rules with it."""

    def __init__(self, trim: str) -> None:
        self._over_models = trim == "model"
        # Of whole models: decided once.
        self._thresholds: tuple[int, ...] | None = None

    def bytes_read(self, files: Sequence[OutputFile], mine: Sequence[OutputFile]) -> int:
        """Return the bytes that all of this reads for `mine` of the files of a job."""
        return sum(_bytes_read(segment) for file in (files if self._over_models else mine) for segment in _merged(file))

    def complete(
        self, files: Sequence[OutputFile], file: OutputFile, resources: Resources, advance: Advance
    ) -> OutputFile:
        """Return one of the files of a job with rules that know all they need."""
        with workers(resources.threads) as pool:
            segments = _merged(file)
            if self._over_models and self._thresholds is None and segments:
                self._thresholds = _thresholds(
                    [segment for each in files for segment in _merged(each)], advance, pool.map
                )
            rules = dict(
                zip(segments, pool.map(lambda segment: self._completed(segment, advance), segments), strict=True)
            )
        completed = (
            segment._replace(rule=rules[segment]) if segment in rules else segment for segment in file.segments
        )
        return file._replace(segments=tuple(completed))

    def _completed(self, segment: Segment, advance: Advance) -> Merge:
        rule = _rule(segment)
        if rule.method == "slerp":
            (pair,) = _pairs(segment)
            a, b, both = inner_products(pair, advance)
            weights = slerp_coefficients(rule.weights[0], math.sqrt(a), math.sqrt(b), both)
            return replace(rule, method="linear", weights=weights, normalize=False)
        thresholds = _thresholds([segment], advance) if self._thresholds is None else self._thresholds
        return replace(rule, thresholds=thresholds)


def _thresholds(segments: Sequence[Segment], advance: Advance, each: Map = map) -> tuple[int, ...]:
    """Return what trims the deltas of each model, taken over all the segments together."""
    found = []
    for model, density in enumerate(_rule(segments[0]).densities or ()):
        pairs = [_pairs(segment)[model] for segment in segments]
        numel = sum(pair.numel for pair in pairs)
        found.append(0 if density == 1.0 else kth_magnitude(pairs, kept_count(numel, density), advance, each))
    return tuple(found) or (0,) * len(_rule(segments[0]).weights)


def _bytes_read(segment: Segment) -> int:
    """Return the bytes that are read of a tensor before it is merged."""
    rule, pairs = _rule(segment), _pairs(segment)
    if rule.method == "slerp":
        return pairs[0].nbytes
    trimmed = compress(pairs, [density < 1.0 for density in rule.densities or ()])
    return sum(reads_of_kth(pair.wide) * pair.nbytes for pair in trimmed)


def _merged(file: OutputFile) -> list[Segment]:
    return [segment for segment in file.segments if isinstance(segment.rule, Merge)]


def _rule(segment: Segment) -> Merge:
    assert isinstance(segment.rule, Merge)
    return segment.rule


def _pairs(segment: Segment) -> list[Pair]:
    """Return the base with each model."""
    base, *models = segment.inputs
    return [Pair(base, model, segment.numel, _wide(segment.inputs)) for model in models]


def _wide(inputs: Sequence[FileRange]) -> torch.dtype:
    """Return what `fused_merge.eager.merge.wide_dtype` says of tensors that are in files."""
    return torch.float64 if any(file_range.dtype == torch.float64 for file_range in inputs) else torch.float32
