"""The line between two checkpoints: one model folder for each ratio, all from one read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_merge import functional
from fused_merge.checkpoints.align import AlignedTensor, Span, align, lay_out_files
from fused_merge.checkpoints.folders import describe_source
from fused_merge.checkpoints.job import Job, Output, job_of
from fused_merge.checkpoints.plan import CopyRule, Rule
from fused_merge.eager.interpolate import interpolate_
from fused_merge.io.sources import PathLike, open_files
from fused_merge.options import check_choice
from fused_merge.per_tensor import (
    ByName,
    Setting,
    check_ratios,
    is_tuned,
    parse_bytes,
    parse_dtype,
    per_tensor,
    plain,
)

# Points of the line, or {name of the folder: point}.
Ratios: TypeAlias = "Sequence[Setting] | Mapping[str, Setting]"


class Line(NamedTuple):
    """The rule of a tensor that is interpolated: output k is theta(ratios[k])."""

    ratios: tuple[float, ...]

    def __call__(
        self, inputs: Sequence[Tensor], outs: Sequence[Tensor], first: int, impl: str, scratch: Tensor | None
    ) -> None:
        """Interpolate; see `fused_merge.functional.interpolate`."""
        base, tuned = inputs
        if impl == "eager":
            interpolate_(base, tuned, self.ratios, outs, scratch)
        else:
            functional.interpolate([base], [tuned], self.ratios, [outs], impl=impl)


def interpolate_checkpoints(
    base: PathLike,
    tuned: PathLike,
    ratios: Ratios,
    out: PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    unmatched: str = "refuse",
    align_vocabulary: bool = False,
    files_from: str = "tuned",
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    max_memory: int | str | None = None,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    verify: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write theta(r) = base + r * (tuned - base) as one model folder for each ratio, reading both once.

    `out/r0.10/` and so on hold the tensors of `base` under canonical names; tied weights that `base` leaves out stay
    out. Computed in fp32 (fp64 if an end is) and rounded once. At r = 0 and r = 1 every tensor is copied bit for bit.
    Integer tensors are copied from `tuned`, at r = 0 from `base`. Configuration, generation configuration, tokenizer
    and chat template go along; `fused_merge.json` has the recipe and checksums, `README.md` a model card.
    Source: Lin et al. 2024 (arXiv 2309.06256).

    Everything is checked before the first byte is written. What is written is in `out/.fused_merge.part` until all
    is whole; a run that was killed goes on from there when the same call is made again, to the same bytes.

    Args:
        base: theta0: a safetensors file or a Hugging Face folder.
        tuned: theta1: the same, with the names and shapes of `base`.
        ratios: R distinct ratios, below 0 or above 1 they extrapolate; each a number, or a mapping from names or
            regular expressions on whole names to numbers. Or a mapping {name of the folder: ratio}.
        out: the folder to write to; made if need be.
        dtype: of the floating tensors written, e.g. `"bfloat16"`; None is that of the inputs, which must agree.
        unmatched: what becomes of tensors that only one of the two holds: `"refuse"`, `"copy"` (to every output) or
            `"drop"`.
        align_vocabulary: accept embeddings with other numbers of rows. The output has as many as the model that
            `files_from` names; rows that only this one has are copied.
        files_from: `"tuned"` or `"base"`: whose configuration and tokenizer go along.
        max_shard_size: write files of at most so many bytes, e.g. `"5GB"`; None has the files of `base`.
        overwrite: replace folders that exist, and drop what another job left unfinished.
        threads: that read, compute and write; None is five for every two cores.
        max_memory: of all buffers, in bytes or as in `"256MB"`; None is 80 MiB. It does not depend on R or on the
            size of the model.
        device: `"cpu"`, or `"cuda"` to compute on a GPU.
        impl: `"auto"`, `"triton"` or `"eager"`.
        verify: read everything from the disk again, and compare it with its checksums, before it gets its name.
        progress: show a progress bar where rich is installed and standard error is a terminal.

    Returns:
        The folders, in the order of `ratios`; none while other workers still write. Their names have two decimals,
        or as many as the ratio needs; that of a mapping has its mean over the tensors and a hash.

    Raises:
        ValueError: if checkpoints, ratios or options do not fit; the sentence names the tensor, file or ratio.
        FileExistsError: if a ratio folder exists and `overwrite` is false.
        OSError: if `out` cannot be written to, the disk is too small, or an input vanishes. Files that were whole
            by then are kept in `out/.fused_merge.part`.
        RuntimeError: if `impl="triton"` cannot run here, or another process writes the same.
        TypeError: if `base` or `tuned` is not a path, or a ratio is no number.
    """
    job = plan_interpolation(
        base,
        tuned,
        ratios,
        out,
        dtype=dtype,
        unmatched=unmatched,
        align_vocabulary=align_vocabulary,
        files_from=files_from,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    return job.run(
        threads=threads,
        max_memory=max_memory,
        device=device,
        impl=impl,
        verify=verify,
        progress=progress,
    )


def plan_interpolation(
    base: PathLike,
    tuned: PathLike,
    ratios: Ratios,
    out: PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    unmatched: str = "refuse",
    align_vocabulary: bool = False,
    files_from: str = "tuned",
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> Job:
    """Check everything that `interpolate_checkpoints` would, and return the job without writing.

    Args and errors are those of `interpolate_checkpoints`. `Job.describe()` is the plan in numbers, `Job.run()`
    does it.
    """
    sources = open_files(base, role="base"), open_files(tuned, role="tuned")
    check_choice("files_from", files_from, ("base", "tuned"))
    leader = ("base", "tuned").index(files_from)
    written = parse_dtype(dtype)
    shard_size = None if max_shard_size is None else parse_bytes(max_shard_size, what="max_shard_size")
    tensors = align(sources, leader=leader, dtype=written, unmatched=unmatched, align_vocabulary=align_vocabulary)
    merged = [tensor.name for tensor in tensors if tensor.spans[0].merged]
    labelled = dict(ratios) if isinstance(ratios, Mapping) and not isinstance(ratios, ByName) else None
    given = check_ratios(ratios if labelled is None else labelled.values())  # type: ignore[arg-type]
    points = [(point, per_tensor(point, merged, what="ratio")) for point in given]
    labels = _labels(points) if labelled is None else list(labelled)
    picks = tuple(int(is_tuned(point, own)) for point, own in points)

    def rule_of(tensor: AlignedTensor, span: Span) -> Rule:
        if span.merged:
            return Line(tuple(own[tensor.name] for _, own in points))
        return CopyRule(picks if len(span.inputs) == 2 else (0,) * len(points))

    described = {
        "operation": "interpolate",
        "base": describe_source(sources[0]),
        "tuned": describe_source(sources[1]),
        "dtype": None if written is None else str(written).removeprefix("torch."),
        "unmatched": unmatched,
        "align_vocabulary": align_vocabulary,
        "files_from": files_from,
        "max_shard_size": shard_size,
    }
    return job_of(
        "interpolating",
        [
            Output(
                Path(out) / label,
                {**described, "ratio": plain(own if isinstance(point, ByName) else point, what="ratio")},
                f"Ratio {label}",
                _text(base, tuned),
            )
            for label, (point, own) in zip(_checked(labels), points, strict=True)
        ],
        sources,
        sources[leader],
        lambda most: lay_out_files(tensors, sources[0], rule_of, most),
        work=Path(out) / ".fused_merge.part",
        options={"dtype": written, "max_shard_size": shard_size, "overwrite": overwrite},
    )


def _labels(points: Sequence[tuple[Setting, Mapping[str, float]]]) -> list[str]:
    """Return the names of the folders, one for each point."""
    labels: dict[str, Setting] = {}
    for point, own in points:
        if isinstance(point, Mapping):
            mean = math.fsum(own.values()) / max(1, len(own))
            label = f"r{mean:.2f}-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:6]}"
        else:
            # + 0.0 so that −0.0 is called 0.
            text = f"{point + 0.0:.2f}"
            label = "r" + (text if math.isclose(float(text), point, rel_tol=1e-9) else f"{point:.9g}")
        if label in labels:
            raise ValueError(f"ratios {labels[label]!r} and {point!r} would share the folder {label}; drop one")
        labels[label] = point
    return list(labels)


def _checked(labels: Sequence[str]) -> Sequence[str]:
    for label in labels:
        if not isinstance(label, str) or not label or Path(label).name != label or label.startswith("."):
            raise ValueError(f"{label!r} cannot name the folder of a ratio; use a plain name such as 'low-layers'")
    return labels


def _text(base: PathLike, tuned: PathLike) -> str:
    return (
        f"A point of the line between two models: base + r * (tuned - base), with base = `{base}` and "
        f"tuned = `{tuned}`, computed in fp32 and rounded once "
        "([Lin et al. 2024](https://arxiv.org/abs/2309.06256))."
    )
