"""Several finished models merged into one folder, streamed: the methods of `fused_merge.eager.merge` on checkpoints.

Most methods are elementwise and take one read. What a whole tensor or a whole model decides is found before, in reads
of its own: for a trim the exact k-th largest magnitude, from histograms of the integer patterns of magnitudes, 16 bits
a read; for angles, as of slerp, norms and inner products. DELLA looks at whole rows: what a block lacks of its first
and of its last one is read once more. Memory is that of blocks, histograms and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.checkpoints.align import align
from fused_merge.checkpoints.engine import Resources, workers
from fused_merge.checkpoints.folders import beside, describe_source, has_chat_template, has_tokenizer
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
    merged_share,
    without_collection,
)
from fused_merge.eager.merge import Coefficients, kept_ranks, mask_key, merge_block, weighted_sum
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.shard import ShardIndex
from fused_merge.io.adapters import is_adapter
from fused_merge.io.files import expanded, reading
from fused_merge.io.sources import FileRange, FileSource, PathLike, open_files, read_range
from fused_merge.merge.adapters import Merged, merged_adapters
from fused_merge.merge.options import MergeOptions, MergePlanOptions
from fused_merge.merge.whole_tensors import (
    Advance,
    Inputs,
    Map,
    inner_products,
    kth_magnitudes,
    lowest_bits,
)
from fused_merge.methods import MARGINS, MergeMethod, check_coefficients, merge_method
from fused_merge.names import some
from fused_merge.options import documented, resolve, split
from fused_merge.per_tensor import PerTensor, per_tensor, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The options that name a model whose files go along.
_FILES_FROM = "config_from", "tokenizer_from"

# Elements that are merged at once, so that temporaries stay in a cache.
_BLOCK = 1 << 16


# Rows are ranked as a whole by each thread that computes: 40 bytes an element, beside the models.
_LONGEST_ROW = 1 << 20


class MergeTensorRule(NamedTuple):
    """The rule of one tensor that is merged; see `fused_merge.eager.merge.merge`."""

    name: str  # of the tensor
    method: MergeMethod  # as `merge_method` returned it
    own: Coefficients  # without bounds while they are not known
    seed: int  # of the random masks
    row: int = 1  # elements of a row, where rows are ranked
    places: tuple[FileRange, ...] = ()  # the inputs, where rows are ranked

    @property
    def telling(self) -> Sequence[int]:
        """The only output."""
        return (0,)

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Merge elements of the models; the first input is the base if the method has one."""
        (out,) = outs
        numel, before = out.numel(), first % self.row
        after = -(first + numel) % self.row
        if before or after:
            inputs = [self._whole_rows(*each, first, before, after) for each in zip(inputs, self.places, strict=True)]
            made = torch.empty_like(inputs[0], dtype=out.dtype)
            self._merge(inputs, made, first - before)
            out.copy_(made[before : before + numel])
        else:
            self._merge(inputs, out, first)

    def _merge(self, inputs: Sequence[Tensor], out: Tensor, first: int) -> None:
        """Merge whole rows, some at a time."""
        key, size = mask_key(self.name, self.seed), max(_BLOCK // self.row, 1) * self.row
        for start in range(0, out.numel(), size):
            blocks = [tensor[start : start + size] for tensor in inputs]
            base = blocks.pop(0) if self.method.has_base else None
            numel = len(blocks[0])
            shard = key._replace(shard=ShardIndex(first + start, numel, numel))
            out[start : start + numel] = merge_block(
                base, blocks, self.method, self.own, row=self.row, key=shard, dtype=out.dtype
            )

    def _whole_rows(self, block: Tensor, place: FileRange, first: int, before: int, after: int) -> Tensor:
        """Return a block with the elements of its first and last row that lie before and after it."""
        with reading(place.file) as handle:
            ends = [(first - before, before), (first + block.numel(), after)]
            head, tail = (read_range(handle, place, *end).to(block.device) for end in ends)
        return torch.cat([head, block, tail])


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
    | `"nuslerp"` | on the arc from one model to the other, at w_2 / (w_1 + w_2); with a base that of tau_i | the same |
    | `"nearswap"` | the base, each element moved by at most t, its weight, to the model | alchemonaut 2024 |
    | `"model_stock"` | theta0 + t * mean of tau_i, t from angles; all w_i = 1 | Jang et al. 2024 (arXiv 2403.19522) |
    | `"task_arithmetic"` | theta0 + scale * sum of w_i tau_i | Ilharco et al. 2023 (arXiv 2212.04089) |
    | `"ties"` | tau_i trimmed to their largest, sign elected, mean of those that agree | Yadav et al. 2023 |
    | `"dare_linear"` | tau_i dropped at random, divided by the density | Yu et al. 2024 (arXiv 2311.03099) |
    | `"dare_ties"` | the same, sign elected, sum of those that agree | Yu et al. 2024 |
    | `"breadcrumbs"` | tau_i without their largest and smallest | Davari & Belilovsky 2023 (arXiv 2312.06795) |
    | `"breadcrumbs_ties"` | the same, sign elected, sum of those that agree | the same |
    | `"della"` | as `"dare_ties"`, the large of a row kept more often, mean | Deep et al. 2024 (arXiv 2406.11617) |
    | `"della_linear"` | the same without a vote, sum | the same |

    tau_i = theta_i - theta0; TIES is arXiv 2306.01708. Arithmetic is fp32 (fp64 where a tensor is), rounded once.
    Tensors, files, resuming and errors are as for `interpolate_checkpoints`.

    Of adapters of LoRA the products of the factors are merged: `"linear"`, or `"task_arithmetic"` from a base that is
    an adapter, writes an adapter of the summed rank; with their model as `base`, `"task_arithmetic"`, `"dare_linear"`
    and `"dare_ties"` write that model with tau_i = scale_i * B_i A_i. Weights go by the names of the adapted weights.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder. None for `"linear"`, which has none, and for
            `"nuslerp"` of whole models.
        models: the models and their weights: numbers, or mappings from names or regular expressions on whole names to
            numbers. For `"slerp"` and `"nearswap"` one model, and its weight is t.
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

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> models = {"sft/": 0.5, "code/": 0.3}
        >>> out = fm.merge_checkpoints("base/", models, method="ties", density=0.2, out="merged/")
        >>> type(AutoModelForCausalLM.from_pretrained(out)).__name__
        'LlamaForCausalLM'
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
    decided = merge_method(method, normalize=plan["normalize"], rescale=plan["rescale"], scale=plan["scale"])
    decided = decided.on_base(base is not None)
    margin, usual = MARGINS.get(decided.sparsify, ("", 0.0))
    # What F takes, of each model.
    shares: dict[str, Sequence[PerTensor | None]] = {}
    for option in ("density", "gamma", "epsilon"):
        if (value := plan[option]) is None:
            continue
        if option not in ("density", margin):
            raise ValueError(f"method {method!r} has no option {option!r}; leave it out")
        shares[option] = value if isinstance(value, Sequence) else [value] * len(models)
        if len(shares[option]) != len(models):
            raise ValueError(f"{len(models)} models need one {option} or as many, got {len(shares[option])}")
    if margin and "density" in shares:
        shares.setdefault(margin, [usual] * len(models))

    def coefficients(names: Sequence[str]) -> dict[str, Coefficients]:
        weights = [per_tensor(weight, names, what="weight") for weight in models.values()]
        kept = {
            option: [per_tensor(default if each is None else each, names, what=option) for each in shares[option]]
            for option, default in (("density", 1.0), (margin, usual))
            if option in shares
        }
        found = {}
        for name in names:
            own = {option: tuple(each[name] for each in given) for option, given in kept.items()}
            numbers = Coefficients(tuple(each[name] for each in weights), own.get("density"), own.get(margin))
            try:
                check_coefficients(decided, len(models), numbers.weights, numbers.densities, numbers.margins)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
            found[name] = numbers
        return found

    said: dict[PathLike, dict[str, Any]] = {
        path: {"weight": plain(each, what="weight")} for path, each in models.items()
    }
    for option, given in shares.items():
        for own, each in zip(said.values(), given, strict=True):
            if each is not None:
                own[option] = plain(each, what=option)
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
    if options["trim"] == "model" and not method.has_thresholds:
        raise ValueError(f"method {method.name!r} has no option trim='model': it trims nothing; leave it out")
    if not models:
        raise ValueError("there is no model to merge; pass at least one")
    paths = [*models] if base is None else [base, *models]
    sources = [open_files(path, role="a model") for path in paths]
    named = [_named(option, options[option], paths, has_base=base is not None) for option in _FILES_FROM]
    config_source, out = named[0] or 0, expanded(out)
    folder = out.absolute()
    if any(map(is_adapter, sources)):
        made = merged_adapters(sources, method, coefficients, named[0], folder.name, options)
    else:
        made = _merged_models(sources, method, coefficients, config_source, options)
    tokenizer = named[1]
    if tokenizer is None:
        tokenizers = [i for i in made.fitting if has_tokenizer(sources[i])]
        chatting = (i for i in tokenizers if has_chat_template(sources[i]))
        tokenizer = next(chatting, tokenizers[0] if tokenizers else config_source)
    around = beside(
        sources[config_source], sources[tokenizer], options["dtype"], made.config_values, adapter=made.adapter
    )
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
        **{option: sources[i].origin for option, i in zip(_FILES_FROM, (config_source, tokenizer), strict=True)},
    }
    about = f"A merge of {len(models)} models by `{method.name}` ({method.paper}), in fp32 and rounded once. "
    about += f"{made.share:.2%} of its bytes are merged, the others copied."
    library = "transformers" if made.adapter is None else "peft"
    return Job(
        "merging",
        [Output(out, whole_recipe, folder.name, about, around, library)],
        sources,
        made.files,
        work=folder.with_name(f".{folder.name}.part"),
        options=options,
        whole_tensor_pass=WholeTensorPass(over_model=options["trim"] == "model")
        if method.has_angles or method.has_thresholds
        else None,
    )


