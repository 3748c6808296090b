"""The options of jobs that load a model with Transformers. Nothing here waits for torch."""

from typing import TYPE_CHECKING, Annotated, Any

from fused_merge.options import Option
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import torch


def _check_dtype(name: str, dtype: Any) -> Any:
    from fused_merge.per_tensor import parse_dtype

    return parse_dtype(dtype, what=name)


class ModelOptions(ProgressOption, total=False):
    """How the model is loaded and watched."""

    device: Annotated[str, Option("cpu", '`"cpu"` or `"cuda"`.', cli={"help": "Where to compute, such as cuda:0."})]
    dtype: Annotated[
        "torch.dtype | str | None",
        Option(
            None,
            'dtype of the loaded model, e.g. `"bfloat16"`; None is that of the files of `tuned`.',
            _check_dtype,
            {"type": str, "help": "bfloat16, float16, float32 or float64.", "show_default": "as stored"},
        ),
    ]
