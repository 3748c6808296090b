"""The three trainings: base and SFT in plain loops, preferences with TRL's DPOTrainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from data import encode_rows, pretraining_rows, reward, sft_examples
from datasets import Dataset
from evaluate import sample
from settings import Run
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

import fused_merge as fm

Advance = Callable[[], None]
Batch = dict[str, torch.Tensor]


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 0.44 M parameters.

    The wide initialization and the short rotary wavelengths are what lets so small a model learn to
    copy within a few hundred steps.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=256,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _fit(model: LlamaForCausalLM, batches: Iterator[Batch], steps: int, lr: float, advance: Advance) -> None:
    """AdamW on the language-model loss: 5 % warm-up, cosine decay, gradients clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    for _ in range(steps):
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance()
    model.eval()


def train_base(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, steps: int, seed: int, advance: Advance
) -> None:
    """Pretrain on raw text and raw task lines."""
    rng = random.Random(seed)

    def batches() -> Iterator[Batch]:
        while True:
            ids = encode_rows(tokenizer, pretraining_rows(text, 32, rng))
            yield {"input_ids": ids, "labels": ids}

    _fit(model, batches(), steps, lr=3e-3, advance=advance)


def train_sft(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lines: list[str],
    steps: int,
    seed: int,
    advance: Advance,
) -> None:
    """Teach the chat format, and the tasks in it; the loss is taken on the answers alone."""
    _fit(model, sft_batches(tokenizer, lines, 48, random.Random(seed)), steps, lr=2e-3, advance=advance)


def sft_batches(tokenizer: PreTrainedTokenizerFast, lines: list[str], size: int, rng: random.Random) -> Iterator[Batch]:
    """Batches of chat without end, with labels on the answers alone."""
    while True:
        examples = sft_examples(lines, size, rng)
        texts = [example.prompt + example.answer + tokenizer.eos_token for example in examples]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example.prompt)] = -100
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def preference_pairs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, samples: int = 4
) -> Dataset:
    """Best against worst of the model's own samples by reward; prompts without a difference are dropped."""
    torch.manual_seed(seed)
    completions = sample(model, tokenizer, [prompt for prompt in prompts for _ in range(samples)])
    pairs = []
    for index, prompt in enumerate(prompts):
        ranked = sorted(completions[index * samples : (index + 1) * samples], key=reward)
        if reward(ranked[-1]) > reward(ranked[0]):
            pairs.append({"prompt": prompt, "chosen": ranked[-1], "rejected": ranked[0]})
    return Dataset.from_list(pairs)


def build_optimizer(run: Run, model: LlamaForCausalLM, delta: fm.ReferenceDelta, seed: int) -> torch.optim.Optimizer:
    """The only place in which the methods differ."""
    common = {"lr": run.lr, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}
    if run.optimizer == "adamw":
        return torch.optim.AdamW(model.named_parameters(), **common)
    merging = {"ondare": fm.OnDAREAdamW, "onties": fm.OnTIESAdamW}[run.optimizer]
    return merging(
        model.named_parameters(),
        reference_delta=delta,
        alpha=run.alpha,
        reserve_rate=run.reserve_rate,
        seed=seed,
        **common,
    )


class _Advance(TrainerCallback):
    """Moves our progress bar instead of the trainer's."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.advance()


def train_dpo(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Dataset,
    optimizer: torch.optim.Optimizer,
    steps: int,
    order: int,
    folder: Path,
    advance: Advance,
) -> None:
    """Preference training with TRL; `order` seeds the order of the pairs, nothing else is random."""
    arguments = DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=optimizer.param_groups[0]["lr"],
        lr_scheduler_type="linear",
        warmup_steps=10,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=128,
        seed=order,
        data_seed=order,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        precompute_ref_log_probs=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[_Advance(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
