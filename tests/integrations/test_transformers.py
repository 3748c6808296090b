"""The trainers of Transformers and TRL: every way to give them the optimizer is the same run, and can be resumed."""

from __future__ import annotations

import logging

import pytest
import sharded_sweep
import torch
from bits import assert_same_bits
from tiny import save
from torch import nn
from trainers import (
    MERGING,
    base,
    decay_groups,
    delta,
    optimizer_of,
    policy,
    recorded,
    replayed,
    train,
    trainer_of,
    weights,
)
from transformers import Trainer, TrainingArguments

import fused_merge as fm


def by_object(kind, folder, **more):
    model = policy()
    return trainer_of(kind, folder, model, options={"optimizers": (optimizer_of(model), None)}, **more)


def by_attach(kind, folder, **more):
    trainer = trainer_of(kind, folder, **more)
    fm.attach(trainer, delta(), **MERGING)
    return trainer


def by_base(kind, folder, **more):
    trainer = trainer_of(kind, folder, **more)
    fm.attach(trainer, base=save(base(), folder / "base"), **MERGING)
    return trainer


def by_factory(kind, folder, **more):
    trainer = trainer_of(kind, folder, **more)
    trainer.optimizer_cls_and_kwargs = fm.optimizer_factory(trainer.args, reference_delta=delta(), **MERGING)
    return trainer


def by_class(kind, folder, **more):
    trainer, args = trainer_of(kind, folder, **more), {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-7}
    options = {"reference_delta": delta(), "names_of": trainer.model, **args, **MERGING}
    trainer.optimizer_cls_and_kwargs = (fm.OnDAREAdamW, options)
    return trainer


PATHS = [by_object, by_attach, by_base, by_factory, by_class]


@pytest.mark.parametrize("kind", ["plain", "dpo", "kto", "grpo"])
@pytest.mark.parametrize("path", PATHS)
def test_a_trainer_takes_the_steps_of_its_gradients(path, kind, tmp_path):
    trainer = path(kind, tmp_path)
    with recorded() as seen:
        train(trainer)
    assert len(seen) == 3
    expected = replayed(seen)
    assert_same_bits(weights(trainer.model), expected)
    assert all(grad.abs().sum() > 0 for grad in seen[0][1])
    # The first step of the warm-up is one at lr 0, which moves nothing; then all is merged.
    assert [rates[0] for rates, _ in seen] == [0.0, 1e-3, 5e-4]
    assert not any(torch.equal(a, b) for a, b in zip(expected.values(), policy().parameters(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "dpo", "kto", "grpo"])
def test_all_ways_are_one_run(kind, tmp_path):
    results = []
    for path in PATHS:
        trainer = path(kind, tmp_path)
        train(trainer)
        results.append(weights(trainer.model))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("kind", ["plain", "dpo", "grpo"])
def test_an_interrupted_run_goes_on(kind, tmp_path):
    # Gradients are accumulated, data are drawn in random order, and the optimizer merges every second step.
    more = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}

    def trainer_in(folder, **changed):
        trainer = trainer_of(kind, folder, **more | changed)
        fm.attach(trainer, delta(), merge_every=2, rounding="stochastic", **MERGING)
        return trainer

    whole = trainer_in(tmp_path / "whole")
    train(whole)
    resumed = trainer_in(tmp_path / "resumed")
    train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(
        [list(state.values()) for state in resumed.optimizer.optimizer.state.values()],
        [list(state.values()) for state in whole.optimizer.optimizer.state.values()],
    )


def test_the_factory_is_told_everything_by_the_arguments(tmp_path):
    trainer = by_factory("plain", tmp_path)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, fm.MergingAdamW)
    for group, named in zip(optimizer.param_groups, decay_groups(trainer.model), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.98), 1e-7)
        assert group["weight_decay"] == named["weight_decay"]
        assert group["param_names"] == [name for name, _ in named["params"]]
        assert all(a is b for a, (_, b) in zip(group["params"], named["params"], strict=True))


def test_what_is_given_outweighs_the_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    factory = fm.optimizer_factory(args, reference_delta=delta(), lr=2e-3, weight_decay=0.2, method="onties")
    optimizer = factory()(policy(), eps=1e-5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert [(group["lr"], group["eps"], group["method"]) for group in optimizer.param_groups] == [
        (2e-3, 1e-5, "onties")
    ] * 2


def test_the_factory_may_be_half_of_what_the_trainer_takes(tmp_path):
    factory = fm.optimizer_factory(reference_delta=delta(), **MERGING)
    trainer = trainer_of("plain", tmp_path, options={"optimizer_cls_and_kwargs": (factory, {"lr": 2e-3})})
    assert trainer.create_optimizer().param_groups[0]["lr"] == 2e-3


def test_axolotl_passes_the_arguments_itself(tmp_path):
    make, options = fm.optimizer_factory(reference_delta=delta(), **MERGING)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-3, use_cpu=True)
    assert make()(policy(), args, **options).param_groups[0]["lr"] == 3e-3


