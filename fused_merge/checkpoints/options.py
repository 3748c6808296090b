"""The options of jobs on checkpoints: what each means, how it is checked and what the command line says of it.

Nothing here waits for torch, so that the command line can show its help at once.
"""

from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fused_merge.options import Option, one_of

if TYPE_CHECKING:
    import torch


def _check_dtype(name: str, dtype: Any) -> Any:
    from fused_merge.per_tensor import parse_dtype

    return parse_dtype(dtype, what=name)


def _check_bytes(name: str, size: int | str | None) -> int | None:
    from fused_merge.per_tensor import parse_bytes

    return None if size is None else parse_bytes(size, what=name)


def _check_threads(name: str, threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise ValueError(f"{name} must be at least 1, got {threads}")
    return threads


class PlanOptions(TypedDict, total=False):
    """What is written: the options of a job that its outputs depend on."""

    dtype: Annotated[
        "torch.dtype | str | None",
        Option(
            None,
            'of the floating tensors written, e.g. `"bfloat16"`; None is that of the inputs, which must agree.',
            _check_dtype,
            {"help": "bfloat16, float16, float32 or float64.", "show_default": "as stored"},
        ),
    ]
    unmatched: Annotated[
        str,
        Option(
            "refuse",
            'what becomes of tensors that not all checkpoints hold: `"refuse"`, `"copy"` (to every output) or `"drop"`.',
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
            cli={"help": "Copy rows of embeddings that only one checkpoint has."},
        ),
    ]
    max_shard_size: Annotated[
        "int | str | None",
        Option(
            None,
            'write files of at most so many bytes, e.g. `"5GB"`; None has the files of the base.',
            _check_bytes,
            {"help": "Largest file to write, such as 5GB.", "metavar": "SIZE", "show_default": "sharded as the base"},
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


class RunOptions(TypedDict, total=False):
    """How it is written: the options of a job that its outputs do not depend on."""

    threads: Annotated[
        "int | None",
        Option(
            None,
            "threads that read, compute and write; None is five for every two cores.",
            _check_threads,
            {"help": "Threads that read, compute and write.", "show_default": "5 for 2 cores"},
        ),
    ]
    max_memory: Annotated[
        "int | str | None",
        Option(
            None,
            'memory limit for all buffers, in bytes or as in `"256MB"`; None is 80 MiB. It depends neither on the '
            "number of outputs nor on the size of the model.",
            _check_bytes,
            {"help": "Memory limit for all buffers, such as 256MB.", "metavar": "SIZE", "show_default": "80MiB"},
        ),
    ]
    device: Annotated[
        "str | torch.device",
        Option("cpu", '`"cpu"`, or `"cuda"` to compute on a GPU.', cli={"help": "Where to compute, such as cuda:0."}),
    ]
    impl: Annotated[str, Option("auto", '`"auto"`, `"triton"` or `"eager"`.', cli={"help": "auto, triton or eager."})]
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
