"""Callbacks for the trainers of Transformers and TRL: what merging does, in their own logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.io.sources import SourceLike
from fused_merge.names import list_and_layer
from fused_merge.sweep.scorers import Scorer, same_draws


class HasMergeStats(Protocol):
    """What knows what its merges did."""

    def merge_stats(self) -> Mapping[str, Mapping[str, float]]:
        """Return tensor name -> statistic -> value; ValueError if none are collected."""
        ...


class _LogCallback(TrainerCallback):
    """Stands first among the callbacks of a trainer: what it changes in a log is what the others report."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Go before the callbacks that report, which the trainer put first."""
        self._go_first()

    def _go_first(self) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        if self in callbacks:
            # Whoever walks along the list now neither skips nor repeats another one.
            callbacks.remove(self)
            callbacks.insert(0, self)


class MergeStatsCallback(_LogCallback):
    """Adds `merge_stats` of the optimizer to what a trainer logs: its history, TensorBoard, W&B, Trackio.

    `merge/lost` is the mean over all tensors of the statistic `lost`, and so on. A log gets them when there are new
    ones: choose `stats_every` and `logging_steps` alike, since only what the last merge did is logged.

    Args:
        trainer: the trainer that it is added to.
        per_layer: also log means by layer: `merge/model.layers.3/lost`, and tensors outside the layers by their names.
        source: what has `merge_stats`, if it is not the trainer's optimizer.

    Raises:
        ValueError: when training starts, if the optimizer merges nothing or collects no statistics.

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> args = TrainingArguments("run/", max_steps=2, logging_steps=2, save_strategy="no", report_to="none")
        >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
        >>> trainer = Trainer(model, args, train_dataset=data)
        >>> fm.attach(trainer, base="base/", stats_every=2)
        >>> trainer.add_callback(fm.MergeStatsCallback(trainer))
        >>> result = trainer.train()
        {'loss': ..., 'merge/cosine': ..., 'merge/lost': ...}
        >>> 0.0 <= trainer.state.log_history[0]["merge/conflicts"] <= 1.0
        True
    """

    def __init__(self, trainer: Trainer, *, per_layer: bool = False, source: HasMergeStats | None = None) -> None:
        super().__init__(trainer)
        self.per_layer = per_layer
        self.source = source
        self._logged: dict[str, Mapping[str, float]] = {}

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find the optimizer, which Accelerate and DeepSpeed wrap."""
        super().on_train_begin(*args, **kwargs)
        while self.source is None:
            if hasattr(optimizer, "merge_stats"):
                self.source = optimizer
            elif hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            else:
                raise ValueError(
                    f"MergeStatsCallback finds {type(optimizer).__name__} in the trainer, which merges nothing; call "
                    "attach(trainer, ...) before training, or pass source"
                )
        self.source.merge_stats()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what the last merge did to a log of training."""
        if self.source is None or "loss" not in logs:
            return
        stats = dict(self.source.merge_stats())
        if stats == self._logged:
            return
        self._logged = stats
        new = {f"merge/{key}": value for key, value in _means(stats.values()).items()}
        if self.per_layer:
            layers = defaultdict(list)
            for name, entry in stats.items():
                place = list_and_layer(name)
                layers[f"{place[0]}.{place[1]}" if place else name].append(entry)
            for layer, entries in layers.items():
                new |= {f"merge/{layer}/{key}": value for key, value in _means(entries).items()}
        logs.update(new)
        state.log_history[-1].update(new)


class DeepSpeedCallback(TrainerCallback):
    """Calls `bind_deepspeed` when training begins, when there is an engine; without DeepSpeed it does nothing.

    Args:
        trainer: the trainer that it is added to. Under DeepSpeed it makes its optimizer of `optimizer_cls_and_kwargs`,
            and drops `optimizers=`.

    Raises:
        TypeError, ValueError: when training starts, as `bind_deepspeed`.

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        >>> model = AutoModelForCausalLM.from_pretrained("sft/")
        >>> args = TrainingArguments("run/", max_steps=1, save_strategy="no", report_to="none")  # deepspeed="zero.json"
        >>> factory = fm.optimizer_factory(args, reference_delta="tau.safetensors")
        >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=factory)
        >>> trainer.add_callback(fm.DeepSpeedCallback(trainer))  # `attach` does so by itself
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> result.global_step
        1
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Bind the optimizer of the engine, into which the trainer has loaded a checkpoint by now."""
        if self.trainer.is_deepspeed_enabled:
            from fused_merge.integrations.deepspeed import bind_deepspeed

            bind_deepspeed(self.trainer.model_wrapped)


