"""A SweepCallback on a model under FSDP2, for `test_transformers`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from bits import same_bits
from tiny import llama
from torch.distributed.fsdp import fully_shard

import fused_merge as fm
from fused_merge.distributed import local_part


def score(model):
    """What the model says of some tokens: every process must ask."""
    with torch.no_grad():
        return float(model(input_ids=torch.arange(12).view(1, 12)).logits.double().abs().mean())


def sweep(rank):
    """Scores of a sharded model by ratio, those of the whole one, and whether the weights came back."""
    model, whole, base = llama(1), llama(1), llama(0)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    logs = []
    trainer = SimpleNamespace(
        model=model,
        eval_dataset=None,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        callback_handler=SimpleNamespace(callbacks=[]),
    )
    state = SimpleNamespace(global_step=1, log_history=[])
    callback = fm.SweepCallback(trainer, base, [0.0, 0.25, 1.0], scorers={"score": score})

    def log(entry):
        state.log_history.append(dict(entry))
        callback.on_log(None, state, None, logs=entry)
        logs.append(entry)

    trainer.log = log
    before = [local_part(p).clone() for p in model.parameters()]
    callback.on_evaluate(None, state, None)
    after = [local_part(p) for p in model.parameters()]
    expected, path = [], fm.RatioSweep(whole, base, llama(1))
    for ratio in (0.0, 0.25, 1.0):
        with path.at(ratio):
            expected.append(score(whole))
    return logs, expected, all(map(same_bits, before, after))
