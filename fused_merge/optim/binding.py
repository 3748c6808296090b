"""Which part of the reference delta belongs to which parameter, held as the steps need it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.distributed import Processes
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import RANKED
from fused_merge.io.match import common_prefixes, has_first_rows
from fused_merge.methods import MergeRule
from fused_merge.names import adapted_weight, some
from fused_merge.optim.binding_report import Found, report
from fused_merge.optim.naming import Naming
from fused_merge.optim.pieces import Bound, Piece, Pieces


class Member(NamedTuple):
    """A parameter of a group."""

    name: str  # canonical; used in error messages
    param: Tensor
    pieces: Sequence[Piece]


class NamedGroup(NamedTuple):
    """Parameters of one group, by canonical name."""

    options: dict[str, Any]
    rule: MergeRule
    members: Sequence[Member]


class Wanted(NamedTuple):
    """A piece of a parameter whose delta is to be found."""

    piece: Piece
    param: Tensor
    group: NamedGroup

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.piece.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, in whole."""
        return tuple(self.piece.shard(self.param).shape)


class Binding:
    """The deltas of an optimizer's parameters by canonical name, found and sparsified when they are first needed."""

    def __init__(self, delta: ReferenceDelta) -> None:
        self.delta = delta
        self._bound: dict[str, Bound] = {}

    def lacking(self, groups: Iterable[NamedGroup]) -> list[Wanted]:
        """Return the pieces whose delta was not looked for yet; ValueError if two tensors have one name.

        A frozen parameter needs no delta until it is unfrozen.
        """
        owners: dict[str, Tensor] = {}
        wanted: list[Wanted] = []
        for group in groups:
            for _, param, pieces in group.members:
                if not param.requires_grad and param.grad is None:
                    continue
                for piece in pieces:
                    if owners.setdefault(piece.name, param) is not param:
                        raise ValueError(
                            f"two parameters are called {piece.name!r}; deltas are matched by name: give parameters "
                            "distinct names, for example a prefix, or give each model an optimizer of its own"
                        )
                    if piece.name not in self._bound:
                        wanted.append(Wanted(piece, param, group))
        return wanted

    def bind(self, wanted: Sequence[Wanted], processes: Processes) -> None:
        """Find the delta of each of these, or raise ValueError, on all processes, and bind none.

        Each process reads and keeps what it holds of each tensor.
        """
        with processes.raising_together():
            self._check(wanted)
        identities = processes.gathered(self.delta.identity)
        if len(set(identities)) > 1:
            raise ValueError(
                f"the processes have different reference deltas, {some(identities)}; make them all of the same models"
            )
        held = set(self.delta.names)
        found = [each for each in wanted if each.name in held]
        bound = {each.name: Bound(None) for each in wanted}
        with processes.raising_together():
            for each in found:
                if not self._is_sought_together(each):
                    bound[each.name] = self._sparsified(each, self._read(each)).to(each.param.device)
        for each in found:
            if self._is_sought_together(each):
                # One after the other, so that no more than one of them is dense at a time.
                with processes.raising_together():
                    tau = self._read(each)
                bound[each.name] = self._sparsified(each, tau).to(each.param.device)
        self._bound.update(bound)
        report(
            [
                Found(each.name, each.shape, each.piece.of(each.param.detach()), *each.group[:2], bound[each.name])
                for each in wanted
            ]
        )

    def of(self, name: str, device: torch.device) -> Bound:
        """Return the delta of a bound piece, moved along if the parameter went to another device."""
        self._bound[name] = self._bound[name].to(device)
        return self._bound[name]

    def clear(self) -> None:
        """Forget everything, to find it again when it is needed."""
        self._bound.clear()

    def _check(self, wanted: Sequence[Wanted]) -> None:
        """Raise ValueError if the delta lacks a tensor, holds it in another shape or in a form that does not serve."""
        _refuse_factors(wanted, self.delta)
        held = set(self.delta.names)
        names = [each.name for each in wanted]
        if not self._bound and names and held.isdisjoint(names):
            # Some may lack a delta, and not all of them: nothing would ever be merged.
            raise ValueError(
                f"the reference delta holds none of the parameters of this optimizer: they are "
                f"{some(map(repr, names), shown=1)}, and it has {some(map(repr, self.delta.names), shown=1)}; "
                f"{_naming(names, self.delta)}make the delta of the model that is trained, or use torch.optim.AdamW "
                "where nothing is to be merged"
            )
        absent = [each.name for each in wanted if each.name not in held and each.group.options["missing"] == "error"]
        if absent:
            raise ValueError(
                f"the reference delta lacks {some(map(repr, absent))}; {_naming(absent, self.delta)}build it from "
                "checkpoints that hold them, or by ReferenceDelta.from_models(base_model, sft_model) if their files "
                "name them otherwise, or step them as plain AdamW with missing='plain'"
            )
        for each in wanted:
            if each.name not in held:
                continue
            self._check_form(each)
            tau = tuple(self.delta.shape(each.name))
            if tau == each.shape:
                continue
            shapes = f"{each.name!r} has shape {each.shape} and its reference delta {tau}"
            if not has_first_rows(torch.Size(tau), torch.Size(each.shape)):
                raise ValueError(f"parameter {shapes}; train the model that the delta was made of")
            if each.group.options["missing"] == "error":
                raise ValueError(f"parameter {shapes}; step the rows that it lacks as plain AdamW with missing='plain'")

    def _check_form(self, wanted: Wanted) -> None:
        rule, stored = wanted.group.rule, self.delta.sparsity
        if stored is not None and (rule.project or rule.tau == "none"):
            what = f"project={rule.project!r}" if rule.project else f"method {wanted.group.options['method']!r}"
            raise ValueError(
                f"{what} needs the whole reference delta and {self.delta.path} holds a sparse one; use the dense delta"
            )

    def _is_sought_together(self, wanted: Wanted) -> bool:
        """Return whether F of tau has a threshold that the processes find together."""
        rule, fragment = wanted.group.rule, wanted.piece.fragment
        sparsifies = self.delta.sparsity is None and rule.tau_reserve_rate < 1.0
        return sparsifies and rule.tau in RANKED and fragment is not None and bool(fragment.shard.groups)

    def _read(self, wanted: Wanted) -> Tensor | SparseTensor:
        """Return what a process holds of a tensor of the delta, as it is stored; no collective operation."""
        return self.delta.read(wanted.name, wanted.piece.fragment)

    def _sparsified(self, wanted: Wanted, tau: Tensor | SparseTensor) -> Bound:
        """Return the delta of one tensor as its group asks for it."""
        rule, shape = wanted.group.rule, tuple(self.delta.shape(wanted.name))
        if isinstance(tau, Tensor) and (rule.tau_reserve_rate == 1.0 or rule.tau == "none"):
            return Bound(tau, None, shape)
        sparsity = Sparsity(rule.tau, rule.tau_reserve_rate, wanted.group.options["seed"])
        kept = self.delta.sparsified(wanted.name, tau, sparsity, wanted.piece.fragment)
        return Bound(kept, tau if rule.project and isinstance(tau, Tensor) else None, shape)


