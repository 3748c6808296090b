"""What an optimizer remembers of each parameter, made, completed and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import local_part
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.rounding import join
from fused_merge.names import canonical_name, some
from fused_merge.optim.options import GROUP_OPTIONS


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


# What AdamW keeps of a parameter, and what a merging optimizer may keep besides.
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_KNOWN = (*_ADAMW, "master", "master_low", "anchor", "anchor_decay")


def check_delta(param_groups: Sequence[Mapping[str, Any]], delta: ReferenceDelta) -> None:
    """Raise ValueError if groups were saved with another delta."""
    for group in param_groups:
        reference = group.get("reference")
        if reference and reference["identity"] != delta.identity:
            raise ValueError(
                f"the state dict was saved with the reference delta {reference['identity'][:12]} (from "
                f"{reference['path'] or 'memory'}) and this optimizer has {delta.identity[:12]}; "
                "resume with the delta that the run began with"
            )


def check_loadable(state_dict: StateDict, param_groups: Sequence[Mapping[str, Any]], delta: ReferenceDelta) -> None:
    """Raise ValueError if a state dict belongs to another delta or method, or is not that of an AdamW."""
    kind = "the state dict was saved by another kind of optimizer"
    way_out = "load one of this optimizer or of torch.optim.AdamW"
    for index, state in state_dict["state"].items():
        if state and not (all(key in state for key in _ADAMW) and all(key in _KNOWN for key in state)):
            raise ValueError(
                f"{kind}: it holds {some(map(repr, state), shown=len(_KNOWN))} of parameter {index!r}, and not "
                f"{', '.join(map(repr, _ADAMW))}; {way_out}"
            )
    check_delta(state_dict["param_groups"], delta)
    for group, own in zip(state_dict["param_groups"], param_groups, strict=False):
        if "lr" in group and "betas" not in group:
            raise ValueError(f"{kind}: its parameter groups have a learning rate and no betas; {way_out}")
        if (method := group.get("method", own["method"])) != own["method"]:
            raise ValueError(
                f"the state dict was saved with method {method!r} and this optimizer has {own['method']!r}; "
                "resume with the method that the run began with"
            )
        if "state_dtype" in group:
            GROUP_OPTIONS["state_dtype"].check("state_dtype", group["state_dtype"])
        if group.get("amsgrad"):
            raise ValueError("the state dict was saved with amsgrad=True, which this optimizer lacks")
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            raise ValueError(
                "the state dict was saved by torch.optim.Adam, which adds weight_decay to the gradient; set "
                "it to 0 in the param_groups of the state dict and give this optimizer one of its own"
            )


def complete_groups(param_groups: Sequence[dict[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    """Give groups that were loaded the names and the options which they had before and the state dict lacks."""
    for group, old in zip(param_groups, before, strict=True):
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            # ZeroRedundancyOptimizer saves those of the process that saves.
            del group["param_names"]
        names, loaded = old.get("param_names"), group.get("param_names")
        if names and loaded and list(map(canonical_name, names)) != list(map(canonical_name, loaded)):
            warnings.warn(
                f"states are loaded by position: {loaded[0]!r}... of the state dict become {names[0]!r}...",
                stacklevel=3,
            )
        # Names say which delta and which mask belong to a parameter: this run's are the right ones.
        group.update({"param_names": names} if names else {})
        for key, value in old.items():
            group.setdefault(key, value)
        group["state_dtype"] = GROUP_OPTIONS["state_dtype"].check("state_dtype", group["state_dtype"])
        # A full state dict of torch.distributed.checkpoint has it as a list.
        group["betas"] = tuple(group["betas"])


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