def _merged_models(
    sources: Sequence[FileSource],
    method: MergeMethod,
    coefficients: Callable[[Sequence[str]], Mapping[str, Coefficients]],
    config_source: int,
    options: Mapping[str, Any],
) -> Merged:
    """Return a merge of whole models."""
    tensors, fitting, config_values = align(sources, config_source, options)
    merged = [tensor for tensor in tensors if tensor.merged]
    decided = coefficients([tensor.name for tensor in merged])
    packed = next((tensor.name for tensor in merged if sum(each.merged for each in tensor.segments) > 1), None)
    if packed is not None and (method.has_angles or method.sparsify == "ranked"):
        raise ValueError(
            f"method {method.name!r} looks at whole tensors or rows, and what belongs to {packed!r} lies in several "
            "pieces in one of the models; give all models one layout, with from_pretrained and save_pretrained of "
            "Transformers"
        )
    if options["trim"] == "model":
        precisions = {compute_dtype(*(each.dtype for each in tensor.segments[0].inputs)) for tensor in merged}
        if len({own[1:] for own in decided.values()}) > 1 or len(precisions) > 1:
            raise ValueError(
                "trim='model' chooses magnitudes of a whole model: give one density for each model, and "
                "tensors that are all float64 or none"
            )

    def rule_of(tensor: AlignedTensor, segment: AlignedSegment) -> Rule:
        if segment.merged:
            rule = MergeTensorRule(tensor.name, method, decided[tensor.name], options["seed"])
            return _over_rows(rule, tensor, segment) if method.sparsify == "ranked" else rule
        return CopyRule((config_source if len(segment.inputs) == len(sources) else 0,))

    files = lay_out_files(tensors, sources[0], rule_of, options["max_shard_size"])
    return Merged(files, merged_share(tensors), fitting, config_values)


