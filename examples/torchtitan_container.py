"""OnDARE in torchtitan's container of optimizers, under FSDP2: the configuration of the optimizers is one call.

    torchrun --nproc-per-node 2 examples/torchtitan_container.py

A recipe of torchtitan takes `optimizers` where `default_adamw` stands. Here the model is tiny and random, so that it
runs on a CPU in seconds.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_merge as fm
from fused_merge.integrations.torchtitan import merging_adamw

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group()
mesh = init_device_mesh(device, (dist.get_world_size(),))


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))


base, model = model_of(0), model_of(0)
with torch.no_grad():  # In place of supervised fine-tuning.
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
# In earnest: of two modules into which torchtitan has loaded the checkpoints, or the path of a saved one.
delta = fm.ReferenceDelta.from_models(base, model)
model = fully_shard(model.to(device), mesh=mesh)

optimizers = merging_adamw(delta, lr=1e-3, alpha=1e-3, reserve_rate=0.1)
container = optimizers.build(model_parts=[model])
container.init_cache_state_dict()

torch.manual_seed(dist.get_rank())
for step in range(4):
    tokens = torch.randint(64, (4, 16), device=device)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    container.step()
    container.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")
if dist.get_rank() == 0:
    print(f"the container saves {len(container.state_dict())} states and options")
dist.destroy_process_group()
