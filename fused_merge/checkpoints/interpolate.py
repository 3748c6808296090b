"""Interpolation between two checkpoints on disk: one model folder for each ratio, all from one read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from fused_merge import functional
from fused_merge.checkpoints.adapters import check_options, combined_adapter, into_base, weights_of
from fused_merge.checkpoints.align import align
from fused_merge.checkpoints.folders import Beside, beside, describe_source, has_config, has_tokenizer
from fused_merge.checkpoints.job import Job, Output
from fused_merge.checkpoints.options import InterpolateOptions, InterpolatePlanOptions, RunOptions, described
from fused_merge.checkpoints.plan import (
    AlignedSegment,
    AlignedTensor,
    CopyRule,
    OutputFile,
    Rule,
    lay_out_files,
    merged_share,
    without_collection,
)
from fused_merge.eager.interpolate import interpolate_
from fused_merge.eager.merge import Coefficients
from fused_merge.io.adapters import is_adapter, read_adapters
from fused_merge.io.files import expanded
from fused_merge.io.match import names_in_memory
from fused_merge.io.sources import FileSource, PathLike, open_files
from fused_merge.methods import merge_method
from fused_merge.options import documented, resolve, split
from fused_merge.per_tensor import NamedRatios, PerTensor, check_ratios, is_tuned, per_tensor, plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ENDS = {"base": 0, "tuned": 1}

# Ratios, or {name of the folder: ratio}.
Ratios: TypeAlias = "Sequence[PerTensor] | Mapping[str, PerTensor]"


class InterpolateRule(NamedTuple):
    """The rule of a tensor that is interpolated: output k is theta(ratios[k])."""

    ratios: tuple[float, ...]

    @property
    def telling(self) -> Sequence[int]:
        """The two ends: every other point lies between them."""
        return tuple({self.ratios.index(end) for end in (min(self.ratios), max(self.ratios))})

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Interpolate."""
        base, tuned = inputs
        if impl == "eager":
            interpolate_(base, tuned, self.ratios, outs, scratch)
        else:
            functional.interpolate([base], [tuned], self.ratios, [outs], impl=impl)


@documented(InterpolateOptions)
def interpolate_checkpoints(
    base: PathLike, tuned: PathLike, ratios: Ratios, out: PathLike, **options: Unpack[InterpolateOptions]
) -> list[Path]:
    """Write theta(r) = base + r * (tuned - base) as one model folder for each ratio, reading both models once.

    `out/r0.10/` and so on hold the tensors of `base` under canonical names; tied weights that `base` leaves out stay
    out. The arithmetic is fp32 (fp64 if one of the models is) and is rounded once. At r = 0 and r = 1 every tensor is
    copied bit for bit. Integer tensors are copied from `tuned`, at r = 0 from `base`. Everything small that is neither
    weights nor training state goes along: configuration, tokenizer, chat template, folders too. `fused_merge.json`
    holds the recipe and the checksums, `README.md` a model card. Source: Lin et al. 2024 (arXiv 2309.06256).

    Between two adapters of LoRA, what is interpolated is the product of their factors, and each folder is an adapter,
    of the summed rank; r = 0 and r = 1 are the adapters themselves. With an adapter as `tuned` and its model as `base`
    each folder is a model, base + r * scale * B A. Ratios then go by the names of the adapted weights.

    Everything is checked before the first byte is written. Until all outputs are complete, they are in
    `out/.fused_merge.part`; when a run failed or was killed, the same call goes on there and writes the same bytes.

    Args:
        base: theta0: a safetensors file, a Hugging Face folder or the folder of an adapter.
        tuned: theta1: the same, with the names and shapes of `base`, or an adapter on it.
        ratios: R distinct ratios; below 0 or above 1 they extrapolate. Each is a number, or a mapping from names or
            regular expressions on whole names to numbers. Or a mapping {name of the folder: ratio}.
        out: the folder to write to; it is made if it does not exist.
        {options}

    Returns:
        The folders, in the order of `ratios`. Their names have two decimals, or as many as the ratio needs; the folder
        of a mapping is named after its mean over the tensors and a hash.

    Raises:
        ValueError: if checkpoints, ratios or options do not fit; the sentence names the tensor, file or ratio.
        FileExistsError: if a ratio folder exists and `overwrite` is false.
        OSError: if `out` cannot be written to, the disk is too small, or an input vanishes.
        RuntimeError: if `impl="triton"` cannot run here, or another process writes the same outputs.
        TypeError: if `base` or `tuned` is not a path, a ratio is not a number, or an option is unknown.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM
        >>> folders = fm.interpolate_checkpoints("sft/", "rlhf/", [0.2, 0.6], out="line/")
        >>> [folder.name for folder in folders]
        ['r0.20', 'r0.60']
        >>> sft, rlhf, point = map(AutoModelForCausalLM.from_pretrained, ("sft/", "rlhf/", folders[0]))
        >>> torch.allclose(point.model.norm.weight, torch.lerp(sft.model.norm.weight, rlhf.model.norm.weight, 0.2))
        True
    """
    plan, run = split(options, InterpolatePlanOptions, RunOptions)
    return plan_interpolation(base, tuned, ratios, out, **plan).run(**run)