def _over_rows(rule: MergeTensorRule, tensor: AlignedTensor, segment: AlignedSegment) -> MergeTensorRule:
    """Return the rule of a tensor whose rows are ranked, if anything is dropped; a vector is one row."""
    row = tensor.shape[-1] if tensor.shape else 1
    if set(rule.own.densities or (1.0,)) == {1.0}:
        return rule
    if row > _LONGEST_ROW:
        raise ValueError(
            f"{rule.name!r} has rows of {row} elements, and {rule.method.name!r} ranks at most {_LONGEST_ROW}; "
            "keep all of it with a density of 1, or take another method"
        )
    return rule._replace(row=row, places=segment.inputs)


def _named(option: str, given: PathLike | None, paths: Sequence[PathLike], *, has_base: bool) -> int | None:
    """Return which of the models an option names, None if it is left open."""
    if given is None:
        return None
    if given == "base" and has_base:
        return 0
    for i, path in enumerate(paths):
        if expanded(path) == expanded(given):
            return i
    raise ValueError(f"{option} must be one of {some(repr(str(path)) for path in paths)}, got {str(given)!r}")


class WholeTensorPass:
    """Completes the rules of a file, before it is written, with what whole tensors or whole models decide."""

    def __init__(self, *, over_model: bool) -> None:
        self._over_model = over_model
        # Of a trim over whole models: found once.
        self._bounds: tuple[tuple[int, ...], ...] | None = None

    def bytes_read(self, files: Sequence[OutputFile], mine: Sequence[OutputFile]) -> int:
        """Return the bytes that this reads for `mine` of the files of a job."""
        return sum(
            _bytes_read(*each) for file in (files if self._over_model else mine) for each in _merged(file.segments)
        )

    def complete(
        self, files: Sequence[OutputFile], file: OutputFile, resources: Resources, advance: Advance
    ) -> OutputFile:
        """Return one of the files of a job with rules that know all they need."""
        with workers(resources.threads, advance) as (pool, advance):
            if self._over_model and self._bounds is None and _merged(file.segments):
                merged = [each for any_file in files for each in _merged(any_file.segments)]
                self._bounds = _bounds(merged, advance, pool.map)
            # The segments of a tensor follow one another.
            tensors = [list(own) for _, own in groupby(file.segments, lambda segment: segment.name)]
            completed = pool.map(lambda own: self._completed(own, advance), tensors)
            return file._replace(segments=tuple(chain.from_iterable(completed)))

    def _completed(self, segments: Sequence[Segment], advance: Advance) -> list[Segment]:
        """Return the segments of a tensor with what all of it decides."""
        merged = _merged(segments)
        if not merged:
            return list(segments)
        rule, inputs = merged[0]
        if rule.method.has_angles:
            products = inner_products(inputs, advance, deltas=rule.method.deltas)
            method, weights = weighted_sum(rule.method, rule.own.weights, products)
            rule = rule._replace(method=method, own=Coefficients(weights))
        else:
            bounds = self._bounds or _bounds(merged, advance)
            rule = rule._replace(own=rule.own._replace(bounds=bounds))
        return [each._replace(rule=rule) if isinstance(each.rule, MergeTensorRule) else each for each in segments]


