"""DPO with TRL that keeps what supervised fine-tuning taught: two lines more than without, near the end.

Here the models are tiny and random, so that it runs on a CPU in seconds.
"""

import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import fused_merge as fm

words = {"<unk>": 0, "<pad>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 64)}
tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
tokens.pre_tokenizer = Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
folder = tempfile.mkdtemp()
model.save_pretrained(f"{folder}/base")
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
model.save_pretrained(f"{folder}/sft")


def sentence() -> str:
    """Return six random words."""
    return " ".join(random.choices(list(words)[3:], k=6))


random.seed(0)
pairs = [{"prompt": sentence(), "chosen": sentence(), "rejected": sentence()} for _ in range(32)]
args = DPOConfig(folder, max_steps=8, learning_rate=1e-4, logging_steps=2, use_cpu=True, bf16=False, report_to=[])
trainer = DPOTrainer(
    LlamaForCausalLM.from_pretrained(f"{folder}/sft"),
    ref_model=LlamaForCausalLM.from_pretrained(f"{folder}/sft"),
    args=args,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
)
# The first line is all that merging takes; the second shows in the trainer's own logs what it does.
fm.attach(trainer, base=f"{folder}/base", reserve_rate=0.1, alpha=1e-3, stats_every=2)
trainer.add_callback(fm.MergeStatsCallback(trainer))
trainer.train()
for entry in trainer.state.log_history:
    if "merge/cosine" in entry:
        print(entry["step"], {key: round(value, 4) for key, value in entry.items() if key.startswith("merge/")})
