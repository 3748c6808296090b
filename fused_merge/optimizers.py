"""AdamW that merges every update with the reference delta of supervised fine-tuning, as `torch.optim.Optimizer`s.

The classes keep names, states and hyper-parameters; the arithmetic is `fused_merge.functional.merging_adamw_`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from fused_merge import functional
from fused_merge.backend import check_impl
from fused_merge.eager.adamw import compute_dtype
from fused_merge.methods import merge_rule
from fused_merge.names import canonical_name, some, tensor_id
from fused_merge.reference_delta import ReferenceDelta, Sparsity

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("fused_merge")

_MISSING = ("error", "plain")
# Hyper-parameters of torch.optim.AdamW that change its result and that a loaded group may carry.
_FOREIGN = ("amsgrad", "maximize")


class AdamWOptions(TypedDict, total=False):
    """The options that every merging optimizer has; `MergingAdamW` says what they mean."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    alpha: float
    reserve_rate: float
    missing: str
    seed: int
    impl: str


class MergingAdamW(Optimizer):
    """AdamW whose every update u is merged with the reference delta: theta += F(u) ⊕ F(tau).

    tau = theta_SFT - theta_base. Between them F and ⊕ are a row of `fused_merge.methods.METHODS`:

    - `"ondare"`: F keeps a random share p; theta += (1 - alpha)*F(u) + alpha*F(tau).
    - `"onties"`: F keeps the share p of largest magnitude; of both only what has the elected sign is added.

    Everything else is `torch.optim.AdamW`: with `"ondare"`, `alpha=0` and `reserve_rate=1` the step is the same.
    Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1; `docs` of the authors' departures in the README.

    State per parameter: `step` (0-d fp32), `exp_avg` and `exp_avg_sq` (shape of the parameter, fp32; fp64 for
    fp64 parameters), so that a `torch.optim.AdamW` state dict loads as it is. The delta is no part of the state:
    it is found by name again, and a resumed run whose delta is another one is refused.

    Every option but `impl` may differ between parameter groups.

    Args:
        params: `model.named_parameters()`, or parameter groups of such pairs. Unnamed parameters are matched in
            order with a delta that knows its model's order (`ReferenceDelta.from_models` of two modules).
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        lr: learning rate, a float or a 0-d tensor. At 0 the moments and steps advance and no weight moves.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled; theta is multiplied by 1 - lr*weight_decay before the merge.
        alpha: weight of the delta, in [0, 1]. Not scaled by `lr`: alpha*tau is added at every step.
        reserve_rate: p, the share that F keeps, in (0, 1]. A dense delta is sparsified once, with the rate that
            its group had when it was added; later changes act on u only.
        missing: `"error"`, or `"plain"` to step parameters that the delta does not hold as AdamW does.
        seed: 64-bit key of the random masks.
        method: a row of the table.
        rescale: divide what a random drop keeps by p (as the authors' experiments did) or do not (equation 4);
            None is True where F is random. Rows without a random drop have no such option.
        vote: `"reference"` elects the sign of u + tau (the authors' code), `"paper"` that of
            (1 - alpha)*u + alpha*tau (equations 5-7); None is `"reference"` where ⊕ is a sign vote.
        impl: `"auto"` (Triton on a GPU, else eager), `"triton"` or `"eager"`; `FUSED_MERGE_IMPL` overrides it.

    Raises:
        ValueError: for an option out of range or that the row lacks.
    """

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
        reserve_rate: float = 0.01,
        missing: str = "error",
        seed: int = 0,
        method: str = "ondare",
        rescale: bool | None = None,
        vote: str | None = None,
        impl: str = "auto",
    ) -> None:
        check_impl(impl)
        self.impl = impl
        self.reference_delta = (
            reference_delta if isinstance(reference_delta, ReferenceDelta) else ReferenceDelta.load(reference_delta)
        )
        self._taus: dict[str, functional.Tau] = {}
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "alpha": alpha,
                "reserve_rate": reserve_rate,
                "missing": missing,
                "seed": seed,
                "method": method,
                "rescale": rescale,
                "vote": vote,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the optimizer's and are checked as the constructor's are.

        Raises:
            ValueError: for an option out of range or that the row lacks.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
        except ValueError:
            self.param_groups.pop()
            raise
        group["reference"] = {
            "identity": self.reference_delta.identity,
            "path": self.reference_delta.path,
            # What tau is sparsified with; `reserve_rate` of the group may change later.
            "reserve_rate": group["reserve_rate"],
        }

    def bind(self) -> None:
        """Find the delta of every parameter by name and sparsify it; `step` does so when it is needed.

        Raises:
            ValueError: naming the parameters that the delta lacks or holds in another shape, or saying how a
                sparse delta was made if that is not what the group asks for. Nothing is bound then.
        """
        wanted = [
            (name, param, group)
            for group, names in zip(self.param_groups, self._names(), strict=True)
            for name, param in zip(names, group["params"], strict=True)
            if name not in self._taus
        ]
        if not wanted:
            return
        delta, held = self.reference_delta, set(self.reference_delta.names)
        absent = [name for name, _, group in wanted if name not in held and group["missing"] == "error"]
        if absent:
            raise ValueError(
                f"the reference delta lacks {some(map(repr, absent))}; build it from checkpoints that hold them, or "
                "step them as plain AdamW with missing='plain'"
            )
        for name, param, _ in wanted:
            if name in held and delta.shape(name) != param.shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(param.shape)} and its reference delta "
                    f"{tuple(delta.shape(name))}; train the model that the delta was made of"
                )
        taus: dict[str, functional.Tau] = {}
        for name, param, group in wanted:
            taus[name] = self._sparsified(name, group, param.device) if name in held else None
        self._taus.update(taus)
        plain = [name for name, tau in taus.items() if tau is None]
        if plain:
            logger.warning("stepping as plain AdamW, without a reference delta: %s", some(map(repr, plain), shown=20))

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
            ValueError: for a gradient that cannot be stepped or a delta that cannot be bound. Nothing has
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.bind()
        batches = list(self._batches())
        for group, batch in batches:
            params = [param for _, param in batch]
            states = [self._state_of(param) for param in params]
            functional.merging_adamw_(
                params,
                [grad for param in params if (grad := param.grad) is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [self._tau_on(name, param.device) for name, param in batch],
                tensor_ids=[tensor_id(name) for name, _ in batch],
                tau_reserve_rate=group["reference"]["reserve_rate"],
                impl=self.impl,
                **{key: group[key] for key in _STEP_OPTIONS},
            )
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`; options that it lacks stay as they are.

        The moments keep their dtype, whatever the parameters' is, and are copied.

        Raises:
            ValueError: if the state dict was saved with another reference delta, or by an AdamW with an option
                (amsgrad, maximize) that this one does not have. Nothing has changed then.
        """
        for group in state_dict["param_groups"]:
            reference = group.get("reference")
            if reference and reference["identity"] != self.reference_delta.identity:
                raise ValueError(
                    f"the state dict was saved with the reference delta {reference['identity'][:12]} (from "
                    f"{reference['path'] or 'memory'}) and this optimizer has {self.reference_delta.identity[:12]}; "
                    "resume with the delta that the run began with"
                )
            for option in _FOREIGN:
                if group.get(option):
                    raise ValueError(f"the state dict was saved with {option}=True, which this optimizer lacks")
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
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
        self._restore_states(state_dict)
        self._taus.clear()

    def _restore_states(self, state_dict: StateDict) -> None:
        """Undo what torch does to states on loading: cast them to the parameter's dtype, or share them."""
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for index, param in zip(saved, params, strict=True):
            state = state_dict["state"].get(index, {})
            for key in state.keys() & {"exp_avg", "exp_avg_sq"}:
                self.state[param][key] = state[key].to(param.device, compute_dtype(param.dtype), copy=True)
            if "step" in state:
                # On a GPU the count lives beside the parameter, so that no step waits for the host.
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                self.state[param]["step"] = step.to(param.device, copy=True)

    def _names(self) -> list[list[str]]:
        """Return the canonical names of the parameters of each group."""
        if any("param_names" in group for group in self.param_groups):
            return [[canonical_name(name) for name in group["param_names"]] for group in self.param_groups]
        return _names_in_order([group["params"] for group in self.param_groups], self.reference_delta)

    def _batches(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Yield each group with its named parameters that have a gradient, all of them checked."""
        for group, names in zip(self.param_groups, self._names(), strict=True):
            _check_options(group)
            batch = [(n, p) for n, p in zip(names, group["params"], strict=True) if p.grad is not None]
            for name, param in batch:
                if not param.is_floating_point():
                    raise ValueError(
                        f"parameter {name!r} is {param.dtype}; only real floating parameters can be stepped"
                    )
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"the gradient of {name!r} is sparse ({param.grad.layout}); use a dense one, as from "
                        "nn.Embedding(sparse=False)"
                    )
            if batch:
                yield group, batch

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if "step" not in state:
            dtype = compute_dtype(param.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _sparsified(self, name: str, group: dict[str, Any], device: torch.device) -> functional.Tau:
        """Return F(tau) of one tensor as its group asks for it, sparse in memory where F drops anything."""
        rate = group["reference"]["reserve_rate"]
        method = merge_rule(group["method"], rate).tau
        if self.reference_delta.sparsity is None and (rate == 1.0 or method == "none"):
            return self.reference_delta.tensor(name).to(device)
        return self.reference_delta.sparse(name, Sparsity(method, rate, group["seed"])).to(device)

    def _tau_on(self, name: str, device: torch.device) -> functional.Tau:
        """Return the bound delta, moved along if its parameter went to another device."""
        tau = self._taus[name]
        if tau is not None and tau.device != device:
            tau = self._taus[name] = tau.to(device)
        return tau


class OnDAREAdamW(MergingAdamW):
    """AdamW with random drop and linear consensus: theta += (1 - alpha)*F(u) + alpha*F(tau).

    F keeps each element with probability p = `reserve_rate`, independently at every step for u and once for tau.
    Source: Lu et al. 2024 (arXiv 2405.17931), equation 4. Arguments, state and errors: `MergingAdamW`.

    Args:
        params: as in `MergingAdamW`.
        reference_delta: as in `MergingAdamW`.
        rescale: divide (1 - alpha)*F(u) and alpha*F(tau) by p, as in the authors' experiments; False is equation 4
            as printed.
        options: as in `MergingAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        reference_delta: ReferenceDelta | str | os.PathLike[str],
        rescale: bool = True,
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(params, reference_delta=reference_delta, method="ondare", rescale=rescale, **options)


class OnTIESAdamW(MergingAdamW):
    """AdamW with top-p by magnitude and sign consensus.

    F keeps, per tensor, what is at least as large as the k-th largest magnitude, k = max(1, floor(p*n)). The very
    first updates of Adam all have magnitude lr up to rounding, so what the first step keeps is chosen by rounding
    and ties. Source: Lu et al. 2024 (arXiv 2405.17931), equations 5-7. Arguments, state, errors: `MergingAdamW`.

    Args:
        params: as in `MergingAdamW`.
        reference_delta: as in `MergingAdamW`.
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
        vote: str = "reference",
        **options: Unpack[AdamWOptions],
    ) -> None:
        super().__init__(params, reference_delta=reference_delta, method="onties", vote=vote, **options)


_STEP_OPTIONS = (*("lr", "betas", "eps", "weight_decay", "alpha", "reserve_rate", "seed", "method", "rescale", "vote"),)


def _check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for the first option of a group that is out of range or that its row lacks."""
    merge_rule(group["method"], group["reserve_rate"], rescale=group["rescale"], vote=group["vote"])
    if not isinstance(group["lr"], Tensor) and not group["lr"] >= 0.0:
        raise ValueError(f"lr must be at least 0, got {group['lr']}")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"a tensor lr must hold one number, got shape {tuple(group['lr'].shape)}")
    for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if not 0.0 <= group["alpha"] <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {group['alpha']}")
    if group["missing"] not in _MISSING:
        raise ValueError(f"missing must be 'error' or 'plain', got {group['missing']!r}")


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
