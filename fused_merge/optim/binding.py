"""Which part of the reference delta belongs to which parameter, held as the steps need it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.eager.merge_stats import lost_share
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Tau
from fused_merge.names import canonical_name, some
from fused_merge.optim.options import rule_of

logger = logging.getLogger("fused_merge")

# A merge that loses more of tau than this to rounding is not the merge that was asked for.
_LOST = 0.2


class Bound(NamedTuple):
    """The delta of one parameter."""

    kept: Tau  # F(tau), sparse where F drops anything; None for a parameter that steps as plain AdamW
    full: Tensor | None = None  # tau itself, where something is projected onto it and F drops anything

    def to(self, device: torch.device) -> Bound:
        """Return this on `device`; itself if it is there."""
        if self.kept is None or self.kept.device == device:
            return self
        return Bound(self.kept.to(device), None if self.full is None else self.full.to(device))


class Binding:
    """The deltas of an optimizer's parameters by canonical name, found and sparsified when they are first needed.

    Args:
        delta: the reference delta.
    """

    def __init__(self, delta: ReferenceDelta) -> None:
        self.delta = delta
        self._bound: dict[str, Bound] = {}

    def names(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return the canonical names of the parameters of each group, in its order.

        Raises:
            ValueError: if the parameters have no names and cannot be matched with the delta in order.
        """
        if any("param_names" in group for group in groups):
            return [[canonical_name(name) for name in group["param_names"]] for group in groups]
        return _names_in_order([group["params"] for group in groups], self.delta)

    def bind(self, parameters: Iterable[tuple[str, Tensor, Mapping[str, Any]]]) -> None:
        """Find the delta of every (name, parameter, group) that has none yet.

        Raises:
            ValueError: naming the parameters that share a name or that the delta lacks or holds in another shape, or
                saying how a sparse delta was made if that is not what the group asks for. Nothing is bound then.
        """
        parameters = list(parameters)
        owners: dict[str, Tensor] = {}
        for name, param, _ in parameters:
            if owners.setdefault(name, param) is not param:
                raise ValueError(
                    f"two parameters are called {name!r}, and the reference delta goes by names; "
                    "tell them apart, as by a prefix, or give each model an optimizer of its own"
                )
        wanted = [entry for entry in parameters if entry[0] not in self._bound]
        if not wanted:
            return
        held = set(self.delta.names)
        absent = [name for name, _, group in wanted if name not in held and group["missing"] == "error"]
        if absent:
            raise ValueError(
                f"the reference delta lacks {some(map(repr, absent))}; build it from checkpoints that hold them, or "
                "step them as plain AdamW with missing='plain'"
            )
        for name, param, _ in wanted:
            if name in held and self.delta.shape(name) != param.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(param.shape)} and its reference delta "
                    f"{tuple(self.delta.shape(name))}; train the model that the delta was made of"
                )
        bound = {
            name: self._sparsified(name, group).to(param.device) if name in held else Bound(None)
            for name, param, group in wanted
        }
        self._bound.update(bound)
        _log(bound, wanted)

    def of(self, name: str, device: torch.device) -> Bound:
        """Return the delta of a bound parameter, moved along if the parameter went to another device."""
        self._bound[name] = self._bound[name].to(device)
        return self._bound[name]

    def clear(self) -> None:
        """Forget everything; it is found again when it is needed."""
        self._bound.clear()

    def _sparsified(self, name: str, group: Mapping[str, Any]) -> Bound:
        """Return the delta of one tensor as its group asks for it."""
        rule, stored = rule_of(group), self.delta.sparsity
        if stored is None and (rule.tau_reserve_rate == 1.0 or rule.tau == "none"):
            return Bound(self.delta.tensor(name))
        if stored is not None and rule.project:
            raise ValueError(
                f"project={rule.project!r} needs the whole reference delta and {self.delta.path} holds a sparse one; "
                "use the dense delta"
            )
        if stored is not None and rule.tau == "none":
            raise ValueError(
                f"method {group['method']!r} needs the whole reference delta and {self.delta.path} holds a sparse one; "
                "use the dense delta"
            )
        kept = self.delta.sparse(name, Sparsity(rule.tau, rule.tau_reserve_rate, group["seed"]))
        return Bound(kept, self.delta.tensor(name) if rule.project else None)


def _names_in_order(groups: list[list[Tensor]], delta: ReferenceDelta) -> list[list[str]]:
    """Return the delta's names for unnamed parameters, matched one by one in the order of both."""
    advice = "pass model.named_parameters()"
    if not delta.ordered:
        raise ValueError(f"a delta made of files does not know its model's order of parameters; {advice}")
    shapes = [tuple(param.shape) for group in groups for param in group]
    if shapes != [tuple(delta.shape(name)) for name in delta.names]:
        raise ValueError(
            f"{len(shapes)} unnamed parameters do not match the {len(delta)} tensors of the reference delta one "
            f"by one in number and shape; {advice}"
        )
    names = iter(delta.names)
    return [[next(names) for _ in group] for group in groups]


def _log(bound: Mapping[str, Bound], wanted: Iterable[tuple[str, Tensor, Mapping[str, Any]]]) -> None:
    """Say what steps plainly, what dense deltas cost, and what rounding will lose."""
    plain = [name for name, delta in bound.items() if delta.kept is None]
    if plain:
        logger.warning("stepping as plain AdamW, without a reference delta: %s", some(map(repr, plain), shown=20))
    full = sum(delta.full.nbytes for delta in bound.values() if delta.full is not None)
    if full:
        logger.info("projection keeps the dense reference delta in memory: %.3g MB", full / 1e6)
    lost: dict[str, float] = {}
    for name, param, group in wanted:
        kept = bound[name].kept
        if kept is None or group["rounding"] == "stochastic" or group["alpha"] == 0.0:
            continue
        tau = kept.unpack() if isinstance(kept, SparseTensor) else kept
        rule = rule_of(group)
        stored = param.dtype if group["master"] == "none" else torch.float32
        share = lost_share(param.detach(), tau, group["alpha"] * rule.scale(rule.tau_reserve_rate), stored)
        if share > _LOST:
            lost[name] = float(share)
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        logger.warning(
            "adding alpha * tau will change no bit for more than %.0f %% of the kept entries of %d tensors (%.0f %% of "
            "%r): the weights are too coarse for it; use rounding='stochastic', a larger alpha or, for 16-bit weights, "
            "a master",
            100 * _LOST,
            len(lost),
            100 * lost[worst],
            worst,
        )
