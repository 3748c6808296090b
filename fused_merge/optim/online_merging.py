"""The updates of any optimizer merged with the reference delta, by hooks around its `step`.

The paper's step-K around somebody else's update; the arithmetic is `fused_merge.functional.merging_adamw`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import ALONE, Processes, is_sharded
from fused_merge.eager.scalars import Hyper
from fused_merge.functional.merging_adamw import PreparedStep, prepare, take
from fused_merge.functional.workspace import Workspace
from fused_merge.names import some
from fused_merge.optim.binding import Binding, Member, NamedGroup, members_of, processes_of
from fused_merge.optim.gradients import warn_of_no_gradient
from fused_merge.optim.merging_adamw import DeltaLike, MergingAdamW
from fused_merge.optim.naming import Naming
from fused_merge.optim.options import (
    MERGE_OPTIONS,
    RUN_OPTIONS,
    OnlineMergingOptions,
    RunOptions,
    check_dtype,
    check_options,
    check_sharding,
    opened_delta,
)
from fused_merge.optim.pieces import Piece, Pieces, operands_of
from fused_merge.optim.stand_ins import StandIns
from fused_merge.optim.state import check_delta
from fused_merge.optim.verification import take_verified, verify_as_the_environment_says
from fused_merge.options import check_known, documented, resolve

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# What states were made with cannot be changed under them.
_FIXED = ("method", "merge_every", "seed")
# What a merge alone does not look at.
_UNUSED = Hyper(lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, alpha=0.0)
# Every optimizer's `step` is wrapped in this code of torch, which calls the hooks.
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__


class _Pending(NamedTuple):
    """A merge that follows the step which is under way."""

    anchors: dict[str, Tensor]  # the weights before this step, where every step is merged
    steps: list[PreparedStep]
    groups: list[str]  # those whose parameters it merges, by their first
    asks_again: bool  # a closure decides in the step which parameters have gradients


@documented(OnlineMergingOptions)
class OnlineMerging:
    """Merges what any `torch.optim.Optimizer` does with the reference delta: theta := anchor + (F(u) ⊕ F(tau)).

    After every K-th step of the optimizer u := theta - anchor is all that it has added to the weights since the last
    merge, weight decay included; it is merged as `MergingAdamW` merges its own, with the same methods and masks, and
    the result is the next anchor. Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1, its step-K variant.

    Around `torch.optim.AdamW` without weight decay it is `MergingAdamW` up to the rounding of theta - anchor.

    What an optimizer steps is what is merged: fp32 masters where a framework hands it those, as ZeRO does. A parameter
    without a gradient is not merged. Steps are counted for each parameter; a step at lr = 0, or one that an overflow of
    scaled gradients has stopped, is neither counted nor merged. What else changes the weights between two merges, other
    than before the first step, becomes part of u.

    Bytes: with K = 1 a step copies the weights (fp32: reads 4, writes 4 for each) and the merge reads theta 4, the copy
    4 and tau and writes theta 4: 20 and tau beside what the optimizer moves, and 4 of memory within the step. With
    K > 1 the anchor stays, 4 of memory, and a merge moves 16 and tau, once in K steps. The fused step of
    `MergingAdamW` moves no more than AdamW and tau, and projects gradients too.

    `options` holds the options and may be changed between steps, but for `method`, `merge_every` and `seed`, which are
    fixed by the first one. Pickle this object and not the optimizer alone, which loses its hooks.

    Args:
        optimizer: any but ours, which merge themselves; one that wraps another is unwrapped. Mutated: it gets hooks.
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        method: a key of `fused_merge.methods.METHODS`.
        {options}

    Raises:
        TypeError: for what is no optimizer or merges itself, and for an option that there is not.
        ValueError: for an option out of range or that the method lacks, and for an optimizer that is merged already.
            `optimizer.step` raises for a delta that cannot be bound, before anything has moved.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])})
        >>> optimizer = torch.optim.SGD([("w", w)], lr=0.1)
        >>> merging = fm.OnlineMerging(optimizer, reference_delta=delta, alpha=0.5, reserve_rate=1.0)
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()  # u = -0.1, and 0.5*u + 0.5*tau is what is added
        >>> w.detach()
        tensor([ 0.4500, -0.5500])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        reference_delta: DeltaLike,
        method: str = "ondare",
        **options: Unpack[OnlineMergingOptions],
    ) -> None:
        check_known(options, MERGE_OPTIONS | RUN_OPTIONS)
        own = resolve({name: value for name, value in options.items() if name in RUN_OPTIONS}, RunOptions)
        self.optimizer = _hookable(optimizer)
        if not isinstance(reference_delta, ReferenceDelta):
            with Processes.that_share([p for g in self.param_groups for p in g["params"]]).raising_together():
                reference_delta = opened_delta(reference_delta)
        self.impl: str = own["impl"]
        self.stats_every: int = own["stats_every"]
        self.verify_steps = 0
        self.options: dict[str, Any] = {name: options.get(name, o.default) for name, o in MERGE_OPTIONS.items()}
        self.options |= {"method": method, "master": "none"}
        self.options["reference"] = {
            "identity": reference_delta.identity,
            "path": reference_delta.path,
            # What tau is sparsified with; `reserve_rate` may change later.
            "reserve_rate": check_options(self.options, MERGE_OPTIONS).reserve_rate,
        }
        self._binding = Binding(reference_delta)
        self._naming = Naming(own["names_of"])
        self._pieces = Pieces()
        self._workspace = Workspace()
        self._state: dict[str, dict[str, Tensor]] = {}
        self._fixed: dict[str, Any] = {}
        self._stats: dict[str, dict[str, float]] = {}
        self._stand_ins = StandIns()
        self._stand_ins.expect([param for group in self.param_groups for param in group["params"]])
        # Steps of each group, by its first parameter, since a framework may step groups one by one.
        self._calls = Counter[str]()
        self._warned = False  # of a step without any gradient
        self._pending: _Pending | None = None
        self._hooks: list[RemovableHandle] = []
        self._hook()

    @property
    def reference_delta(self) -> ReferenceDelta:
        """The reference delta, as it was given."""
        return self._binding.delta

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def remove(self) -> None:
        """Leave the optimizer as it was; weights stay as they are. With `with` it happens at the end of the block.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> w = torch.nn.Parameter(torch.zeros(1))
            >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(1)}, {"w": torch.ones(1)})
            >>> optimizer = torch.optim.SGD([("w", w)], lr=0.1)
            >>> fm.OnlineMerging(optimizer, reference_delta=delta).remove()
            >>> w.grad = torch.ones(1)
            >>> optimizer.step()  # of SGD alone
            >>> w.detach()
            tensor([-0.1000])
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._pending = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def bind(self) -> None:
        """Find the delta of every parameter by name and sparsify it, as the first step would; see `MergingAdamW`."""
        groups = self._named_groups()
        self._binding.bind(self._binding.lacking(groups), processes_of(groups))

    def set_pieces(self, pieces: Mapping[Tensor, Sequence[Piece]]) -> None:
        """Say what flat parameters are made of, as `MergingAdamW.set_pieces`."""
        self._pieces.tell(pieces)
        self._binding.clear()

    def merge_stats(self) -> dict[str, dict[str, float]]:
        """Return what `MergingAdamW.merge_stats` does."""
        if not self.stats_every:
            raise ValueError("no statistics are collected; pass stats_every=n to look at every n-th step")
        return dict(self._stats)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes: options, which delta it is, and by name `step` and the `anchor`.

        With K = 1 it holds no tensors. Otherwise an anchor has the shape and dtype of its parameter, and is a DTensor
        where that is one.
        """
        state = {
            name: {"step": int(own["step"])} | {key: x for key, x in own.items() if key != "step"}
            for name, own in self._state.items()
        }
        return {"options": {name: value for name, value in self.options.items() if name != "master"}, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another run has ended; load the optimizer and the weights too. Options are those that were saved.

        Raises:
            ValueError: if it was saved with another reference delta or method, or for other parameters. Nothing has
                changed then.
        """
        loaded: dict[str, Any] = {**self.options, **state_dict["options"]}
        check_delta([loaded], self.reference_delta)
        if loaded["method"] != self.options["method"]:
            raise ValueError(
                f"the state dict was saved with method {loaded['method']!r} and this is {self.options['method']!r}; "
                "resume with the method that the run began with"
            )
        check_options(loaded, MERGE_OPTIONS)
        members = {_key(member): member.param for group in self._named_groups() for member in group.members}
        if foreign := state_dict["state"].keys() - members.keys():
            raise ValueError(f"the state dict is of {some(sorted(foreign))}, which this optimizer does not step")
        state: dict[str, dict[str, Tensor]] = {}
        for name, own in state_dict["state"].items():
            param = members[name]
            state[name] = {"step": torch.tensor(float(own["step"]), device=param.device)}
            if "anchor" in own:
                anchor = own["anchor"]
                if anchor.shape != param.shape or is_sharded(anchor) != is_sharded(param):
                    raise ValueError(
                        f"the anchor of {name} has shape {tuple(anchor.shape)} and the parameter {tuple(param.shape)}, "
                        "or only one of the two is sharded; resume with the sharding that the run was saved with"
                    )
                state[name]["anchor"] = anchor.detach().to(param.device, param.dtype, copy=True)
        self.options, self._state, self._fixed = loaded, state, {}
        self._binding.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; the delta is found again by the copy's first step."""
        fresh = {"_binding": Binding(self.reference_delta), "_workspace": Workspace(), "_pending": None}
        names = self._naming.pairs([param for group in self.param_groups for param in group["params"]])
        return self.__dict__ | fresh | {"_hooks": bool(self._hooks), "_naming": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_hooks": [], "_naming": Naming(state["_naming"] or None)}
        if state["_hooks"]:
            self._hook()

    def _hook(self) -> None:
        if merging_around(self.optimizer) is not None:
            raise ValueError("this optimizer is merged already; call remove() of the OnlineMerging around it first")
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: find all that could go wrong in the merge after it, and keep the weights."""
        if _is_inner_step(optimizer):
            return
        # One may be left of a step that has failed.
        self._pending = None
        params = [param for group in self.param_groups for param in group["params"]]
        if not self._pieces.know_all_of(params) and self._stand_ins.are_idle(params):
            # DeepSpeed takes this step only to have states made.
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._pending = self._prepare_all(None, asks_again=closure is not None)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After a step: merge what it has done."""
        pending = self._pending
        if pending is None or _is_inner_step(optimizer):
            return
        self._pending = None
        if pending.asks_again:
            pending = self._prepare_all(pending.anchors, asks_again=False)
        if not self._warned and all(p.grad is None for group in self.param_groups for p in group["params"]):
            warn_of_no_gradient()
            self._warned = True
        if not self._calls and not self.verify_steps:
            verify_as_the_environment_says(self)
        self._calls.update(pending.groups)
        steps, verified = pending.steps, self.verify_steps > 0
        gathered = take_verified(steps, self._workspace) if verified else take(*steps)
        for step, entries in zip(steps, gathered, strict=True):
            for o, entry in zip(step.operands, entries, strict=True):
                if entry is not None:
                    self._stats[o.name] = {field: float(value) for field, value in entry._asdict().items()}
        self.verify_steps = max(0, self.verify_steps - 1)

    def _named_groups(self) -> list[NamedGroup]:
        """Return the parameters of every group by name, with options that are checked."""
        rule = check_options(self.options, MERGE_OPTIONS)
        for option, value in self._fixed.items():
            if self.options[option] != value:
                raise ValueError(
                    f"{option} is fixed once a step was merged: it was {value!r} and is {self.options[option]!r}; set "
                    "it back, or remove() this and begin anew"
                )
        # Copies: names are written into groups, and these are the optimizer's.
        groups = [dict(group) for group in self.param_groups]
        for group in groups:
            check_sharding(group)
            names = group.get("param_names", group["params"])
            if len(names) != len(group["params"]) and not self._pieces.know_all_of(group["params"]):
                raise ValueError(
                    f"the optimizer steps {len(group['params'])} tensors under the names of {len(names)}: a framework "
                    "has put others in the place of its parameters; say what these are made of with set_pieces(), as "
                    "fused_merge.bind_deepspeed(engine) does"
                )
        named = members_of(groups, self._naming, self._pieces, self.reference_delta)
        return [
            NamedGroup(self.options | {"lr": group.get("lr")}, rule, members)
            for group, members in zip(groups, named, strict=True)
        ]

    def _prepare_all(self, anchors: dict[str, Tensor] | None, *, asks_again: bool) -> _Pending:
        """Check the merge after the step that is under way, and give it to a backend; no weight is changed.

        Args:
            anchors: the weights before the step, if they were kept already.
            asks_again: take parameters without a gradient too, since the step itself will compute it.
        """
        groups = self._named_groups()
        wanted = self._binding.lacking(groups)
        # What may fail on one process only is found at the first step, which waits for the host anyway.
        processes = processes_of(groups) if wanted else ALONE
        with processes.raising_together():
            for group in groups:
                for member in group.members:
                    check_dtype(member.name, member.param, group.options)
        self._binding.bind(wanted, processes)
        kept: dict[str, Tensor] = {} if anchors is None else anchors
        state: dict[str, dict[str, Tensor]] = {}
        with processes.raising_together():
            steps = [self._prepare(group, kept, state, asks_again) for group in groups]
        self._state |= state
        self._fixed = {option: self.options[option] for option in _FIXED}
        found = {_key(group.members[0]): step for group, step in zip(groups, steps, strict=True) if step is not None}
        return _Pending(kept, list(found.values()), list(found), asks_again)

    def _prepare(
        self, group: NamedGroup, anchors: dict[str, Tensor], states: dict[str, dict[str, Tensor]], every: bool
    ) -> PreparedStep | None:
        """Prepare the merge of one group; None where nothing moves. Adds to `anchors`, and to `states` what is new."""
        options, rule, members = group
        stopped = self._stopped(options["lr"], members)
        if stopped is True:
            return None
        once = options["merge_every"] == 1
        operands = []
        for member in members:
            name, param, pieces = _key(member), member.param, member.pieces
            bounds = [self._binding.of(piece.name, param.device) for piece in pieces]
            if (param.grad is None and not every) or all(bound.tau is None for bound in bounds):
                continue
            state = {key: x.to(param.device) for key, x in self._state.get(name, {}).items()}
            state = {"step": torch.zeros((), device=param.device)} | state
            if once:
                state.pop("anchor", None)
            elif "anchor" not in state:
                state["anchor"] = param.detach().clone()
            states[name] = dict(state)
            if once:
                state["anchor"] = anchors[name] = anchors.get(name, param.detach().clone())
            operands += [
                o._replace(anchor=o.anchor and o.anchor._replace(kept=not once))
                for o in operands_of(param, None, pieces, state, bounds)
                if o.tau is not None
            ]
        if not operands:
            return None
        return prepare(
            operands,
            rule=rule,
            hyper=_UNUSED._replace(alpha=options["alpha"], found_inf=stopped, merge_every=options["merge_every"]),
            seed=options["seed"],
            stats=self.stats_every > 0 and (self._calls[_key(members[0])] + 1) % self.stats_every == 0,
            workspace=self._workspace.part(_key(members[0])),
            impl=self.impl,
        )

    def _stopped(self, lr: float | Tensor | None, members: Sequence[Member]) -> bool | float | Tensor:
        """Return whether the step moves nothing: True, 0.0, or a tensor on a device that the host does not wait for."""
        stopped: list[Tensor] = []
        found_inf = getattr(self.optimizer, "found_inf", None)
        for flag in (None if lr is None else lr == 0, None if found_inf is None else found_inf != 0):
            if isinstance(flag, Tensor) and flag.device.type != "cpu":
                stopped.append(flag.to(members[0].param.device).double().view(()))
            elif flag is not None and bool(flag):
                return True
        return torch.stack(stopped).sum() if stopped else 0.0


def merging_around(optimizer: Any) -> OnlineMerging | None:
    """Return what merges the updates of an optimizer, or of the one that it wraps, if anything."""
    hooks = getattr(innermost(optimizer), "_optimizer_step_post_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, OnlineMerging)), None)


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that has hooks, within wrappers such as those of Accelerate and DeepSpeed."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _hookable(optimizer: Any) -> Optimizer:
    """Return the optimizer to go around; TypeError if there is none."""
    found = innermost(optimizer)
    if isinstance(found, MergingAdamW):
        raise TypeError(
            f"{type(found).__name__} merges its own updates; use it alone, or OnlineMerging around another one"
        )
    if not isinstance(found, Optimizer):
        raise TypeError(f"OnlineMerging goes around a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    return found


def _key(member: Member) -> str:
    """Return what the state of a parameter is kept under: its name, or that of the first tensor in it."""
    return member.name or next((piece.name for piece in member.pieces), "")


def _is_inner_step(optimizer: Optimizer) -> bool:
    """Return whether the step that calls a hook was called by another of the same optimizer, as by `super().step()`.

    Torch wraps the `step` of every class of which there was an object, each of which calls the hooks.
    """
    frame, depth = sys._getframe(), 0
    while frame is not None and depth < 2:
        depth += frame.f_code is _HOOKED and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1
