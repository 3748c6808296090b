"""Which part of the reference delta belongs to which parameter, held as the steps need it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.eager.operands import Tau
from fused_merge.io.match import common_prefixes, has_first_rows
from fused_merge.methods import MergeRule
from fused_merge.names import canonical_name, some
from fused_merge.optim.binding_report import Found, report


class Bound(NamedTuple):
    """The delta of one parameter."""

    tau: Tau  # F(tau), sparse where F drops anything; None for a parameter that steps as plain AdamW
    tau_dense: Tensor | None = None  # tau itself, where something is projected onto it and F drops anything

    def to(self, device: torch.device) -> Bound:
        """Return this on `device`; itself if it is there."""
        if self.tau is None or self.tau.device == device:
            return self
        return Bound(self.tau.to(device), None if self.tau_dense is None else self.tau_dense.to(device))


class NamedGroup(NamedTuple):
    """Parameters of one group, by canonical name."""

    number: int  # of the group
    options: dict[str, Any]
    rule: MergeRule
    names: list[str]
    params: list[Tensor]


class Binding:
    """The deltas of an optimizer's parameters by canonical name, found and sparsified when they are first needed."""

    def __init__(self, delta: ReferenceDelta) -> None:
        self.delta = delta
        self._bound: dict[str, Bound] = {}

    def names(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Return the canonical names of the parameters of each group; unnamed ones are matched with the delta."""
        if any("param_names" in group for group in groups):
            return [[canonical_name(name) for name in group["param_names"]] for group in groups]
        return _names_in_order([group["params"] for group in groups], self.delta)

    def bind(self, groups: Iterable[NamedGroup]) -> None:
        """Find the delta of every parameter that has none yet, or raise ValueError and bind none."""
        owners: dict[str, Tensor] = {}
        wanted: list[Wanted] = []
        for group in groups:
            for name, param in zip(group.names, group.params, strict=True):
                if owners.setdefault(name, param) is not param:
                    raise ValueError(
                        f"two parameters are called {name!r}; deltas are matched by name: give the parameters distinct "
                        "names, for example a prefix, or give each model an optimizer of its own"
                    )
                if name not in self._bound:
                    wanted.append(Wanted(name, param, group))
        if not wanted:
            return
        held = set(self.delta.names)
        absent = [each.name for each in wanted if each.name not in held and each.group.options["missing"] == "error"]
        if absent:
            raise ValueError(
                f"the reference delta lacks {some(map(repr, absent))}; {_naming(absent, self.delta)}build it from "
                "checkpoints that hold them, or by ReferenceDelta.from_models(base_model, sft_model) if their files "
                "name them otherwise, or step them as plain AdamW with missing='plain'"
            )
        for name, param, group in wanted:
            if name not in held or self.delta.shape(name) == param.shape:
                continue
            shapes = f"{name!r} has shape {tuple(param.shape)} and its reference delta {tuple(self.delta.shape(name))}"
            if not has_first_rows(self.delta.shape(name), param.shape):
                raise ValueError(f"parameter {shapes}; train the model that the delta was made of")
            if group.options["missing"] == "error":
                raise ValueError(f"parameter {shapes}; step the rows that it lacks as plain AdamW with missing='plain'")
        bound = {
            name: self._sparsified(name, group).to(param.device) if name in held else Bound(None)
            for name, param, group in wanted
        }
        self._bound.update(bound)
        report([Found(name, param, group.options, group.rule, *bound[name]) for name, param, group in wanted])

    def of(self, name: str, device: torch.device) -> Bound:
        """Return the delta of a bound parameter, moved along if the parameter went to another device."""
        self._bound[name] = self._bound[name].to(device)
        return self._bound[name]

    def clear(self) -> None:
        """Forget everything, to find it again when it is needed."""
        self._bound.clear()

    def _sparsified(self, name: str, group: NamedGroup) -> Bound:
        """Return the delta of one tensor as its group asks for it."""
        rule, stored = group.rule, self.delta.sparsity
        if stored is None and (rule.tau_reserve_rate == 1.0 or rule.tau == "none"):
            return Bound(self.delta.tensor(name))
        if stored is not None and (rule.project or rule.tau == "none"):
            what = f"project={rule.project!r}" if rule.project else f"method {group.options['method']!r}"
            raise ValueError(
                f"{what} needs the whole reference delta and {self.delta.path} holds a sparse one; use the dense delta"
            )
        tau = self.delta.sparse(name, Sparsity(rule.tau, rule.tau_reserve_rate, group.options["seed"]))
        return Bound(tau, self.delta.tensor(name) if rule.project else None)


def _naming(absent: Collection[str], delta: ReferenceDelta) -> str:
    """Return how the names could be made equal, as a part of a sentence, or nothing."""
    _, (ours, theirs) = common_prefixes(absent, delta.names)
    if ours:
        return f"pass (name.removeprefix({ours!r}), parameter) for all of model.named_parameters(), or "
    return f"make it with strip_prefix={theirs!r}, or " if theirs else ""


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


class Wanted(NamedTuple):
    """A parameter whose delta is to be found."""

    name: str
    param: Tensor
    group: NamedGroup
