"""TRL with a `peft_config`, which wraps the model after an optimizer may have been made of it."""

from __future__ import annotations

import logging

import pytest
from bits import assert_same_bits
from peft import LoraConfig
from trainers import optimizer_of, policy, train, trainer_of, weights


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_optimizer_of_the_model_before_it_was_wrapped_warns_that_it_trains_nothing(kind, tmp_path, caplog):
    model = policy()
    options = {
        "optimizers": (optimizer_of(model), None),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    trainer = trainer_of(kind, tmp_path, model, options=options)
    before = weights(trainer.model)
    with caplog.at_level(logging.WARNING, "fused_merge"):
        after = train(trainer)
    messages = [record.message for record in caplog.records if record.name == "fused_merge"]
    assert len(messages) == 1
    assert "no parameter of this optimizer has a gradient" in messages[0]
    assert "through fm.optimizer_factory" in messages[0]
    assert_same_bits(after, before)
