"""OnDARE under FSDP2: the optimizer takes what torch.optim.AdamW takes, and tau, of which each process reads its part.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Here the model is tiny and random, so that it runs on a CPU in seconds.
"""

import tempfile

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fused_merge as fm

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = init_device_mesh(device, (dist.get_world_size(),))
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
if dist.get_rank() == 0:  # Two checkpoints in place of the base model and the one after supervised fine-tuning.
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(f"{folder[0]}/base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(f"{folder[0]}/sft")
dist.barrier()

model = LlamaForCausalLM.from_pretrained(f"{folder[0]}/sft").to(device)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
delta = fm.ReferenceDelta.from_checkpoints(f"{folder[0]}/base", f"{folder[0]}/sft")
optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-3, alpha=1e-3, reserve_rate=0.1)

torch.manual_seed(dist.get_rank())
for step in range(4):
    tokens = torch.randint(64, (4, 16), device=device)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")

weights, states = get_state_dict(model, optimizer)
checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder[0]}/step4")
if dist.get_rank() == 0:
    print(f"{folder[0]}/step4 can be loaded by any number of processes")
dist.destroy_process_group()
