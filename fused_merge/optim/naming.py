"""How the parameters of an optimizer get their names: given with them, found in the model, or by the delta's order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.names import canonical_name

# The model whose parameters are stepped, or its `named_parameters()`.
NamesOf: TypeAlias = nn.Module | Iterable[tuple[str, Tensor]]

_ADVICE = "pass names_of=model, or model.named_parameters() as the parameters"


class Naming:
    """The names of an optimizer's parameters.

    A parameter that `names_of` holds is called as there, whatever its group says. Its name is also written into
    `group["param_names"]`, where torch keeps names: there it outlives the parameter, which frameworks replace (FSDP2
    through Accelerate does), and is copied and saved with the group. The parameters themselves are not kept alive.
    """

    def __init__(self, names_of: NamesOf | None = None) -> None:
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._given = False
        self.add(names_of)

    def __reduce__(self) -> tuple[type[Naming], tuple[()]]:
        """A copy of the optimizer has other parameters, and their names in its groups."""
        return Naming, ()

    def add(self, names_of: NamesOf | None) -> None:
        """Take over the names of a module or of (name, parameter) pairs; TypeError for anything else."""
        if names_of is None:
            return
        for pair in names_of.named_parameters() if isinstance(names_of, nn.Module) else names_of:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
                raise TypeError(
                    "names_of takes a module or (name, parameter) pairs such as model.named_parameters(), and got "
                    f"a {type(pair).__name__} in place of a pair"
                )
            if pair[1] not in self._names:
                self._names[pair[1]] = str(pair[0])
        self._given = True

    def pairs(self, params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        """Return what `names_of` says of these parameters."""
        return [(self._names[param], param) for param in params if param in self._names]

    def name(self, group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Give a group, which is about to join others, the names of its parameters where `names_of` is given.

        The group may bring `names_of` of its own. Torch refuses named and unnamed groups in one optimizer; a group
        without parameters counts as either. ValueError if `names_of` lacks a parameter.
        """
        if not isinstance(group, dict) or isinstance(group["params"], set):
            return  # Torch says what is wrong with them.
        self.add(group.get("names_of"))
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        params = [each[1] if isinstance(each, tuple) else each for each in group["params"]]
        for i, (given, param) in enumerate(zip(group["params"], params, strict=True)):
            if self._given and not isinstance(given, tuple) and param not in self._names:
                raise ValueError(
                    f"parameter {i} of group {len(groups)}, of shape {tuple(param.shape)}, is no parameter of "
                    "names_of; pass the model whose parameters the optimizer is given, as it is now"
                )
        if self._names and all(param in self._names for param in params):
            group["param_names"] = [self._names[param] for param in params]
        if not params and any("param_names" in each for each in groups):
            group["param_names"] = []
        if "param_names" in group or any(isinstance(each, tuple) for each in group["params"]):
            for each in groups:
                if not each["params"]:
                    each.setdefault("param_names", [])

    def of(self, groups: Sequence[dict[str, Any]], delta: ReferenceDelta) -> list[list[str]]:
        """Return the canonical names of the parameters of each group; unnamed ones are matched with the delta.

        ValueError if unnamed parameters do not match the delta, or could be matched with it in more than one way.
        """
        for group in groups:
            # ZeroRedundancyOptimizer copies the values of groups, names among them, from one process to the others.
            if self._names and all(param in self._names for param in group["params"]):
                group["param_names"] = [self._names[param] for param in group["params"]]
        if any("param_names" in group for group in groups):
            return [[canonical_name(name) for name in group["param_names"]] for group in groups]
        return _by_order([group["params"] for group in groups], delta)


def _by_order(groups: Sequence[Sequence[Tensor]], delta: ReferenceDelta) -> list[list[str]]:
    """Return the delta's names for unnamed parameters.

    Of all that have one shape, the n-th parameter is the n-th tensor of the delta, if nothing else is possible: one
    group holds them all and follows the order of the model, or there is only one.
    """
    if not delta.ordered:
        raise ValueError(
            f"a delta made of files alone does not know its model's order of parameters; {_ADVICE}, or make the delta "
            "with config=, the folder of the model's config.json"
        )
    found = sorted(tuple(param.shape) for group in groups for param in group)
    if found != sorted(tuple(delta.shape(name)) for name in delta.names):
        raise ValueError(
            f"{len(found)} unnamed parameters do not match the {len(delta)} tensors of the reference delta one "
            f"by one in number and shape; {_ADVICE}"
        )
    places: Mapping[tuple[int, ...], list[int]] = defaultdict(list)
    for place, name in enumerate(delta.names):
        places[tuple(delta.shape(name))].append(place)
    holders = {shape: {i for i, g in enumerate(groups) if any(p.shape == shape for p in g)} for shape in places}
    rest = {shape: iter(each) for shape, each in places.items()}
    named = []
    for group in groups:
        order = [next(rest[tuple(param.shape)]) for param in group]
        for param in group:
            shape = tuple(param.shape)
            if len(places[shape]) > 1 and (len(holders[shape]) > 1 or order != sorted(order)):
                raise ValueError(
                    f"{len(places[shape])} unnamed parameters have shape {shape}, and the order of the parameter "
                    f"groups does not tell which is which; {_ADVICE}"
                )
        named.append([delta.names[place] for place in order])
    return named


def tensors_of(params: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of what `torch.optim.Optimizer` takes as parameters, named or not, in groups or not."""
    groups = [each["params"] if isinstance(each, dict) else [each] for each in params]
    flat = [each for group in groups for each in ([group] if isinstance(group, Tensor) else group)]
    return [tensor for each in flat for tensor in (each[1:] if isinstance(each, tuple) else [each])]
