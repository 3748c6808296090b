"""DPO of a LoRA adapter with TRL, merged online with the adapter of SFT: two lines besides those of TRL, marked.

    python examples/peft_dpo.py    # on a CPU, in less than a minute

At the end the adapters before and after training are merged, by the product of their factors.
"""

from pathlib import Path
from tempfile import mkdtemp

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import fused_merge as fm


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, **sizes))


def stand_in_for_sft(folder: Path) -> tuple[Path, Path]:
    """Write an adapter as it begins, and one as SFT could leave it."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "initial")
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "sft")
    return folder / "initial", folder / "sft"


def main() -> None:
    folder = Path(mkdtemp())
    initial, sft = stand_in_for_sft(folder)
    words = Tokenizer(models.WordLevel({"<e>": 0} | {f"w{i}": i for i in range(1, 48)}, unk_token="<e>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<e>", pad_token="<e>", eos_token="<e>")
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w{i + 2}", "rejected": f" w{i + 2} w9"} for i in range(2, 42)]

    model = PeftModel.from_pretrained(tiny_llama(), str(sft), is_trainable=True)
    args = DPOConfig(str(folder / "dpo"), max_steps=10, learning_rate=1e-3, use_cpu=True, report_to=[], logging_steps=2)
    delta = fm.ReferenceDelta.from_checkpoints(initial, sft)  # 1
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    fm.attach(trainer, delta, alpha=1e-3, reserve_rate=0.5)  # 2
    trainer.train()
    trainer.save_model(str(folder / "dpo" / "adapter"))

    (half,) = fm.interpolate_checkpoints(sft, folder / "dpo" / "adapter", [0.5], folder / "path", progress=False)
    merged = PeftModel.from_pretrained(tiny_llama(), str(half))
    print(f"half way from SFT to DPO, an adapter of rank {merged.peft_config['default'].r}: {half}")


if __name__ == "__main__":
    main()