def members_of(
    groups: Sequence[dict[str, Any]], naming: Naming, pieces: Pieces, delta: ReferenceDelta
) -> list[list[Member]]:
    """Return the parameters of each group with their names and pieces."""
    flat = pieces.know_all_of([param for group in groups for param in group["params"]])
    names = [[""] * len(group["params"]) for group in groups] if flat else naming.of(groups, delta)
    return [
        [Member(name, param, pieces.of(name, param)) for name, param in zip(own, group["params"], strict=True)]
        for own, group in zip(names, groups, strict=True)
    ]


def processes_of(groups: Sequence[NamedGroup]) -> Processes:
    """Return all processes that share the parameters."""
    members = [member for group in groups for member in group.members]
    shards = (piece.shard(member.param) for member in members for piece in member.pieces)
    return Processes.that_share([m.param for m in members], [group for shard in shards for group in shard.groups])


def _refuse_factors(wanted: Sequence[Wanted], delta: ReferenceDelta) -> None:
    """Raise ValueError for a factor of an adapter if the delta is that of the weight that it adapts."""
    held = set(delta.names)
    for name in (each.name for each in wanted):
        if name not in held and (weight := adapted_weight(name)) in held:
            raise ValueError(
                f"the reference delta is of full weights, such as {weight!r}, and {name!r} is a factor of an adapter, "
                "which tau cannot be added to; make the delta of two adapters, with "
                "ReferenceDelta.from_checkpoints(first_adapter, sft_adapter), or train the weights themselves"
            )


def _naming(absent: Collection[str], delta: ReferenceDelta) -> str:
    """Return how the names could be made equal, as a part of a sentence, or nothing."""
    _, (ours, theirs) = common_prefixes(absent, delta.names)
    if ours:
        return f"pass (name.removeprefix({ours!r}), parameter) for all of model.named_parameters(), or "
    return f"make it with strip_prefix={theirs!r}, or " if theirs else ""
