"""What an optimizer remembers of each parameter: which tensors, of which dtypes, where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_merge.eager.adamw import compute_dtype
from fused_merge.eager.rounding import join


def state_dtypes(param: Tensor, group: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Return the dtype of every state that a parameter may have."""
    compute = compute_dtype(param.dtype)
    moments = compute if compute == torch.float64 else group["state_dtype"]
    return {
        "step": torch.float32,
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "master": torch.float32,
        "master_low": torch.int16,
        "anchor": param.dtype if group["master"] == "none" else torch.float32,
        "anchor_decay": compute,
    }


def complete_state(state: dict[str, Tensor], param: Tensor, group: Mapping[str, Any], *, merged: bool) -> None:
    """Make what the state of a parameter lacks, and move what it has to where the parameter is, in place.

    Args:
        state: of the parameter; new or loaded, possibly from a plain AdamW.
        param: the parameter.
        group: its options.
        merged: whether it has a reference delta, so that step-K needs an anchor.
    """
    dtypes = state_dtypes(param, group)

    def like_param(key: str) -> Tensor:
        return torch.zeros_like(param, dtype=dtypes[key], memory_format=torch.preserve_format)

    for key in ("exp_avg", "exp_avg_sq"):
        if key not in state:
            state[key] = like_param(key)
    if "step" not in state:
        # On a GPU the count too lives beside the parameter, so that no step waits for the host.
        state["step"] = torch.zeros((), dtype=dtypes["step"], device=param.device)
    if group["master"] == "fp32" and "master" not in state:
        state["master"] = like_param("master").copy_(param)
    if group["master"] == "split" and "master_low" not in state:
        state["master_low"] = like_param("master_low")
    if merged and group["merge_every"] > 1 and "anchor" not in state:
        whole = join(param, state["master_low"]) if "master_low" in state else state.get("master", param)
        state["anchor"] = like_param("anchor").copy_(whole)
        state["anchor_decay"] = torch.ones((), dtype=dtypes["anchor_decay"], device=param.device)
    for key, value in state.items():
        if value.device != param.device:
            state[key] = value.to(param.device)
