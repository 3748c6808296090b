"""The options of checkpoint jobs: what each one means, how it is checked, and what the command line says of it.

This module imports no torch, so that the command line can show its help at once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fused_merge.options import Option, at_least, one_of, optional, options_of
from fused_merge.per_tensor import parse_bytes, parse_dtype

if TYPE_CHECKING:
    import torch


def _check_dtype(name: str, dtype: Any) -> Any:
    return parse_dtype(dtype, what=name)


def _check_bytes(name: str, size: int | str) -> int:
    return parse_bytes(size, what=name)


class FileOptions(TypedDict, total=False):
    """The options of every job that writes model folders."""

    max_shard_size: Annotated[
        "int | str | None",
        Option(
            None,
            'write files of at most so many bytes, e.g. `"5GB"`; None has the files of the base.',
            optional(_check_bytes),
            {
                "type": str,
                "help": "Largest file to write, such as 5GB.",
                "metavar": "SIZE",
                "show_default": "sharded as the base",
            },
        ),
    ]
    overwrite: Annotated[
        bool,
        Option(
            False,
            "replace folders that exist, and drop what another job left unfinished.",
            cli={"help": "Replace what exists."},
        ),
    ]


class PlanOptions(FileOptions, total=False):
    """The options that decide what a job writes."""

    dtype: Annotated[
        "torch.dtype | str | None",
        Option(
            None,
            'dtype of the floating tensors written, e.g. `"bfloat16"`; None is that of the inputs, which must agree.',
            _check_dtype,
            {"type": str, "help": "bfloat16, float16, float32 or float64.", "show_default": "as stored"},
        ),
    ]
    unmatched: Annotated[
        str,
        Option(
            "refuse",
            'what happens to tensors that not all checkpoints hold: `"refuse"`, `"drop"`, or `"copy"` to every output, '
            "from the model that `files_from` names, else from the first that holds them.",
            one_of("refuse", "copy", "drop"),
            {"help": "Tensors that not all checkpoints hold: refuse, copy or drop."},
        ),
    ]
    align_vocabulary: Annotated[
        bool,
        Option(
            False,
            "accept embeddings with other numbers of rows. The output has as many as the model that `files_from` "
            "names; rows that only this one has are copied.",
            cli={"help": "Copy rows of embeddings that not all checkpoints have."},
        ),
    ]


class StreamOptions(TypedDict, total=False):
    """The options that decide how any job runs; its outputs do not depend on them."""

    threads: Annotated[
        "int | None",
        Option(
            None,
            "threads that read, compute and write; None is five for every two cores.",
            optional(at_least(1)),
            {"type": int, "help": "Threads that read, compute and write.", "min": 1, "show_default": "5 for 2 cores"},
        ),
    ]
    max_memory: Annotated[
        "int | str | None",
        Option(
            None,
            'memory limit for all buffers, in bytes or as in `"256MB"`; None is 80 MiB. It depends neither on the '
            "number of outputs nor on the size of the model.",
            optional(_check_bytes),
            {
                "type": str,
                "help": "Memory limit for all buffers, such as 256MB.",
                "metavar": "SIZE",
                "show_default": "80MiB",
            },
        ),
    ]
    device: Annotated[
        "str | torch.device",
        Option("cpu", '`"cpu"`, or `"cuda"` to compute on a GPU.', cli={"help": "Where to compute, such as cuda:0."}),
    ]
    verify: Annotated[
        bool,
        Option(
            False,
            "read everything from the disk again, and compare it with its checksums, before it gets its name.",
            cli={"help": "Read back and compare all that was written."},
        ),
    ]
    progress: Annotated[
        bool, Option(True, "show a progress bar where rich is installed and standard error is a terminal.")
    ]


class RunOptions(StreamOptions, total=False):
    """All options of `Job.run`."""

    impl: Annotated[str, Option("auto", '`"auto"`, `"triton"` or `"eager"`.', cli={"help": "auto, triton or eager."})]


class InterpolatePlanOptions(PlanOptions, total=False):
    """The options that decide what `interpolate_checkpoints` writes."""

    files_from: Annotated[
        str,
        Option(
            "tuned",
            '`"tuned"` or `"base"`: the model whose configuration and tokenizer go along.',
            one_of("base", "tuned"),
            {"help": "Model whose configuration and tokenizer go along: tuned or base."},
        ),
    ]


class InterpolateOptions(InterpolatePlanOptions, RunOptions, total=False):
    """All options of `interpolate_checkpoints`."""


def described(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the resolved options of a plan that its outputs depend on, as a recipe in JSON holds them."""
    content = {name: plan[name] for name in options_of(PlanOptions) if name != "overwrite"}
    return content | {"dtype": None if plan["dtype"] is None else str(plan["dtype"]).removeprefix("torch.")}
