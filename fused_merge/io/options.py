"""The options of jobs that load a model with Transformers. Nothing here waits for torch."""

from typing import TYPE_CHECKING, Annotated, Any

from fused_merge.options import Option, definition
from fused_merge.per_tensor import parse_dtype
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import torch


def check_dtype(name: str, dtype: Any) -> Any:
    """Return a dtype by its name; see `parse_dtype`."""
    return parse_dtype(dtype, what=name)


@definition
class ModelOptions(ProgressOption, total=False):
    """How the model is loaded and watched.

    Options:
        device: `"cpu"` or `"cuda"`.
        dtype: dtype of the loaded model, e.g. `"bfloat16"`; None is that of the files of `tuned`.
    """

    device: Annotated[str, Option("cpu", cli={"help": "Where to compute, such as cuda:0."})]
    dtype: Annotated[
        "torch.dtype | str | None",
        Option(
            None,
            check_dtype,
            cli={"type": str, "help": "bfloat16, float16, float32 or float64.", "show_default": "as stored"},
        ),
    ]
