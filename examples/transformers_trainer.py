"""The Trainer of Transformers with a merging optimizer, and scores of the path back at every evaluation.

Here the model is tiny and random, so that it runs on a CPU in seconds.
"""

import copy
import random
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fused_merge as fm

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
base = LlamaForCausalLM(config)
sft = copy.deepcopy(base)
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in sft.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))

folder = tempfile.mkdtemp()
# For checkpoints on disk: fused-merge delta base/ sft/ --out tau.safetensors
fm.ReferenceDelta.from_models(base, sft).save(f"{folder}/tau.safetensors")

random.seed(0)
rows = [{"input_ids": (ids := random.choices(range(64), k=16)), "labels": ids} for _ in range(40)]
args = TrainingArguments(
    folder,
    max_steps=12,
    learning_rate=1e-3,
    weight_decay=0.1,
    eval_strategy="steps",
    eval_steps=6,
    logging_steps=3,
    use_cpu=True,
    report_to=[],
)
trainer = Trainer(
    copy.deepcopy(sft),
    args,
    train_dataset=Dataset.from_list(rows[:32]),
    eval_dataset=Dataset.from_list(rows[32:]),
    # Learning rate, betas, eps and weight decay are those of `args`.
    optimizer_cls_and_kwargs=fm.optimizer_factory(
        args, reference_delta=f"{folder}/tau.safetensors", method="onties", reserve_rate=0.1, alpha=1e-3
    ),
)
trainer.add_callback(fm.SweepCallback(trainer, base=sft, ratios=[0.25, 0.5, 0.75]))
trainer.train()
for entry in trainer.state.log_history:
    print(entry["step"], {key: round(value, 4) for key, value in entry.items() if key.endswith("loss")})
