"""Trainers of Transformers and TRL on the CPU, with a tiny model and data made of its words."""

from __future__ import annotations

import contextlib
import random

import torch
import trl
from datasets import Dataset
from tiny import llama
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments, set_seed
from word_tokens import tokenizer

import fused_merge as fm

# Dense and strong enough for every merge to show in every tensor.
MERGING = {"alpha": 0.1, "reserve_rate": 0.5}
KINDS = ("dpo", "kto", "grpo", "plain")


def base():
    return llama(0)


def policy():
    """The model that training starts with: `base` after supervised fine-tuning."""
    model = llama(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def delta() -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_models(base(), policy())


def words(rng, count=4):
    return " ".join(f"w{rng.randrange(3, 48)}" for _ in range(count))


def data(kind, size=12):
    rng = random.Random(0)
    rows = []
    for i in range(size):
        prompt, one, two = words(rng), words(rng), words(rng)
        if kind == "dpo":
            rows.append({"prompt": prompt, "chosen": one, "rejected": two})
        elif kind == "kto":
            rows.append({"prompt": prompt, "completion": one, "label": i % 2 == 0})
        elif kind == "grpo":
            rows.append({"prompt": prompt})
        else:
            ids = [rng.randrange(3, 48) for _ in range(8)]
            rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


def reward(completions, **_):
    return [float(sum(map(ord, text)) % 97) for text in completions]


def train(trainer, **options):
    """Train from the seed of the trainer, whatever was drawn since it was made."""
    set_seed(trainer.args.seed)
    trainer.train(**options)
    return weights(trainer.model)


def trainer_of(kind, folder, model=None, *, options=None, callbacks=None, evaluated=False, **arguments):
    """A trainer of three steps with warm-up and decay, so that learning rates and groups show.

    `options` go to the trainer, `arguments` into its arguments.
    """
    model = policy() if model is None else model
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-7,
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }
    given = {"model": model, "train_dataset": data(kind), "callbacks": callbacks, **(options or {})}
    if evaluated:
        given["eval_dataset"] = data(kind, 4)
    if kind == "plain":
        return Trainer(args=TrainingArguments(**common | arguments), **given)
    given["processing_class"] = tokenizer()
    if kind == "grpo":
        own = {"num_generations": 2, "max_completion_length": 4, "per_device_eval_batch_size": 2}
        return trl.GRPOTrainer(args=trl.GRPOConfig(**common | own | arguments), reward_funcs=reward, **given)
    config, cls = {"dpo": (trl.DPOConfig, trl.DPOTrainer), "kto": (trl.KTOConfig, trl.KTOTrainer)}[kind]
    return cls(args=config(**common | {"max_length": 32} | arguments), ref_model=policy(), **given)


def decay_groups(model, decay=0.1):
    """Named parameters as the trainer groups them."""
    named = list(model.named_parameters())
    return [
        {"params": [pair for pair in named if "norm" not in pair[0]], "weight_decay": decay},
        {"params": [pair for pair in named if "norm" in pair[0]], "weight_decay": 0.0},
    ]


def optimizer_of(model, **options):
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-7, **MERGING, **options}
    return fm.OnDAREAdamW(decay_groups(model), reference_delta=delta(), **options)


def weights(model: nn.Module):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def recorded():
    """Yield a list of what each step of any merging optimizer sees: the learning rates of its groups, its gradients."""
    seen = []

    def record(optimizer, *_):
        if isinstance(optimizer, fm.MergingAdamW):
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            seen.append((rates, grads))

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def replayed(seen, **options):
    """The weights after the same steps outside of any trainer."""
    model = policy()
    optimizer = optimizer_of(model, **options)
    for rates, grads in seen:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.step()
    return weights(model)