def test_frozen_parameters_and_heads_that_tau_lacks(tmp_path):
    model = policy()
    model.model.embed_tokens.requires_grad_(False)
    model.value = nn.Linear(16, 1)
    trainer = trainer_of("plain", tmp_path, model)
    fm.attach(trainer, delta(), missing="plain", **MERGING)
    train(trainer)
    names = [name for group in trainer.optimizer.param_groups for name in group["param_names"]]
    assert "value.weight" in names
    assert "model.embed_tokens.weight" not in names


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, r"pass either reference_delta, or base and"),
        ({"reference_delta": "tau", "base": "base"}, r"pass either reference_delta, or base and"),
        ({"reference_delta": "tau", "sft": "sft"}, r"pass either reference_delta, or base and"),
    ],
)
def test_attach_says_what_it_needs(arguments, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        fm.attach(trainer_of("plain", tmp_path), **arguments)


def test_a_class_of_trainers_is_attached_to_as_they_are_made(tmp_path):
    Attached = fm.attach(Trainer, delta(), **MERGING)
    assert issubclass(Attached, Trainer)
    assert Attached.__name__ == "Trainer"
    peer = by_attach("plain", tmp_path)
    trainer = Attached(policy(), peer.args, train_dataset=peer.train_dataset)
    assert_same_bits(train(trainer), train(peer))
    assert isinstance(trainer.optimizer.optimizer, fm.MergingAdamW)


def test_attach_does_not_replace_an_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"has an optimizer already, .* before trainer.train"):
        fm.attach(by_object("plain", tmp_path), delta())


def test_unknown_options_are_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match="there is no option 'reserve_rat'; did you mean 'reserve_rate'"):
        fm.attach(trainer_of("plain", tmp_path), delta(), reserve_rat=0.1)


def test_a_factory_without_a_learning_rate_is_refused():
    with pytest.raises(ValueError, match="not told the learning rate; pass optimizer_factory the trainer's args"):
        fm.optimizer_factory(reference_delta=delta())()(policy())


def scaled_steps(trainer_or_none, optimizer, overflow_at):
    """Steps as Accelerate takes them under fp16, on the CPU; return the learning rates and the scales."""
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState(cpu=True)
    GradientState()._set_sync_gradients(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerated = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    schedule = AcceleratedScheduler(schedule, accelerated)
    rates = []
    for step in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, float("inf") if step == overflow_at else 1.0)
        scaler.scale(torch.ones(()))
        accelerated.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("path", ["factory", "object"])
