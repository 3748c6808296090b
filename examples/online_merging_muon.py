"""Muon for the hidden matrices and AdamW for the rest, each with an OnlineMerging around it. Runs on a CPU.

python examples/online_merging_muon.py
"""

import io

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fused_merge as fm


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def main() -> None:
    delta = fm.ReferenceDelta.from_models(tiny_llama(0), tiny_llama(1))  # in earnest, from_checkpoints("base/", "sft/")
    model = tiny_llama(1)
    hidden, rest = [], []
    for name, param in model.named_parameters():
        (hidden if param.ndim == 2 and "layers" in name else rest).append((name, param))
    optimizers = [torch.optim.Muon(hidden, lr=2e-2), torch.optim.AdamW(rest, lr=1e-2)]
    options = {"reference_delta": delta, "reserve_rate": 0.3, "alpha": 1e-4, "merge_every": 2, "stats_every": 2}
    mergings = [fm.OnlineMerging(optimizer, **options) for optimizer in optimizers]

    generator = torch.Generator().manual_seed(0)
    for step in range(11):
        tokens = torch.randint(16, (4, 32), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()  # merges at every second step
            optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    for name, stats in list(mergings[0].merge_stats().items())[:3]:
        print(f"{name}: cosine of u and tau {stats['cosine']:+.4f}, kept of u {stats['kept_u']:.3f}")
    # Between two merges there is an anchor to save, beside the states of the optimizers.
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (*optimizers, *mergings)], file)
    print(f"a checkpoint of both: {file.tell() / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
