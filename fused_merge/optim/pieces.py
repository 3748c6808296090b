"""What a parameter of an optimizer is made of: one named tensor, a shard of one, or pieces of several in one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.distributed import Fragment, fragment_of, is_sharded, local_part
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.operands import Operands, Tau
from fused_merge.eager.shard import Shard
from fused_merge.names import canonical_name, tensor_id


class Piece(NamedTuple):
    """Elements of a parameter that belong to one named tensor."""

    name: str
    local: slice | None = None  # of the flattened parameter; None for all of it
    fragment: Fragment | None = None  # what they are of the named tensor; None for all of it

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of the parameter, or of a tensor of its shape, as this process holds them: a view."""
        if self.local is not None:
            return local_part(tensor).view(-1)[self.local]
        # What is all of a whole tensor is itself.
        return tensor if self.fragment is None else local_part(tensor)

    def shard(self, param: Tensor) -> Shard:
        """Return what these elements are of the named tensor."""
        return Shard.whole(param.shape) if self.fragment is None else self.fragment.shard


class Bound(NamedTuple):
    """The delta of one piece."""

    tau: Tau  # F(tau), sparse where F drops anything; None for what steps as plain AdamW
    tau_dense: Tensor | None = None  # tau itself, where something is projected onto it and F drops anything
    shape: Sequence[int] = ()  # of tau in whole; it may have fewer rows than the parameter

    def to(self, device: torch.device) -> Bound:
        """Return this on `device`; itself if it is there."""
        if self.tau is None or self.tau.device == device:
            return self
        return Bound(self.tau.to(device), None if self.tau_dense is None else self.tau_dense.to(device), self.shape)


class Pieces:
    """The pieces of every parameter: found by looking at it, or told by a framework that makes parameters flat."""

    def __init__(self) -> None:
        self._told: dict[Tensor, Sequence[Piece]] = {}
        self._found: dict[str, tuple[Any, Piece]] = {}

    def tell(self, pieces: Mapping[Tensor, Sequence[Piece]]) -> None:
        """Take over what flat parameters are made of."""
        self._told = {
            param: [piece._replace(name=canonical_name(piece.name)) for piece in own] for param, own in pieces.items()
        }

    def know_all_of(self, params: Sequence[Tensor]) -> bool:
        """Return whether the pieces of all of these parameters were told, which then need no names."""
        return bool(self._told) and all(param in self._told for param in params)

    def of(self, name: str, param: Tensor) -> Sequence[Piece]:
        """Return the pieces of a parameter; ValueError for a DTensor that is cut in a way that cannot be numbered."""
        if param in self._told:
            return self._told[param]
        placed = (param.shape, *((param.device_mesh, param.placements) if is_sharded(param) else ()))  # type: ignore[attr-defined]
        if name not in self._found or self._found[name][0] != placed:
            try:
                self._found[name] = placed, Piece(name, None, fragment_of(param))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return [self._found[name][1]]


def operands_of(
    param: Tensor, grad: Tensor | None, pieces: Sequence[Piece], state: Mapping[str, Tensor], bounds: Sequence[Bound]
) -> list[Operands]:
    """Return what a step of one parameter reads and writes, piece by piece; in two where tau lacks the last rows.

    Args:
        param: the parameter, perhaps sharded.
        grad: its gradient, as this process holds it; None where another optimizer has taken the step.
        pieces: what it is made of.
        state: its state, complete; moments go with the gradient.
        bounds: the delta of each piece.
    """
    tensors = {"grad": grad, "exp_avg": state.get("exp_avg"), "exp_avg_sq": state.get("exp_avg_sq")}
    tensors["master"] = state.get("master", state.get("master_low"))
    operands: list[Operands] = []
    for piece, bound in zip(pieces, bounds, strict=True):
        # All pieces are in the same step, which each of them counts.
        counts = {key: state[key] for key in ("step", "anchor_decay") if key in state}
        if operands:
            counts = {key: count.clone() for key, count in counts.items()}
        own: dict[str, Any] = {field: None if x is None else piece.of(x) for field, x in tensors.items()}
        whole = Operands(
            name=piece.name,
            param=piece.of(param),
            **own,
            step=counts["step"],
            tau=bound.tau,
            tau_dense=bound.tau_dense,
            anchor=Anchor(piece.of(state["anchor"]), counts.get("anchor_decay")) if "anchor" in state else None,
            tensor_id=tensor_id(piece.name),
            shard=piece.shard(param),
        )
        operands += [whole] if bound.tau is None or whole.shard.shape == bound.shape else whole.split(bound.shape)
    return operands
