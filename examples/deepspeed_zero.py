"""OnDARE under DeepSpeed, for any ZeRO stage: three lines besides those of AdamW, marked.

    torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 2    # or python, for one process

On a machine without a GPU, set DS_ACCELERATOR=cpu.
"""

import argparse
import os

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fused_merge as fm


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    stage = parser.parse_args().stage
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if deepspeed.get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile an all-reduce for CPUs first, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    delta = fm.ReferenceDelta.from_models(tiny_llama(0), tiny_llama(1))  # 1; or from_checkpoints("base/", "sft/")
    model = tiny_llama(1)
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-3, alpha=1e-4)  # 2
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    fm.bind_deepspeed(engine)  # 3

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for step in range(10):
        tokens = torch.randint(16, (4, 32), generator=generator).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
