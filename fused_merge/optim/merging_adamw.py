"""AdamW that merges every update with the reference delta of supervised fine-tuning, as `torch.optim.Optimizer`s.

The classes keep names, states and options; the arithmetic is `fused_merge.functional.merging_adamw`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import ALONE, Processes
from fused_merge.eager.operands import Operands
from fused_merge.eager.scalars import Hyper
from fused_merge.functional.merging_adamw import PreparedStep, again, prepare, take
from fused_merge.functional.workspace import Workspace
from fused_merge.methods import MergeRule
from fused_merge.optim.binding import Binding, NamedGroup, members_of, processes_of
from fused_merge.optim.gradients import grad_factor, grad_norm, inverse_of, local_gradient, warn_of_no_gradient
from fused_merge.optim.naming import Naming, tensors_of
from fused_merge.optim.options import (
    FIXED,
    GROUP_OPTIONS,
    RUN_OPTIONS,
    MergingOptions,
    RunOptions,
    check_arguments,
    check_dtype,
    check_new_group,
    check_options,
    check_run_options,
    check_sharding,
    opened_delta,
)
from fused_merge.optim.pieces import Piece, Pieces, operands_of
from fused_merge.optim.stand_ins import StandIns
from fused_merge.optim.state import check_delta, check_loadable, complete_groups, complete_state, restore_states
from fused_merge.optim.unchanged import fingerprint
from fused_merge.optim.verification import take_verified, verify_as_the_environment_says
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import dtype_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A reference delta, or the path of a saved one.
DeltaLike: TypeAlias = "ReferenceDelta | str | os.PathLike[str]"
State: TypeAlias = "Mapping[str, Tensor]"


@documented(MergingOptions)
class MergingAdamW(Optimizer):
    """AdamW whose every update u is merged with the reference delta: theta += F(u) ⊕ F(tau).

    tau = theta_SFT - theta_base. A method of `fused_merge.methods.METHODS` fixes F and ⊕:

    - `"ondare"`: F keeps a random share p; theta += (1 - alpha)*F(u) + alpha*F(tau).
    - `"onties"`: F keeps the share p of largest magnitude; of both only what has the elected sign is added.
    - `"onproj"`: F keeps everything, and what goes against tau is projected away.
    - `"onsoft"`: F shrinks every magnitude by the k-th largest.

    Everything else is `torch.optim.AdamW`: with `"ondare"`, `alpha=0` and `reserve_rate=1` the step is the same.
    A step: grad_scale, clip, maximize, project g, moments, u, project u, step-K, F, ⊕, round.
    Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1. How the authors' code differs is in
    docs/explanation/paper-and-code.md.

    State per parameter: `step` (0-d fp32), `exp_avg` and `exp_avg_sq` (shape of the parameter, `state_dtype`; fp64 for
    fp64 parameters), so that a `torch.optim.AdamW` state dict loads as it is; where used also `anchor` (shape of the
    parameter, dtype of its master or its own) with `anchor_decay` (0-d), `master` (fp32) or `master_low` (int16). The
    delta is no part of the state: it is found by name again, and a resumed run whose delta is another one is refused.

    Every option may differ between parameter groups but `impl` and `stats_every`, which are the optimizer's and are not
    saved. `merge_every`, `master`, `seed` and `state_dtype` are fixed once a group has taken a step.

    After a step with a `max_grad_norm`, `grad_norm` holds the norm of all gradients before clipping, 0-d fp64.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs. Unnamed parameters get their names from
            `names_of`, or are matched in order with a delta that knows its model's order
            (`ReferenceDelta.from_models` of two modules) where that leaves no choice.
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        method: a key of the table.
        {options}

    Raises:
        ValueError: for an option out of range or that the method lacks.
        TypeError: for an option that there is not, or a `reference_delta` that is none.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])})
        >>> options = {"method": "ondare", "lr": 0.1, "alpha": 0.5, "reserve_rate": 1.0}
        >>> optimizer = fm.MergingAdamW([("w", w)], reference_delta=delta, **options)
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()  # u = -0.1, and 0.5*u + 0.5*tau is added
        >>> w.detach()
        tensor([ 0.4500, -0.5500])
    """

    # What torch.amp.GradScaler asks for: it then hands over `grad_scale` and `found_inf` instead of unscaling.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: ParamsT, *, reference_delta: DeltaLike, method: str = "ondare", **options: Unpack[MergingOptions]
    ) -> None:
        check_arguments(options)
        own = resolve({name: value for name, value in options.items() if name in RUN_OPTIONS}, RunOptions)
        # What torch refuses as it is, it shall refuse.
        given: Any = params if isinstance(params, Tensor) else list(params)
        if not isinstance(reference_delta, ReferenceDelta):
            with Processes.that_share(tensors_of(list(given))).raising_together():
                reference_delta = opened_delta(reference_delta)
        self.impl: str = own["impl"]
        self.stats_every: int = own["stats_every"]
        self.verify_steps = 0
        self.grad_norm: Tensor | None = None
        self._binding = Binding(reference_delta)
        self._naming = Naming(own["names_of"])
        self._pieces = Pieces()
        self._stand_ins = StandIns()
        # Steps of each group, by its first parameter, since a framework may step groups one by one.
        self._calls = Counter[Tensor]()
        self._warned = False  # of a step without any gradient
        self._last: _Last | None = None
        self._workspace = Workspace()
        self._stats: dict[str, dict[str, float]] = {}
        # By the first parameter, too.
        self._fixed: dict[Tensor, dict[str, Any]] = {}
        defaults = {name: options.get(name, option.default) for name, option in GROUP_OPTIONS.items()}
        super().__init__(given, {**defaults, "method": method})

    @property
    def reference_delta(self) -> ReferenceDelta:
        """The reference delta, as it was given."""
        return self._binding.delta

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the optimizer's and are checked as the constructor's are."""
        self._naming.name(param_group, self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._stand_ins.expect(group["params"])
        try:
            check_run_options(group, self.impl, self.stats_every, self.reference_delta)
            rule = check_new_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["reference"] = {
            "identity": self.reference_delta.identity,
            "path": self.reference_delta.path,
            # What tau is sparsified with; `reserve_rate` of the group may change later.
            "reserve_rate": rule.reserve_rate,
        }

    def bind(self) -> None:
        """Find the delta of every parameter by name and sparsify it; `step` does so when it is needed.

        Logs what steps as plain AdamW, what a dense delta costs, and how much of alpha * tau rounding would lose.
        ValueError names the parameters that the delta lacks or holds in another shape, or says how a sparse delta was
        made if that is not what the group asks for. Nothing is bound then.
        """
        groups = self._named_groups(self._rules())
        self._binding.bind(self._binding.lacking(groups), processes_of(groups))

    def set_pieces(self, pieces: Mapping[Tensor, Sequence[Piece]]) -> None:
        """Say what flat parameters are made of, for frameworks that put several tensors into one vector.

        Args:
            pieces: parameter -> the named tensors that its elements belong to; elements of none are left alone. The
                processes of a group must list the same tensors in the same order, if only without elements.
        """
        self._pieces.tell(pieces)
        self._forget_deltas()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; run with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            ValueError: for what cannot be stepped or a delta that cannot be bound. Nothing has changed then.
            RuntimeError: while `fused_merge.verify` is on, if a kernel differs from the eager code.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_idle():
            return loss
        rules = self._rules()
        # Most steps differ from the last one in nothing but gradients and scalars.
        last, self._last = self._last, None
        seen = last and fingerprint(self.param_groups, rules, self.state, self.impl)
        if last is not None and last.seen == seen:
            batches, processes = [batch.again() for batch in last.batches], ALONE
        else:
            seen, (batches, processes) = None, self._bound_batches(rules)
        inverse_scale = inverse_of(getattr(self, "grad_scale", None))
        norm = self._norm(batches, inverse_scale)
        with processes.raising_together():
            # All groups or none: what a later one cannot do is raised before the first one has stepped.
            prepared = [
                self._prepare(batch, grad_factor(batch.group.options, norm, inverse_scale)) for batch in batches
            ]
        if not self._calls and not self.verify_steps:
            # Not before: the parameters may have moved to another device since the optimizer was made.
            verify_as_the_environment_says(self)
        self.grad_norm = norm
        self._calls.update(group["params"][0] for group in self.param_groups if group["params"])
        for states, _ in prepared:
            for param, state in states:
                self.state[param] |= state
        steps = [step for _, step in prepared]
        gathered = take_verified(steps, self._workspace) if self.verify_steps else take(*steps)
        for step, entries in zip(steps, gathered, strict=True):
            for o, entry in zip(step.operands, entries, strict=True):
                if entry is not None:
                    self._stats[o.name] = {field: float(value) for field, value in entry._asdict().items()}
        self._fix_options()
        self.verify_steps = max(0, self.verify_steps - 1)
        seen = seen or fingerprint(self.param_groups, rules, self.state, self.impl)
        if seen is not None:
            self._last = _Last(seen, [batch.taken(step) for batch, step in zip(batches, steps, strict=True)])
        return loss

    def _is_idle(self) -> bool:
        """Return whether a step is to do nothing, since DeepSpeed takes it only to have states made."""
        params = [param for group in self.param_groups for param in group["params"]]
        return not self._pieces.know_all_of(params) and self._stand_ins.are_idle(params)

    def _rules(self) -> list[MergeRule]:
        """Check the options of every group, and return what they ask for."""
        # ZeroRedundancyOptimizer loads into the groups, past `load_state_dict`.
        check_delta(self.param_groups, self.reference_delta)
        rules = []
        for group in self.param_groups:
            rules.append(check_options(group))
            fixed = next((self._fixed[param] for param in group["params"][:1] if param in self._fixed), {})
            for option, value in fixed.items():
                if group[option] != value:
                    raise ValueError(
                        f"{option} of a group is fixed once it has taken a step: it was {value} and is "
                        f"{group[option]}; set it back, or make a new optimizer"
                    )
        return rules

    def _named_groups(self, rules: Sequence[MergeRule]) -> list[NamedGroup]:
        """Return the parameters of every group by name."""
        for group in self.param_groups:
            check_sharding(group)
        members = members_of(self.param_groups, self._naming, self._pieces, self.reference_delta)
        return [NamedGroup(*each) for each in zip(self.param_groups, rules, members, strict=True)]

    def _bound_batches(self, rules: Sequence[MergeRule]) -> tuple[list[Batch], Processes]:
        """Return the parameters that have a gradient, their deltas bound, and the processes that raise together."""
        groups = self._named_groups(rules)
        wanted = self._binding.lacking(groups)
        # What may fail on one process only is found at the first step, which waits for the host anyway.
        processes = processes_of(groups) if wanted else ALONE
        with processes.raising_together():
            batches = [batch for group in groups if (batch := _with_gradients(group)).grads]
        if not batches and not self._warned and any(group.members for group in groups):
            warn_of_no_gradient()
            self._warned = True
        self._binding.bind(wanted, processes)
        return batches, processes

    def _norm(self, batches: Sequence[Batch], inverse_scale: float | Tensor) -> Tensor | None:
        """Return the norm of all gradients where any group clips them."""
        if all(batch.group.options["max_grad_norm"] is None for batch in batches):
            return None
        grads = [grad for batch in batches for grad in batch.grads]
        groups = [member.pieces[0].shard(member.param).groups for batch in batches for member in batch.group.members]
        return grad_norm(grads, groups, inverse_scale, workspace=self._workspace.part("norm"), impl=self.impl)

    def _prepare(self, batch: Batch, factor: float | Tensor) -> tuple[list[tuple[Tensor, State]], PreparedStep]:
        """Check a step of one group and give it to a backend; nothing is changed.

        With the step come the states of its parameters, which are to be kept when it is taken.
        """
        (options, rule, members), _, last = batch
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        hyper = Hyper(
            **{name: options[name] for name in ("lr", "betas", "eps", "weight_decay", "alpha", "merge_every")},
            grad_factor=factor,
            found_inf=0.0 if found_inf is None else found_inf.double().view(()),
        )
        stats = self.stats_every > 0 and (self._calls[options["params"][0]] + 1) % self.stats_every == 0
        if last is not None and not stats and not self.verify_steps:
            once_more = again(last, batch.grads, hyper)
            if once_more is not None:
                return [], once_more
        states: list[tuple[Tensor, State]] = []
        operands: list[Operands] = []
        for (_, param, pieces), grad in zip(members, batch.grads, strict=True):
            bounds = [self._binding.of(piece.name, param.device) for piece in pieces]
            merged = any(bound.tau is not None for bound in bounds)
            state = complete_state(self.state.get(param, {}), param, options, merged=merged)
            states.append((param, state))
            operands += operands_of(param, grad, pieces, state, bounds)
        step = prepare(
            operands,
            rule=rule,
            hyper=hyper,
            seed=options["seed"],
            stats=stats,
            workspace=self._workspace.part(id(members[0].param)),
            impl=self.impl,
        )
        return states, step

    def merge_stats(self) -> dict[str, dict[str, float]]:
        """Return what the last merge that was looked at did to each tensor.

        Returns:
            Canonical name -> `cosine` of u and tau, `kept_u` and `kept_tau` (shares of elements), `conflicts` (share of
            opposite signs), `norm_u`, `norm_tau`, `norm_merged`, and `lost` and `lost_u` (shares of the kept entries of
            tau and of u whose addition changed no bit of the weight). Tensors without a delta are absent.

        Raises:
            ValueError: without `stats_every`.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])})
            >>> optimizer = fm.OnTIESAdamW([("w", w)], reference_delta=delta, reserve_rate=1.0, stats_every=1)
            >>> w.grad = torch.ones(2)
            >>> optimizer.step()
            >>> optimizer.merge_stats()["w"]["conflicts"]
            0.5
        """
        if not self.stats_every:
            raise ValueError("no statistics are collected; pass stats_every=n to look at every n-th step")
        return dict(self._stats)

    def state_dict(self) -> StateDict:
        """Return what `load_state_dict` takes, made of tensors, numbers and strings; see `torch.optim.Optimizer`."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            # Of a torch.dtype, torch.distributed.checkpoint cannot gather a full state dict.
            group["state_dtype"] = dtype_name(group["state_dtype"])
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`; options that it lacks stay as they are.

        Moments and masters keep the dtype of the options, whatever the parameters' is, and are copied.

        Raises:
            ValueError: if the state dict was saved with another reference delta or method, by an AdamW with amsgrad, by
                an Adam whose weight decay is part of the gradient, or by another kind of optimizer. Nothing has
                changed then.
        """
        before = [dict(group) for group in self.param_groups]
        # Whoever registered hooks may have replaced the state dict: what the last of them left is what is loaded.
        loaded_dicts: list[StateDict] = []

        def check(_: Optimizer, loaded: StateDict) -> None:
            check_loadable(loaded, self.param_groups, self.reference_delta)
            loaded_dicts.append(loaded)

        last = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        complete_groups(self.param_groups, before)
        restore_states(self.state, self.param_groups, loaded_dicts[-1])
        self._forget_deltas()
        self._fixed.clear()
        self._fix_options()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; the delta is found again by the copy's first step."""
        kept = ["impl", "stats_every", "verify_steps", "grad_norm"]
        kept += ["_naming", "_stand_ins", "_calls", "_warned", "_stats", "_fixed"]
        fresh = {"_binding": Binding(self.reference_delta), "_pieces": Pieces(), "_workspace": Workspace()}
        fresh |= {"_last": None}
        return super().__getstate__() | {key: self.__dict__[key] for key in kept} | fresh

    def _forget_deltas(self) -> None:
        """Find every delta again when it is needed."""
        self._binding.clear()
        self._last = None

    def _fix_options(self) -> None:
        """Remember what the states of each group that has any were made with."""
        for group in self.param_groups:
            if any(param in self.state for param in group["params"]):
                self._fixed.setdefault(group["params"][0], {option: group[option] for option in FIXED})


class Batch(NamedTuple):
    """The parameters of a group that have a gradient."""

    group: NamedGroup
    grads: Sequence[Tensor]  # what this process holds of each
    last: PreparedStep | None = None  # the last step, if this one differs from it in gradients and scalars alone

    def taken(self, step: PreparedStep) -> Batch:
        """Return what the next step may begin with when this one was taken; it keeps no gradient alive."""
        kept = step.repeatable()
        read = zip(step.operands, self.group.members, self.grads, strict=False)
        # Not where parts of a parameter are stepped, which count in copies of its count.
        if len(step.operands) > len(self.grads) or any(o.param is not m.param or o.grad is not g for o, m, g in read):
            kept = None
        return self._replace(grads=(), last=kept)

    def again(self) -> Batch:
        """Return this with the gradients that there are now."""
        grads = [member.param.grad for member in self.group.members]
        return self._replace(grads=[grad for grad in grads if grad is not None])


class _Last(NamedTuple):
    """The last step."""

    seen: Sequence[Any]  # all that it depended on but gradients and scalars
    batches: Sequence[Batch]


def _with_gradients(group: NamedGroup) -> Batch:
    """Return the parameters of a group that have a gradient, all of them checked."""
    members = [member for member in group.members if member.param.grad is not None]
    for member in members:
        check_dtype(member.name, member.param, group.options)
    return Batch(group._replace(members=members), [local_gradient(member.name, member.param) for member in members])
