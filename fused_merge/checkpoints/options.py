"""The options of checkpoint jobs. Nothing here waits for torch: the command line shows its help at once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fused_merge.io.options import OutputOptions, check_dtype
from fused_merge.options import Option, at_least, definition, one_of, optional, options_of
from fused_merge.per_tensor import parse_bytes
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import torch


def _check_bytes(name: str, size: int | str) -> int:
    return parse_bytes(size, what=name)


@definition
class FileOptions(TypedDict, total=False):
    """The options of every job that writes model folders.

    Options:
        max_shard_size: largest size of a file, such as `"5GB"`; None writes the files of the base.
        overwrite: replace what exists, and drop what another job left unfinished.
    """

    max_shard_size: Annotated[
        "int | str | None",
        Option(None, optional(_check_bytes), cli={"metavar": "SIZE", "show_default": "the files of the base"}),
    ]
    overwrite: Annotated[bool, Option(False, cli={})]


@definition
class PlanOptions(FileOptions, OutputOptions, total=False):
    """The options that decide what a job writes.

    Options:
        dtype: dtype of the floating tensors written: `"bfloat16"`, `"float16"`, `"float32"` or `"float64"`; None is
            that of the inputs, which must agree.
    """

    dtype: Annotated["torch.dtype | str | None", Option(None, check_dtype, cli={"show_default": "as stored"})]


@definition
class StreamOptions(ProgressOption, total=False):
    """The options that decide how any job runs; its outputs do not depend on them.

    Options:
        threads: threads that read, compute and write; None is five for every two cores.
        max_memory: memory limit for all buffers, such as `"256MB"`; None is 80 MiB. It depends neither on the number of
            outputs nor on the size of the model.
        device: where to compute, such as `"cuda:0"`.
        verify: read back all that was written and compare it with its checksums, before it gets its name.
    """

    threads: Annotated[
        "int | None", Option(None, optional(at_least(1)), cli={"min": 1, "show_default": "5 for 2 cores"})
    ]
    max_memory: Annotated[
        "int | str | None", Option(None, optional(_check_bytes), cli={"metavar": "SIZE", "show_default": "80MiB"})
    ]
    device: Annotated["str | torch.device", Option("cpu", cli={})]
    verify: Annotated[bool, Option(False, cli={})]


@definition
class RunOptions(StreamOptions, total=False):
    """All options of `Job.run`.

    Options:
        impl: what computes: `"auto"`, `"triton"` or `"eager"`.
    """

    impl: Annotated[str, Option("auto", cli={})]


@definition
class InterpolatePlanOptions(PlanOptions, total=False):
    """The options that decide what `interpolate_checkpoints` writes.

    Options:
        config_from: model whose configuration goes along, `"base"` or `"tuned"`; with it go code and whatever else is
            no tokenizer. None is the model that the weights are those of: the base at r = 0, else the tuned one. With
            vocabularies of two sizes it is the tuned one for all outputs.
        tokenizer_from: model whose tokenizer goes along, `"base"` or `"tuned"`; with it go processor and chat template.
            None is the tuned model, or the base where that has none or one for another vocabulary.
    """

    config_from: Annotated[
        "str | None", Option(None, one_of("base", "tuned", None), cli={"show_default": "base at r = 0, else tuned"})
    ]
    tokenizer_from: Annotated["str | None", Option(None, one_of("base", "tuned", None), cli={"show_default": "tuned"})]


class InterpolateOptions(InterpolatePlanOptions, RunOptions, total=False):
    """All options of `interpolate_checkpoints`."""


def described(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the resolved options of a plan that its outputs depend on, as a recipe in JSON holds them."""
    content = {name: plan[name] for name in options_of(PlanOptions) if name != "overwrite"}
    return content | {"dtype": None if plan["dtype"] is None else str(plan["dtype"]).removeprefix("torch.")}