def test_an_overflow_and_the_schedule(path):
    if path == "factory":
        optimizer = fm.optimizer_factory(reference_delta=delta(), lr=1.0)()(policy())
        # The second step overflows, and the schedule waits.
        expected = [1 / 2, 1 / 2, 1 / 3]
    else:
        optimizer = fm.OnDAREAdamW(policy().named_parameters(), reference_delta=delta(), lr=1.0)
        # As with torch's fused AdamW, which also decides on the device whether to step.
        expected = [1 / 2, 1 / 3, 1 / 4]
    assert scaled_steps(None, optimizer, overflow_at=1) == expected
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def scalars_of(folder):
    """What TensorBoard holds, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("kind", ["plain", "dpo"])
def test_merge_stats_go_into_the_logs_of_the_trainer(kind, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(kind, tmp_path, report_to=["tensorboard"], max_steps=4)
    fm.attach(trainer, delta(), stats_every=2, **MERGING)
    trainer.add_callback(fm.MergeStatsCallback(trainer, per_layer=True))
    train(trainer)
    stats = trainer.optimizer.optimizer.merge_stats()
    for key in ("cosine", "kept_u", "lost", "norm_tau"):
        found = logged(trainer, f"merge/{key}")
        # Steps 2 and 4 were looked at; the logs of steps 1 and 3 have nothing new.
        assert len(found) == 2
        assert found[-1] == pytest.approx(sum(entry[key] for entry in stats.values()) / len(stats))
        layer = [entry[key] for name, entry in stats.items() if name.startswith("model.layers.1.")]
        assert logged(trainer, f"merge/model.layers.1/{key}")[-1] == pytest.approx(sum(layer) / len(layer))
        assert logged(trainer, f"merge/model.embed_tokens.weight/{key}")[-1] == stats["model.embed_tokens.weight"][key]
        assert scalars_of(tmp_path / "board")[f"train/merge/{key}"] == pytest.approx(found)
    assert len(losses(trainer)) == 4
    if kind == "dpo":
        assert len(logged(trainer, "rewards/margins")) == 4


def test_merge_stats_need_an_optimizer_that_collects_them(tmp_path):
    trainer = trainer_of("plain", tmp_path)
    trainer.add_callback(fm.MergeStatsCallback(trainer))
    with pytest.raises(ValueError, match="MergeStatsCallback finds AdamW in the trainer, which merges nothing"):
        train(trainer)
    trainer = by_attach("plain", tmp_path)
    trainer.add_callback(fm.MergeStatsCallback(trainer))
    with pytest.raises(ValueError, match="no statistics are collected; pass stats_every=n"):
        train(trainer)


@pytest.mark.parametrize("kind", ["plain", "dpo", "grpo"])
def test_a_sweep_at_every_evaluation_leaves_the_run_alone(kind, tmp_path):
    more = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    plain = by_attach(kind, tmp_path, **more)
    train(plain)
    trainer = by_attach(kind, tmp_path, **more)
    trainer.add_callback(fm.SweepCallback(trainer, save(base(), tmp_path / "base"), [0.0, 0.25, 1.0]))
    train(trainer)
    assert_same_bits(weights(trainer.model), weights(plain.model))
    assert losses(trainer) == losses(plain)
    assert logged(trainer, "eval_loss") == logged(plain, "eval_loss")
    swept = {ratio: logged(trainer, f"eval_sweep/r{ratio}/loss") for ratio in ("0", "0.25", "1")}
    assert all(len(each) == 2 for each in swept.values())
    if kind != "grpo":
        # At r = 1 it is the model that is trained; at r = 0 always `base`; GRPO draws new completions.
        assert swept["1"] == logged(trainer, "eval_loss")
        assert swept["0"][0] == swept["0"][1] != swept["1"][0]
    if kind == "dpo":
        assert len(logged(trainer, "eval_rewards/margins")) == len(logged(trainer, "eval_sweep/r0.25/rewards/margins"))


def mean_of(model):
    return float(model.lm_head.weight.detach().double().mean())


def test_a_sweep_is_scored_by_functions_too(tmp_path):
    trainer = by_attach("plain", tmp_path, evaluated=True, eval_strategy="steps", eval_steps=3)
    scorers = {
        "mean": lambda model: float(model.lm_head.weight.detach().double().mean()),
        "two": lambda model: {"a": 1, "b": 2},
    }
    trainer.add_callback(fm.SweepCallback(trainer, policy(), [0.0, 0.5], scorers=scorers))
    train(trainer)
    start, end = mean_of(policy()), mean_of(trainer.model)
    assert logged(trainer, "eval_sweep/r0/mean") == [start]
    assert logged(trainer, "eval_sweep/r0.5/mean") == pytest.approx([(start + end) / 2])
    assert logged(trainer, "eval_sweep/r0.5/two/b") == [2.0]


def test_a_sweep_that_fails_leaves_the_model(tmp_path):
    def fails(model):
        raise RuntimeError("no")

    trainer = by_attach("plain", tmp_path, evaluated=True)
    before = weights(trainer.model)
    trainer.add_callback(fm.SweepCallback(trainer, base(), [0.5], scorers={"fails": fails}))
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match="no"):
        trainer.evaluate()
    assert_same_bits(weights(trainer.model), before)
    assert set(trainer.callback_handler.callbacks) == set(callbacks)


def test_of_several_datasets_one_sweep(tmp_path):
    from trainers import data

    both = {"one": data("plain", 4), "two": data("plain", 2)}
    trainer = by_attach("plain", tmp_path)
    trainer.eval_dataset = both
    trainer.add_callback(fm.SweepCallback(trainer, base(), [0.5]))
    trainer.evaluate()
    for name in both:
        assert len(logged(trainer, f"eval_sweep/r0.5/{name}_loss")) == 1
        assert len(logged(trainer, f"eval_{name}_loss")) == 1


def test_early_stopping_counts_no_sweeps(tmp_path, caplog):
    from transformers import EarlyStoppingCallback

    more = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    more |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "max_steps": 3}
    trainer = by_attach("plain", tmp_path, callbacks=[EarlyStoppingCallback(5)], **more)
    trainer.add_callback(fm.SweepCallback(trainer, base(), [0.0]))
    with caplog.at_level(logging.WARNING):
        train(trainer)
    assert "early stopping" not in caplog.text
    assert len(logged(trainer, "eval_loss")) == len(logged(trainer, "eval_sweep/r0/loss")) == 3


def test_a_sweep_of_a_sharded_model(ranks_of):
    for logs, expected, unchanged in ranks_of(2).all(sharded_sweep.sweep):
        assert unchanged
        scores = [entry[f"eval_sweep/r{ratio}/score"] for entry, ratio in zip(logs, ("0", "0.25", "1"), strict=True)]
        assert scores == pytest.approx(expected)


def test_vllm_has_weights_of_its_own(tmp_path):
    trainer = trainer_of("plain", tmp_path)
    trainer.use_vllm = True
    with pytest.raises(ValueError, match="generates with vLLM, whose weights a sweep does not move; pass scorers"):
        fm.SweepCallback(trainer, base(), [0.5])
