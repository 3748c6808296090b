"""AdamW that merges every update with the reference delta of supervised fine-tuning, as `torch.optim.Optimizer`s.

The classes keep names, states and hyper-parameters; the arithmetic is `fused_merge.functional.merging_adamw_`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from fused_merge import functional
from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.eager.merging_adamw import Anchor
from fused_merge.eager.scalars import Hyper
from fused_merge.functional.backend import check_impl
from fused_merge.names import canonical_name, tensor_id
from fused_merge.optim.binding import Binding
from fused_merge.optim.gradients import grad_factor, grad_norm, inverse_of
from fused_merge.optim.options import (
    FIXED,
    FOREIGN,
    AdamWOptions,
    check_dtype,
    check_options,
    dtype_name,
    dtype_of,
    rule_of,
)
from fused_merge.optim.state import complete_state, state_dtypes
from fused_merge.optim.verification import verified_merging_adamw_, verify_as_the_environment_says

if TYPE_CHECKING:
    from typing_extensions import Unpack

Batch = list[tuple[str, Tensor]]


class MergingAdamW(Optimizer):
    """AdamW whose every update u is merged with the reference delta: theta += F(u) ⊕ F(tau).

    tau = theta_SFT - theta_base. Between them F and ⊕ are a row of `fused_merge.methods.METHODS`:

    - `"ondare"`: F keeps a random share p; theta += (1 - alpha)*F(u) + alpha*F(tau).
    - `"onties"`: F keeps the share p of largest magnitude; of both only what has the elected sign is added.
    - `"onproj"`: F keeps everything, and what goes against tau is projected away.
    - `"onsoft"`: F shrinks every magnitude by the k-th largest.

    Everything else is `torch.optim.AdamW`: with `"ondare"`, `alpha=0` and `reserve_rate=1` the step is the same.
    A step: grad_scale, clip, maximize, project g, moments, u, project u, step-K, F, ⊕, round.
    Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1; docs/numerics.md says where their code departs from it.

    State per parameter: `step` (0-d fp32), `exp_avg` and `exp_avg_sq` (shape of the parameter, `state_dtype`; fp64 for
    fp64 parameters), so that a `torch.optim.AdamW` state dict loads as it is; where used also `anchor` (shape of the
    parameter, dtype of its master or its own) with `anchor_decay` (0-d), `master` (fp32) or `master_low` (int16). The
    delta is no part of the state: it is found by name again, and a resumed run whose delta is another one is refused.

    Every option may differ between parameter groups but `impl` and `stats_every`, which are the optimizer's and are not
    saved. `merge_every`, `master`, `seed` and `state_dtype` are fixed once a group has taken a step.

    After a step with a `max_grad_norm`, `grad_norm` holds the norm of all gradients before clipping, 0-d fp64.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs. Unnamed parameters are matched in
            order with a delta that knows its model's order (`ReferenceDelta.from_models` of two modules).
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        lr: learning rate, a float or a 0-d tensor. At 0 the moments and steps advance and no weight moves.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled; theta is multiplied by 1 - lr*weight_decay before the merge.
        alpha: weight of the delta, in [0, 1]. Not scaled by `lr`: alpha*tau is added at every merge.
        reserve_rate: p, the share that F keeps, in (0, 1]; None is 0.01, or everything for rows whose F drops nothing.
            A dense delta is sparsified once, with the rate that its group had when it was added; later changes act on
            u only.
        merge_every: K; between merges the steps are plain AdamW, and a merge takes all that came since the last one as
            its u (the paper's step-K variant).
        project: `"conflict"` removes from x its component along tau, c*tau with c = <x, tau> / <tau, tau>, where the
            step goes against tau; `"onto"` takes (1 - s)*x + s*c*tau; None projects nothing, or what the row implies.
            Needs the dense delta.
        project_strength: s of `"onto"`, in [0, 1].
        project_over: `"tensor"`, or `"rows"`, one coefficient for each index along dim 0.
        project_on: `"gradient"`, before the moments, or `"update"`, after them: Adam rescales each element, so that
            only the latter keeps the step itself out of conflict.
        max_grad_norm: scale all gradients down to this norm, as `clip_grad_norm_` does, without writing them.
        maximize: step uphill.
        missing: `"error"`, or `"plain"` to step parameters that the delta does not hold as AdamW does.
        state_dtype: of the moments: fp32, bf16 or fp16.
        rounding: of the weights: `"nearest"`, or `"stochastic"`, up or down with the probability of the distance; fp32
            weights too, through the error of the sum.
        master: `"fp32"` keeps an fp32 copy of 16-bit weights, `"split"` the 16 bits that bf16 weights lack.
        stats_every: collect `merge_stats` at every n-th step; 0 never does.
        seed: 64-bit key of the random masks and of stochastic rounding.
        method: a row of the table.
        rescale: divide what a random drop keeps by p (as the authors' experiments did) or do not (equation 4);
            None is True where F is random. Rows without a random drop have no such option.
        vote: `"reference"` elects the sign of u + tau (the authors' code), `"paper"` that of
            (1 - alpha)*u + alpha*tau (equations 5-7); None is `"reference"` where ⊕ is a sign vote.
        impl: `"auto"` (Triton on a GPU; on a CPU eager, above 50 M parameters compiled), `"triton"`, `"compiled"` or
            `"eager"`; all give the same bits. `FUSED_MERGE_IMPL` overrides it.

    Raises:
        ValueError: for an option out of range or that the row lacks.
    """

    # What torch.amp.GradScaler asks for: it then hands over `grad_scale` and `found_inf` instead of unscaling.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: ReferenceDelta | str | os.PathLike[str],
        lr: float | Tensor = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 1e-6,
        reserve_rate: float | None = None,
        merge_every: int = 1,
        project: str | None = None,
        project_strength: float = 1.0,
        project_over: str = "tensor",
        project_on: str = "gradient",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        missing: str = "error",
        state_dtype: torch.dtype = torch.float32,
        rounding: str = "nearest",
        master: str = "none",
        stats_every: int = 0,
        seed: int = 0,
        method: str = "ondare",
        rescale: bool | None = None,
        vote: str | None = None,
        impl: str = "auto",
    ) -> None:
        check_impl(impl)
        if stats_every < 0:
            raise ValueError(f"stats_every must be at least 0, got {stats_every}")
        if not isinstance(reference_delta, ReferenceDelta):
            reference_delta = ReferenceDelta.load(reference_delta)
        self.impl = impl
        self.stats_every = stats_every
        self.verify_steps = 0
        self.grad_norm: Tensor | None = None
        self._binding = Binding(reference_delta)
        self._calls = 0
        self._workspace = functional.Workspace()
        self._stats: dict[str, dict[str, float]] = {}
        self._fixed: dict[int, dict[str, Any]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "reserve_rate": reserve_rate,
            "merge_every": merge_every,
            "project": project,
            "project_strength": project_strength,
            "project_over": project_over,
            "project_on": project_on,
            "max_grad_norm": max_grad_norm,
            "maximize": maximize,
            "missing": missing,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "seed": seed,
            "method": method,
            "rescale": rescale,
            "vote": vote,
        }
        super().__init__(params, defaults)

    @property
    def reference_delta(self) -> ReferenceDelta:
        """The reference delta, as it was given."""
        return self._binding.delta

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the optimizer's and are checked as the constructor's are.

        Raises:
            ValueError: for an option out of range or that the row lacks.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for option in ("impl", "stats_every"):
                if option in group:
                    raise ValueError(f"{option} is an option of the optimizer, not of a parameter group")
            check_options(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group["reference"] = {
            "identity": self.reference_delta.identity,
            "path": self.reference_delta.path,
            # What tau is sparsified with; `reserve_rate` of the group may change later.
            "reserve_rate": rule_of(group).reserve_rate,
        }

    def bind(self) -> None:
        """Find the delta of every parameter by name and sparsify it; `step` does so when it is needed.

        Logs what steps as plain AdamW, what a dense delta costs, and how much of alpha * tau rounding would lose.

        Raises:
            ValueError: naming the parameters that the delta lacks or holds in another shape, or saying how a
                sparse delta was made if that is not what the group asks for. Nothing is bound then.
        """
        self._binding.bind(
            (name, param, group)
            for group, names in zip(self.param_groups, self._binding.names(self.param_groups), strict=True)
            for name, param in zip(names, group["params"], strict=True)
        )

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
            ValueError: for a gradient or an option that cannot be stepped or a delta that cannot be bound. Nothing
                has changed then.
            RuntimeError: while `fused_merge.verify` is on, if a kernel differs from the eager code.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = list(self._batches())
        self.bind()
        inverse_scale = inverse_of(getattr(self, "grad_scale", None))
        clips = any(group["max_grad_norm"] is not None for _, group, _ in batches)
        grads = [param.grad for *_, batch in batches for _, param in batch if param.grad is not None]
        norm = None
        if clips and grads:
            norm = grad_norm(grads, inverse_scale, workspace=self._workspace.part("norm"), impl=self.impl)
        stats = self.stats_every > 0 and (self._calls + 1) % self.stats_every == 0
        prepared = [
            self._prepared(group, batch, grad_factor(group, norm, inverse_scale), stats) for _, group, batch in batches
        ]
        # All groups or none: what a later one cannot do is raised before the first one has stepped.
        for _, lists, options in prepared[1:]:
            functional.merging_adamw_(*lists, **options, dry_run=True)

        if self._calls == 0 and not self.verify_steps:
            # Not before: the parameters may have moved to another device since the optimizer was made.
            verify_as_the_environment_says(self)
        self.grad_norm = norm
        self._calls += 1
        run = verified_merging_adamw_ if self.verify_steps else functional.merging_adamw_
        for (index, _, batch), (states, lists, options) in zip(batches, prepared, strict=True):
            for (_, param), state in zip(batch, states, strict=True):
                self.state[param].update(state)
            workspace = self._workspace.part(f"group {index}")
            for (name, _), entry in zip(batch, run(*lists, **options, workspace=workspace), strict=True):
                if entry is not None:
                    self._stats[name] = {field: float(value) for field, value in entry._asdict().items()}
        self._fix_options()
        self.verify_steps = max(0, self.verify_steps - 1)
        return loss

    def _prepared(
        self, group: dict[str, Any], batch: Batch, factor: float | Tensor, stats: bool
    ) -> tuple[list[dict[str, Tensor]], tuple[list[Any], ...], dict[str, Any]]:
        """Return the states of a group's parameters, completed in copies, and what the functional form takes."""
        params = [param for _, param in batch]
        bound = [self._binding.of(name, param.device) for name, param in batch]
        states: list[dict[str, Tensor]] = [dict(self.state.get(param, {})) for param in params]
        for param, state, delta in zip(params, states, bound, strict=True):
            complete_state(state, param, group, merged=delta.kept is not None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        lists: tuple[list[Any], ...] = (
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            [delta.kept for delta in bound],
        )
        options = {
            "rule": rule_of(group),
            "hyper": Hyper(
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
                group["alpha"],
                grad_factor=factor,
                found_inf=0.0 if found_inf is None else found_inf.double().view(()),
                merge_every=group["merge_every"],
            ),
            "tensor_ids": [tensor_id(name) for name, _ in batch],
            "names": [name for name, _ in batch],
            "seed": group["seed"],
            "full_taus": [delta.full for delta in bound],
            "anchors": [
                Anchor(state["anchor"], state["anchor_decay"]) if "anchor" in state else None for state in states
            ],
            "masters": [state.get("master", state.get("master_low")) for state in states],
            "stats": stats,
            "impl": self.impl,
        }
        return states, lists, options

    def merge_stats(self) -> dict[str, dict[str, float]]:
        """Return what the last merge that was looked at did to each tensor; see `stats_every`.

        Returns:
            Canonical name -> `cosine` of u and tau, `kept_u` and `kept_tau` (shares of elements), `conflicts` (share of
            opposite signs), `norm_u`, `norm_tau`, `norm_merged`, and `lost` (share of the kept entries of tau whose
            addition changed no bit of the weight). Tensors without a delta are absent.

        Raises:
            ValueError: if nothing is collected.
        """
        if not self.stats_every:
            raise ValueError("no statistics are collected; pass stats_every=n to look at every n-th step")
        return self._stats

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
            ValueError: if the state dict was saved with another reference delta, by an AdamW with an option (amsgrad)
                that this one does not have, or by an Adam whose weight decay is part of the gradient. Nothing has
                changed then.
        """
        for group in state_dict["param_groups"]:
            reference = group.get("reference")
            if reference and reference["identity"] != self.reference_delta.identity:
                raise ValueError(
                    f"the state dict was saved with the reference delta {reference['identity'][:12]} (from "
                    f"{reference['path'] or 'memory'}) and this optimizer has {self.reference_delta.identity[:12]}; "
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
        before = [dict(group) for group in self.param_groups]
        # Whoever registered hooks may have replaced the state dict: what the last of them left is what is loaded.
        loaded_dicts = [state_dict]
        last = self.register_load_state_dict_pre_hook(lambda _, loaded: loaded_dicts.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for group, old in zip(self.param_groups, before, strict=True):
            names, loaded = old.get("param_names"), group.get("param_names")
            if names and loaded and list(map(canonical_name, names)) != list(map(canonical_name, loaded)):
                warnings.warn(
                    f"states are loaded by position: {loaded[0]!r}... of the state dict become {names[0]!r}...",
                    stacklevel=2,
                )
            # Names say which delta and which mask belong to a parameter: this run's are the right ones.
            group.update({"param_names": names} if names else {})
            for key, value in old.items():
                group.setdefault(key, value)
            group["state_dtype"] = dtype_of(group["state_dtype"])
            # A full state dict of torch.distributed.checkpoint has it as a list.
            group["betas"] = tuple(group["betas"])
        self._restore_states(loaded_dicts[-1])
        self._binding.clear()
        self._fixed.clear()
        self._fix_options()

    def _restore_states(self, state_dict: StateDict) -> None:
        """Undo what torch does to states on loading: cast them to the parameter's dtype, or share them."""
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        params = ((param, group) for group in self.param_groups for param in group["params"])
        for index, (param, group) in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                dtype = state_dtypes(param, group).get(key)
                if dtype is not None:
                    self.state[param][key] = torch.as_tensor(value).to(param.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep; the delta is found again by the copy's first step."""
        kept = ("impl", "stats_every", "verify_steps", "grad_norm", "_calls", "_stats", "_fixed")
        own = {key: self.__dict__[key] for key in kept}
        return (
            super().__getstate__()
            | own
            | {
                "_binding": Binding(self.reference_delta),
                "_workspace": functional.Workspace(),
            }
        )

    def _batches(self) -> Iterator[tuple[int, dict[str, Any], Batch]]:
        """Yield each group's number, the group, and its named parameters that have a gradient, all of them checked."""
        for index, (group, names) in enumerate(
            zip(self.param_groups, self._binding.names(self.param_groups), strict=True)
        ):
            check_options(group)
            for option, value in self._fixed.get(index, {}).items():
                if group[option] != value:
                    raise ValueError(
                        f"{option} of a group is fixed once it has taken a step: it was {value} and is "
                        f"{group[option]}; set it back, or make a new optimizer"
                    )
            batch = [(n, p) for n, p in zip(names, group["params"], strict=True) if p.grad is not None]
            for name, param in batch:
                check_dtype(name, param, group)
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"the gradient of {name!r} is sparse ({param.grad.layout}); use a dense one, as from "
                        "nn.Embedding(sparse=False)"
                    )
            if batch:
                yield index, group, batch

    def _fix_options(self) -> None:
        """Remember what the states of each group that has any were made with."""
        for index, group in enumerate(self.param_groups):
            if index not in self._fixed and any(param in self.state for param in group["params"]):
                self._fixed[index] = {option: group[option] for option in FIXED}


class OnDAREAdamW(MergingAdamW):
    """AdamW with random drop and linear consensus: theta += (1 - alpha)*F(u) + alpha*F(tau).

    F keeps each element with probability p = `reserve_rate`, independently at every step for u and once for tau.
    Source: Lu et al. 2024 (arXiv 2405.17931), equation 4. Arguments, state and errors: `MergingAdamW`.

    Args:
        params: as in `MergingAdamW`.
        reference_delta: as in `MergingAdamW`.
        reserve_rate: p, in (0, 1].
        rescale: divide (1 - alpha)*F(u) and alpha*F(tau) by p, as in the authors' experiments; False is equation 4
            as printed.
        options: as in `MergingAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: ReferenceDelta | str | os.PathLike[str],
        reserve_rate: float = 0.01,
        rescale: bool = True,
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(
            params,
            reference_delta=reference_delta,
            method="ondare",
            reserve_rate=reserve_rate,
            rescale=rescale,
            **options,
        )


class OnTIESAdamW(MergingAdamW):
    """AdamW with top-p by magnitude and sign consensus.

    F keeps, per tensor, what is at least as large as the k-th largest magnitude, k = max(1, floor(p*n)). The very
    first updates of Adam all have magnitude lr up to rounding, so what the first step keeps is chosen by rounding
    and ties. Source: Lu et al. 2024 (arXiv 2405.17931), equations 5-7. Arguments, state, errors: `MergingAdamW`.

    Args:
        params: as in `MergingAdamW`.
        reference_delta: as in `MergingAdamW`.
        reserve_rate: p, in (0, 1].
        vote: `"reference"`, of u and tau keep what has the sign of u + tau, then take the weighted sum, as in the
            authors' code; `"paper"`, of (1 - alpha)*u and alpha*tau keep the larger where their signs differ, as
            printed. With a small alpha these are two different optimizers.
        options: as in `MergingAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: ReferenceDelta | str | os.PathLike[str],
        reserve_rate: float = 0.01,
        vote: str = "reference",
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(
            params,
            reference_delta=reference_delta,
            method="onties",
            reserve_rate=reserve_rate,
            vote=vote,
            **options,
        )


class OnProjAdamW(MergingAdamW):
    """AdamW whose step is kept out of conflict with the reference delta, or drawn onto it.

    c = <x, tau> / <tau, tau>, over the tensor or over each row, of the gradient or of the update; then
    theta += (1 - alpha)*u + alpha*tau. The removal of conflicting components is that of PCGrad (Yu et al. 2020, arXiv
    2001.06782, algorithm 1); on the flat reference delta it is this library's own. Arguments, state, errors:
    `MergingAdamW`.

    Args:
        params: as in `MergingAdamW`.
        reference_delta: as in `MergingAdamW`; dense.
        options: as in `MergingAdamW`; `project` is `"conflict"` unless it is given.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: ReferenceDelta | str | os.PathLike[str],
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(params, reference_delta=reference_delta, method="onproj", **options)