def _merged(segments: Iterable[Segment]) -> list[tuple[MergeTensorRule, Inputs]]:
    """Return what is merged of segments, and where that lies."""
    return [(each.rule, _inputs(each)) for each in segments if isinstance(each.rule, MergeTensorRule)]


def _inputs(segment: Segment) -> Inputs:
    return Inputs(segment.inputs, segment.numel, compute_dtype(*(place.dtype for place in segment.inputs)))


def _pairs(inputs: Inputs) -> list[Inputs]:
    """Return the base with each model."""
    base, *models = inputs.places
    return [inputs._replace(places=(base, model)) for model in models]


def _bounds(
    merged: Sequence[tuple[MergeTensorRule, Inputs]], advance: Advance, each: Map = map
) -> tuple[tuple[int, ...], ...]:
    """Return what trims the deltas of each model, taken over all the tensors together."""
    own = merged[0][0].own
    by_model = zip(*(_pairs(inputs) for _, inputs in merged), strict=True)
    found: list[tuple[int, ...]] = []
    for pairs, density, gamma in zip(by_model, own.densities or repeat(1.0), own.margins or repeat(None), strict=False):
        ranks = kept_ranks(sum(pair.numel for pair in pairs), density, gamma)
        found.append((0,) if density == 1.0 else kth_magnitudes(pairs, ranks, advance, each))
    return tuple(found)


def _bytes_read(rule: MergeTensorRule, inputs: Inputs) -> int:
    """Return the bytes that are read of a tensor before it is merged."""
    if rule.method.has_angles:
        return inputs.nbytes
    kept = zip(_pairs(inputs), rule.own.densities or repeat(1.0), strict=False)
    return sum(len(lowest_bits(pair.wide)) * pair.nbytes for pair, density in kept if density < 1.0)
