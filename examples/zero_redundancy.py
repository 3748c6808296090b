"""OnDARE in torch's ZeroRedundancyOptimizer: each process keeps the states, and tau, of some of the parameters.

    torchrun --nproc-per-node 2 examples/zero_redundancy.py

It hands bare parameters to the optimizer's class, so `names_of` says what they are called. Here the model is tiny and
random, so that it runs on a CPU in seconds.
"""

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fused_merge as fm

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group()
if device.type == "cuda":
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
base, model = LlamaForCausalLM(config), LlamaForCausalLM(config)
model.load_state_dict(base.state_dict())
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
delta = fm.ReferenceDelta.from_models(base, model)

model = DistributedDataParallel(model.to(device))
optimizer = ZeroRedundancyOptimizer(
    model.parameters(), fm.OnDAREAdamW, reference_delta=delta, names_of=model, lr=1e-3, alpha=1e-3, reserve_rate=0.1
)

torch.manual_seed(dist.get_rank())
for step in range(4):
    tokens = torch.randint(64, (4, 16), device=device)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")

optimizer.consolidate_state_dict(to=0)
if dist.get_rank() == 0:
    states = optimizer.state_dict()["state"]
    print(f"the first process has gathered the states of {len(states)} parameters")
dist.destroy_process_group()
