"""What an optimizer remembers of each parameter, made, completed and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import local_part
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.rounding import join
from fused_merge.optim.options import FOREIGN


def state_dtypes(param: Tensor, options: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Return the dtype of every state that a parameter may have."""
    compute = compute_dtype(param.dtype)
    moments = compute if compute == torch.float64 else options["state_dtype"]
    return {
        "step": torch.float32,
        "exp_avg": moments,
        "exp_avg_sq": moments,
        "master": torch.float32,
        "master_low": torch.int16,
        "anchor": param.dtype if options["master"] == "none" else torch.float32,
        "anchor_decay": compute,
    }


def complete_state(
    state: Mapping[str, Tensor], param: Tensor, options: Mapping[str, Any], *, merged: bool
) -> Mapping[str, Tensor]:
    """Return the state of a parameter with all that a step needs, beside the parameter; itself if it is complete.

    What there is may be nothing, or loaded from a plain AdamW. What is `merged` needs an anchor for step-K.
    """
    master = {"fp32": "master", "split": "master_low"}.get(options["master"])
    anchored = merged and options["merge_every"] > 1
    needed = ["step", "exp_avg", "exp_avg_sq", *([master] if master else []), *(["anchor"] if anchored else [])]
    device = param.device
    if all(key in state for key in needed) and all(tensor.device == device for tensor in state.values()):
        return state
    dtypes = state_dtypes(param, options)

    def like_param(key: str) -> Tensor:
        return torch.zeros_like(param, dtype=dtypes[key], memory_format=torch.preserve_format)

    complete = {key: tensor.to(device) for key, tensor in state.items()}
    for key in needed:
        if key == "step" and key not in complete:
            # On a GPU the count too lives beside the parameter, so that no step waits for the host.
            complete[key] = torch.zeros((), dtype=dtypes[key], device=device)
        elif key not in complete and key != "anchor":
            # Moments start at 0, and what bf16 weights lack of fp32 is nothing yet.
            complete[key] = like_param(key)
            if key == "master":
                local_part(complete[key]).copy_(local_part(param))
    if anchored and "anchor" not in complete:
        low, start = complete.get("master_low"), local_part(complete.get("master", param))
        complete["anchor"] = like_param("anchor")
        local_part(complete["anchor"]).copy_(start if low is None else join(start, local_part(low)))
        complete["anchor_decay"] = torch.ones((), dtype=dtypes["anchor_decay"], device=device)
    return complete


def check_loadable(state_dict: StateDict, delta: ReferenceDelta) -> None:
    """Raise ValueError if a state dict belongs to another reference delta or to another kind of Adam."""
    for group in state_dict["param_groups"]:
        reference = group.get("reference")
        if reference and reference["identity"] != delta.identity:
            raise ValueError(
                f"the state dict was saved with the reference delta {reference['identity'][:12]} (from "
                f"{reference['path'] or 'memory'}) and this optimizer has {delta.identity[:12]}; "
                "resume with the delta that the run began with"
            )
        for option in FOREIGN:
            if group.get(option):
                raise ValueError(f"the state dict was saved with {option}=True, which this optimizer lacks")
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            raise ValueError(
                "the state dict was saved by torch.optim.Adam, which adds weight_decay to the gradient; set "
                "it to 0 in the param_groups of the state dict and give this optimizer one of its own"
            )


def restore_states(
    state: Mapping[Tensor, dict[str, Any]], param_groups: list[dict[str, Any]], state_dict: StateDict
) -> None:
    """Undo what torch does to states on loading: cast them to the dtype of the parameter, or share them."""
    saved = (index for group in state_dict["param_groups"] for index in group["params"])
    params = ((param, group) for group in param_groups for param in group["params"])
    for index, (param, group) in zip(saved, params, strict=True):
        dtypes = state_dtypes(param, group)
        for key, value in state_dict["state"].get(index, {}).items():
            if key in dtypes:
                state[param][key] = torch.as_tensor(value).to(param.device, dtypes[key], copy=True)