class SweepCallback(_LogCallback):
    """Scores, at every evaluation, the models on the path from `base` to the model as trained so far.

    theta(r) = base + r*(model − base) is written into the model, evaluated, and logged as `eval_sweep/r0.25/loss` and
    so on, whatever the trainer logs as `eval_loss`. Afterwards the weights have their bits again and the random
    generators of training their states. It costs one evaluation for each ratio, and a copy of the model on the CPU
    while it lasts. Source: Lin et al. 2024 (arXiv 2309.06256).

    Args:
        trainer: the trainer that it is added to.
        base: theta0, r = 0, as for `RatioSweep`: often the model that training starts with.
        ratios: any finite numbers.
        scorers: name -> function of the model that returns a number or several by name, to be logged instead of what
            the trainer evaluates.

    Raises:
        ValueError: if the trainer generates with vLLM, which has weights of its own, and there are no scorers; as
            `RatioSweep` does, at the first evaluation, if `base` does not fit the model.

    Example:
        >>> import fused_merge as fm
        >>> from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        >>> model = AutoModelForCausalLM.from_pretrained("rlhf/")
        >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
        >>> trainer = Trainer(model, TrainingArguments("run/", report_to="none"), eval_dataset=data)
        >>> trainer.add_callback(fm.SweepCallback(trainer, base="sft/", ratios=[0.25, 0.5]))
        >>> scores = trainer.evaluate()  # as training does every eval_steps
        >>> logged = [key for log in trainer.state.log_history for key in log]
        >>> [key for key in logged if key.endswith("loss")]
        ['eval_loss', 'eval_sweep/r0.25/loss', 'eval_sweep/r0.5/loss']
    """

    def __init__(
        self,
        trainer: Trainer,
        base: SourceLike,
        ratios: Iterable[float],
        *,
        scorers: Mapping[str, Scorer] | None = None,
    ) -> None:
        super().__init__(trainer)
        if getattr(trainer, "use_vllm", False) and scorers is None:
            raise ValueError("the trainer generates with vLLM, whose weights a sweep does not move; pass scorers")
        self.base = base
        self.ratios = tuple(ratios)
        self.scorers = scorers
        self._ratio: float | None = None
        self._last_step: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sweep after an evaluation of the trainer's own; of several datasets, after the first."""
        if self._ratio is not None or (
            isinstance(self.trainer.eval_dataset, dict) and self._last_step == state.global_step
        ):
            return
        self._last_step = state.global_step
        self._go_first()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        tuned = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        sweep = RatioSweep(model, self.base, tuned)
        handler = self.trainer.callback_handler
        callbacks = handler.callbacks
        # A sweep is no evaluation that training should be stopped for.
        handler.callbacks = [each for each in callbacks if not isinstance(each, EarlyStoppingCallback)]
        try:
            for ratio in self.ratios:
                with same_draws(), sweep.at(ratio):
                    self._ratio = ratio
                    self._score(model)
        finally:
            self._ratio = None
            handler.callbacks = callbacks

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Give what is logged within a sweep its name."""
        if self._ratio is not None:
            for entry in (logs, state.log_history[-1]):
                for key in [key for key in entry if key.startswith("eval_")]:
                    entry[f"eval_sweep/r{self._ratio:g}/{key.removeprefix('eval_')}"] = entry.pop(key)

    @torch.no_grad()
    def _score(self, model: torch.nn.Module) -> None:
        if self.scorers is None:
            self.trainer.evaluate()
            return
        scores: dict[str, float] = {}
        for name, scorer in self.scorers.items():
            score = scorer(model)
            scores |= {f"{name}/{k}": v for k, v in score.items()} if isinstance(score, Mapping) else {name: score}
        self.trainer.log({f"eval_{name}": float(score) for name, score in scores.items()})


def _means(entries: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every statistic."""
    values = defaultdict(list)
    for entry in entries:
        for key, value in entry.items():
            values[key].append(value)
    return {key: sum(each) / len(each) for key, each in values.items()}