@documented(InterpolatePlanOptions)
@without_collection()
def plan_interpolation(
    base: PathLike, tuned: PathLike, ratios: Ratios, out: PathLike, **options: Unpack[InterpolatePlanOptions]
) -> Job:
    """Check everything that `interpolate_checkpoints` would, with its arguments and errors, and write nothing.

    `Job.describe()` returns the plan in numbers, `Job.run()` carries it out.
    """
    plan, out = resolve(options, InterpolatePlanOptions), expanded(out)
    sources = open_files(base, role="base"), open_files(tuned, role="tuned")
    labeled = dict(ratios) if isinstance(ratios, Mapping) and not isinstance(ratios, NamedRatios) else None
    given = check_ratios(ratios if labeled is None else labeled.values())  # type: ignore[arg-type]
    made = (_of_adapters if any(map(is_adapter, sources)) else _of_models)(sources, given, plan)
    labels = _labels(given, made.decided) if labeled is None else list(labeled)
    for label in labels:
        if not isinstance(label, str) or not label or Path(label).name != label or label.startswith("."):
            raise ValueError(f"{label!r} cannot name the folder of a ratio; use a plain name such as 'low-layers'")
    files, around, share = made.finish(labels)
    ends = {"base": describe_source(sources[0]), "tuned": describe_source(sources[1])}
    recipe = {"operation": "interpolate", **ends, **described(plan)}
    recipe |= {name: plan[name] for name in ("config_from", "tokenizer_from")}
    about = (
        f"An interpolation of two {made.what}: base + r * (tuned - base), with base = `{base}` and tuned = `{tuned}`, "
        "computed in fp32 and rounded once ([Lin et al. 2024](https://arxiv.org/abs/2309.06256)). "
        f"{share:.2%} of its bytes are interpolated, the others copied."
    )
    outputs = []
    for label, ratio, own, beside_it in zip(labels, given, made.decided, around, strict=True):
        written = plain(own if isinstance(ratio, NamedRatios) else ratio, what="ratio")
        said = {**recipe, "ratio": written}
        outputs.append(Output(out / label, said, f"Ratio {label}", about, beside_it, made.library))
    return Job("interpolating", outputs, sources, files, work=out / ".fused_merge.part", options=plan)


class _Made(NamedTuple):
    """What is interpolated between two ends."""

    what: str  # the ends are
    library: str  # that loads the outputs
    decided: list[dict[str, float]]  # for each ratio, the number of each tensor
    # Given the names of the outputs: the files, what stands beside those of each output, and the share that is merged.
    finish: Callable[[Sequence[str]], tuple[list[OutputFile], list[Beside], float]]


