"""Transformers and what is built on its trainer: TRL, LLaMA-Factory, axolotl."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from torch import nn
from transformers import Trainer, TrainingArguments

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.integrations.trainer_callbacks import DeepSpeedCallback
from fused_merge.io.sources import SourceLike
from fused_merge.optim.merging_adamw import DeltaLike, MergingAdamW
from fused_merge.optim.options import GROUP_OPTIONS, RUN_OPTIONS, MergingOptions
from fused_merge.options import check_known, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Makes an optimizer of a model; axolotl passes the training arguments as well.
Build: TypeAlias = Callable[..., MergingAdamW]

TrainerClass = TypeVar("TrainerClass", bound=Trainer)


class OptimizerFactory(tuple[Callable[[], Build], dict[str, Any]]):
    """What a trainer takes as `optimizer_cls_and_kwargs`, whole or, with keyword arguments, as the first half of it.

    A trainer that finds no class of optimizers there calls it without arguments, and what that returns with the model.
    So the optimizer learns the names of the parameters, which a class is not given.
    """

    def __new__(cls, build: Build) -> OptimizerFactory:
        """Not for users: see `optimizer_factory`."""
        return super().__new__(cls, (lambda: build, {}))

    def __call__(self) -> Build:
        """Return what makes the optimizer."""
        return self[0]()


@documented(MergingOptions)
def optimizer_factory(
    args: TrainingArguments | None = None,
    *,
    reference_delta: DeltaLike,
    method: str = "ondare",
    **options: Unpack[MergingOptions],
) -> OptimizerFactory:
    """Return `optimizer_cls_and_kwargs` for a Transformers or TRL trainer, which then trains with `MergingAdamW`.

    The optimizer gets the parameters that require a gradient, by name, in the trainer's two groups: weights decay,
    biases and norms do not. It leaves it to `GradScaler` to unscale gradients, so that a step that is skipped for an
    overflow does not advance the schedule.

    Args:
        args: the trainer's: `lr`, `betas`, `eps` and `weight_decay` are taken from there unless they are given.
        reference_delta: a `ReferenceDelta`, or the path of a saved one.
        method: a key of `fused_merge.methods.METHODS`.
        {options}

    Returns:
        What the trainer takes as `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: for an option that there is not.
        ValueError: when the trainer asks for the optimizer: without `args` and `lr`, or as `MergingAdamW` does.

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> args = TrainingArguments("run/", learning_rate=1e-5, weight_decay=0.01)
        >>> factory = fm.optimizer_factory(args, reference_delta="tau.safetensors", alpha=1e-6)
        >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=factory)
        >>> optimizer = trainer.create_optimizer()  # as trainer.train() does
        >>> type(optimizer).__name__, [group["weight_decay"] for group in optimizer.param_groups]
        ('MergingAdamW', [0.01, 0.0])
    """
    return _factory(args, _decay_names, reference_delta, method, options)


@overload
def attach(
    trainer: Trainer,
    reference_delta: DeltaLike | None = None,
    *,
    base: SourceLike | None = None,
    sft: SourceLike | None = None,
    method: str = "ondare",
    **options: Unpack[MergingOptions],
) -> None: ...
@overload
def attach(
    trainer: type[TrainerClass],
    reference_delta: DeltaLike | None = None,
    *,
    base: SourceLike | None = None,
    sft: SourceLike | None = None,
    method: str = "ondare",
    **options: Unpack[MergingOptions],
) -> type[TrainerClass]: ...
@documented(MergingOptions)
def attach(
    trainer: Trainer | type[Trainer],
    reference_delta: DeltaLike | None = None,
    *,
    base: SourceLike | None = None,
    sft: SourceLike | None = None,
    method: str = "ondare",
    **options: Unpack[MergingOptions],
) -> type[Trainer] | None:
    """Make a trainer train with `MergingAdamW`; to be called before its `train`.

    It sets `trainer.optimizer_cls_and_kwargs` as `optimizer_factory` describes, with the arguments of the trainer, and
    adds `DeepSpeedCallback`.

    Args:
        trainer: of Transformers, TRL, LLaMA-Factory or axolotl; without an optimizer. Or a class of trainers, for
            programs that make the trainer themselves.
        reference_delta: a `ReferenceDelta`, or the path of a saved one. Or else:
        base: theta_base, as for `ReferenceDelta.from_models`: a path is read tensor by tensor, once. tau is computed
            now and kept in memory; `fused-merge delta` makes a file of it that is not.
        sft: theta_SFT, the same; None for the model of the trainer as it is now, which is its state when training
            starts unless that resumes.
        method: a key of `fused_merge.methods.METHODS`.
        {options}

    Returns:
        Nothing; for a class, a subclass whose trainers are attached to as soon as they are made.

    Raises:
        TypeError: for an option that there is not.
        ValueError: if the trainer has an optimizer, not one of `reference_delta` and `base` is given, or the delta
            cannot be made.

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> args = TrainingArguments("run/", max_steps=1, save_strategy="no", report_to="none")
        >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> trainer = Trainer(model, args, train_dataset=data)  # or one of TRL
        >>> fm.attach(trainer, base="base/", alpha=1e-6)
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> len(trainer.optimizer.optimizer.state) == len(list(model.parameters()))
        True
    """
    check_known(options, GROUP_OPTIONS | RUN_OPTIONS)
    if (reference_delta is None) == (base is None) or (sft is not None and base is None):
        raise ValueError("pass either reference_delta, or base and, unless it is the model of the trainer, sft")
    if isinstance(trainer, type):
        made = trainer.__init__

        def make(self: Trainer, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            attach(self, reference_delta, base=base, sft=sft, method=method, **options)

        return type(trainer.__name__, (trainer,), {"__init__": functools.wraps(made)(make)})
    if trainer.optimizer is not None:
        raise ValueError(
            "the trainer has an optimizer already, which attach would not replace; call attach before trainer.train() "
            "and pass no optimizers to the trainer"
        )
    if base is not None:
        model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        reference_delta = ReferenceDelta.from_models(base, model if sft is None else sft)
    assert reference_delta is not None
    factory: Any = _factory(trainer.args, trainer.get_decay_parameter_names, reference_delta, method, options)
    trainer.optimizer_cls_and_kwargs = factory
    trainer.add_callback(DeepSpeedCallback(trainer))
    return None


def _factory(
    known: TrainingArguments | None,
    decay_names: Callable[[nn.Module], list[str]],
    reference_delta: DeltaLike,
    method: str,
    options: MergingOptions,
) -> OptimizerFactory:
    check_known(options, GROUP_OPTIONS | RUN_OPTIONS)

    def build(model: nn.Module, args: TrainingArguments | None = None, **given: Any) -> MergingAdamW:
        asked: dict[str, Any] = {**options, **given}
        args = known or args
        if args is not None:
            betas = (args.adam_beta1, args.adam_beta2)
            own = {
                "lr": args.learning_rate,
                "betas": betas,
                "eps": args.adam_epsilon,
                "weight_decay": args.weight_decay,
            }
            asked = own | asked
        elif "lr" not in asked:
            raise ValueError(
                "the optimizer is not told the learning rate; pass optimizer_factory the trainer's args, or lr"
            )
        decay, decayed = asked.pop("weight_decay", 0.0), set(decay_names(model))
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [pair for pair in named if pair[0] in decayed], "weight_decay": decay},
            {"params": [pair for pair in named if pair[0] not in decayed], "weight_decay": 0.0},
        ]
        optimizer = MergingAdamW(groups, reference_delta=reference_delta, method=method, **asked)
        # When GradScaler itself skips a step that overflows, Accelerate notices and the schedule waits. That costs
        # little: the trainer unscales gradients anyway where it clips them.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    return OptimizerFactory(build)


def _decay_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that the weights of a plain trainer decay."""
    # The method uses nothing of its trainer.
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
