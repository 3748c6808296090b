"""OnDARE with Accelerate, in one process or sharded by FSDP2: `accelerator.prepare` takes it as it takes AdamW.

    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --num_processes 2 examples/accelerate_fsdp2.py    # on two GPUs
    python examples/accelerate_fsdp2.py                   # in one process, also on a CPU

Here the model is tiny and random, so that it takes seconds.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import fused_merge as fm

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
base = LlamaForCausalLM(config)
model = LlamaForCausalLM(config)
model.load_state_dict(base.state_dict())
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))

accelerator = Accelerator()
# Made before `prepare`, from models that are whole; tau can as well be read from two checkpoints, see fsdp2.py.
delta = fm.ReferenceDelta.from_models(base, model)
optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-3, alpha=1e-3, reserve_rate=0.1)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
loader = DataLoader(torch.randint(64, (64, 16)), batch_size=4)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

for step, tokens in enumerate(loader):
    loss = model(tokens, labels=tokens).loss
    accelerator.backward(loss)
    # Clipping is Accelerate's, or the optimizer's own with max_grad_norm.
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 4 == 0:
        accelerator.print(f"step {step}: loss {loss.item():.4f}")

folder = broadcast_object_list([tempfile.mkdtemp()])[0]
accelerator.save_state(folder)
accelerator.load_state(folder)
accelerator.print(f"saved in {folder} and loaded again")
accelerator.end_training()
