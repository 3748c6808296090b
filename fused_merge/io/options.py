"""The options of jobs that load a model with Transformers. Nothing here waits for torch."""

from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from fused_merge.options import Option, definition
from fused_merge.per_tensor import parse_dtype
from fused_merge.progress import ProgressOption

if TYPE_CHECKING:
    import torch


def check_dtype(name: str, dtype: Any) -> Any:
    """Return a dtype from its name, or raise ValueError."""
    return parse_dtype(dtype, what=name)


@definition
class LoadingOptions(TypedDict, total=False):
    """What the model is.

    Options:
        trust_remote_code: run Python code that the folder of `tuned` brings with it; only for folders that you trust.
        loader: function that returns the model, as `"module:function"`; called with (folder, device, dtype), it returns
            a model, or (model, tokenizer): for what Transformers does not load by itself. See
            `fused_merge.io.transformers.ModelLoader`.
    """

    trust_remote_code: Annotated[bool, Option(False, cli={})]
    loader: Annotated["str | None", Option(None, cli={"metavar": "MODULE:FUNCTION"})]


@definition
class ModelOptions(LoadingOptions, ProgressOption, total=False):
    """How the model is loaded and watched.

    Options:
        device: where the model runs, such as `"cuda:0"`.
        dtype: dtype of the loaded model, such as `"bfloat16"`; None is that of the files of `tuned`.
    """

    device: Annotated[str, Option("cpu", cli={})]
    dtype: Annotated["torch.dtype | str | None", Option(None, check_dtype, cli={"show_default": "as stored"})]