def _of_models(sources: tuple[FileSource, FileSource], given: Sequence[PerTensor], plan: Mapping[str, Any]) -> _Made:
    """Interpolate between two models."""
    layout = _ENDS.get(plan["config_from"], 1)
    tensors, fitting, config_values = align(sources, layout, plan)
    interpolated = [tensor.name for tensor in tensors if tensor.merged]
    # Ratios that were found for a model in memory, or made for it, have its names.
    decided = [per_tensor(each, interpolated, what="ratio", also=lambda: names_in_memory(sources[0])) for each in given]
    copied_from = tuple(int(is_tuned(ratio, own)) for ratio, own in zip(given, decided, strict=True))

    numbers = [ratio for ratio in given if isinstance(ratio, float)]
    # One for all tensors, of which there may be hundreds of thousands.
    uniform = InterpolateRule(tuple(numbers)) if len(numbers) == len(given) else None

    def rule_of(tensor: AlignedTensor, segment: AlignedSegment) -> Rule:
        if segment.merged:
            return uniform or InterpolateRule(tuple(own[tensor.name] for own in decided))
        return CopyRule(copied_from if len(segment.inputs) == 2 else (0,) * len(given))

    # A model whose vocabulary has another size than the outputs has neither configuration nor tokenizer for them.
    ends_that_fit = sorted(fitting, reverse=True)
    configs = [i for i in ends_that_fit if has_config(sources[i])] or [layout]
    tokenizers = [i for i in ends_that_fit if has_tokenizer(sources[i])] or [layout]
    tokenizer = _ENDS.get(plan["tokenizer_from"], tokenizers[0])
    around = {}
    for end in dict.fromkeys(copied_from):
        config = _ENDS.get(plan["config_from"], end if end in configs else configs[0])
        around[end] = beside(sources[config], sources[tokenizer], plan["dtype"], config_values)

    def finish(labels: Sequence[str]) -> tuple[list[OutputFile], list[Beside], float]:
        files = lay_out_files(tensors, sources[0], rule_of, plan["max_shard_size"])
        return files, [around[end] for end in copied_from], merged_share(tensors)

    return _Made("models", "transformers", decided, finish)


def _of_adapters(sources: tuple[FileSource, FileSource], given: Sequence[PerTensor], plan: Mapping[str, Any]) -> _Made:
    """Interpolate between two adapters, as adapters, or between a model and itself with an adapter."""
    base, tuned = sources
    on_base = not is_adapter(base)
    if not is_adapter(tuned):
        raise ValueError(
            f"{base.origin} is an adapter and {tuned.origin} a model; give the model as base, or two adapters"
        )
    check_options(plan, into_base=on_base, config_source=_ENDS.get(plan["config_from"]))
    adapters = read_adapters([tuned] if on_base else sources)
    decided = [per_tensor(each, weights_of(adapters), what="ratio") for each in given]
    tokenizer = _ENDS.get(plan["tokenizer_from"], 1 if has_tokenizer(tuned) else 0)

    def onto_base(labels: Sequence[str]) -> tuple[list[OutputFile], list[Beside], float]:
        own = {name: [Coefficients((each[name],)) for each in decided] for name in decided[0]}
        files, share = into_base(base, adapters, merge_method("task_arithmetic"), own, {**plan, "seed": 0})
        return files, [beside(base, sources[tokenizer], plan["dtype"])] * len(labels), share

    def as_adapters(labels: Sequence[str]) -> tuple[list[OutputFile], list[Beside], float]:
        files, around = [], []
        for label, ratio, own in zip(labels, given, decided, strict=True):
            config = _ENDS.get(plan["config_from"], int(is_tuned(ratio, own)))
            numbers = {name: (1.0 - each, each) for name, each in own.items()}
            file, said = combined_adapter(adapters, numbers, config_source=config, dtype=plan["dtype"], only=label)
            files.append(file)
            around.append(beside(sources[config], sources[tokenizer], adapter=said))
        return files, around, 1.0

    if on_base:
        return _Made("models, the second an adapter on the first", "transformers", decided, onto_base)
    return _Made("adapters, by the product of their factors", "peft", decided, as_adapters)


def _labels(ratios: Sequence[PerTensor], decided: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the name of the folder of each ratio."""
    labels: dict[str, PerTensor] = {}
    for ratio, own in zip(ratios, decided, strict=True):
        if isinstance(ratio, Mapping):
            mean = math.fsum(own.values()) / max(1, len(own))
            label = f"r{mean:.2f}-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:6]}"
        else:
            # + 0.0 so that −0.0 is called 0.
            text = f"{ratio + 0.0:.2f}"
            label = "r" + (text if math.isclose(float(text), ratio, rel_tol=1e-9) else f"{ratio:.9g}")
        if label in labels:
            raise ValueError(f"ratios {labels[label]!r} and {ratio!r} would share the folder {label}; drop one")
        labels[label] = ratio
    return list(labels)
