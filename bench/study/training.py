"""One preference training with TRL's trainers: the algorithm, the contender's change to it, and what is kept of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from evaluate import Weights
from plan import ADAMW, ALGORITHMS, Algorithm, Size, Training
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PrinterCallback, TrainerCallback
from worlds import Batch, Start, weights_in

import fused_merge as fm

BETAS = (0.9, 0.98)
RESERVE_RATE = 0.5
MERGING: dict[str, dict[str, Any]] = {
    "OnDARE": {"method": "ondare"},
    "OnTIES": {"method": "onties"},
    "OnTIES, paper's vote": {"method": "onties", "vote": "paper"},
    "OnProj, gradient": {"method": "onproj", "project_on": "gradient"},
    "OnProj, update": {"method": "onproj", "project_on": "update"},
    "OnDARE, K = 8": {"method": "ondare", "merge_every": 8},
    "OnDARE, K = 64": {"method": "ondare", "merge_every": 64},
    "OnTIES, K = 8": {"method": "onties", "merge_every": 8},
    "OnTIES, K = 64": {"method": "onties", "merge_every": 64},
}


@dataclass
class Trained:
    """What a training leaves: its weights, and those that its contenders "after AdamW" took on the way.

    Under FSDP2 the tensors are whole, and on the first process only.
    """

    weights: Weights
    on_the_way: dict[tuple[str, float], Weights] = field(default_factory=dict)


def train(training: Training, start: Start, work: Path, kept: dict[str, tuple[float, ...]]) -> Trained:
    """Run one training.

    Args:
        training: what to run.
        start: where it begins.
        work: a folder for what trainers write; removed at the end.
        kept: for AdamW, which settings of early stop, EMA and BEMA to take on the way.
    """
    algorithm = ALGORITHMS[training.algorithm]
    model = start.model()
    callbacks, recorders = _callbacks(training, start, work, kept)
    trainer = _trainer(training, algorithm, model, start, work, callbacks)
    trainer.remove_callback(PrinterCallback)

    def create_optimizer(model: Any = None) -> torch.optim.Optimizer:
        trainer.optimizer = build_optimizer(training, trainer.model if model is None else model, start)
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    weights = whole_weights(trainer.model)
    if training.contender == "LoRA":
        weights = _merged_adapter(weights, start)
    trained = Trained(weights)
    for recorder in recorders:
        trained.on_the_way |= recorder()
    shutil.rmtree(work, ignore_errors=True)
    return trained


# ---------------------------------------------------------------- algorithms


def common_arguments(size: Size, device: str, processes: int, work: Path) -> dict[str, Any]:
    """What every trainer of the study is told, of the SFT too."""
    cuda = device == "cuda"
    return {
        "output_dir": str(work),
        "per_device_train_batch_size": size.micro_batch,
        "gradient_accumulation_steps": size.batch // (size.micro_batch * processes),
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": cuda,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def learning_rate(training: Training, start: Start) -> float:
    """The algorithm's, times what the contender makes of it."""
    factor = training.setting if training.contender in ("learning rate", "LoRA") else 1.0
    return ALGORITHMS[training.algorithm].lr * start.lr_factor * factor


def _trainer(
    training: Training, algorithm: Algorithm, model: Any, start: Start, work: Path, callbacks: list[TrainerCallback]
) -> Any:
    """TRL's trainer of the algorithm, with everything but the optimizer."""
    size, data = start.size, start.data
    common = common_arguments(size, start.device, start.processes, work)
    common |= {
        "max_steps": size.steps,
        "learning_rate": learning_rate(training, start),
        "warmup_steps": size.warmup,
        "seed": training.order,
        "data_seed": training.order,
    }
    built: dict[str, Any] = {"model": model, "processing_class": start.tokenizer, "callbacks": callbacks}
    if training.contender == "LoRA":
        built["peft_config"] = lora()
    beta = {}
    if algorithm.beta is not None:
        beta = {"beta": algorithm.beta * (training.setting if training.contender == "beta" else 1.0)}
    # What is precomputed lies in a temporary file, which other processes do not find; they keep the reference model.
    precomputed = {"precompute_ref_log_probs": start.processes == 1, "precompute_ref_batch_size": 32}
    offline = {"max_length": size.max_length, **precomputed, **beta}

    if algorithm.name in ("dpo", "ipo"):
        loss = "ipo" if algorithm.name == "ipo" else "sigmoid"
        arguments = trl.DPOConfig(loss_type=loss, **offline, **common)
        return trl.DPOTrainer(args=arguments, train_dataset=Dataset.from_list(data["pairs"]), **built)
    if algorithm.name == "kto":
        listed = [
            {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
            for pair in data["pairs"]
            for kind in ("chosen", "rejected")
        ]
        # KTO's trainer reads its data in their order, and its KL term pairs a prompt with its neighbor's answer.
        shuffled = Dataset.from_list(listed).shuffle(seed=training.order)
        return trl.KTOTrainer(args=trl.KTOConfig(**offline, **common), train_dataset=shuffled, **built)
    if algorithm.name == "rft":
        arguments = trl.SFTConfig(max_length=size.max_length, **common)
        return trl.SFTTrainer(args=arguments, train_dataset=Dataset.from_list(data["best"]), **built)
    if algorithm.name == "grpo":

        def rewards(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return start.reward(prompts, completions)

        arguments = trl.GRPOConfig(
            num_generations=4,
            generation_batch_size=size.generated_at_once,
            max_completion_length=size.new_tokens,
            **beta,
            **common,
        )
        prompts = Dataset.from_list([{"prompt": prompt} for prompt in data["prompts"]])
        return trl.GRPOTrainer(reward_funcs=rewards, args=arguments, train_dataset=prompts, **built)
    raise ValueError(f"unknown algorithm {algorithm.name!r}; the algorithms are {', '.join(ALGORITHMS)}")


def lora() -> peft.LoraConfig:
    """Low-rank adapters of all linear layers."""
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _merged_adapter(weights: Weights, start: Start) -> Weights:
    """The weights of a model whose adapter is merged into it."""
    if not weights:  # not the first process
        return weights
    adapted = peft.get_peft_model(start.model(), lora())
    adapted.load_state_dict(weights, strict=False)  # a tied head is there once
    return whole_weights(adapted.merge_and_unload())


def whole_weights(model: Any) -> Weights:
    """The parameters of a model in main memory, tied ones once; under FSDP2 whole, on the first process only."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = dict(model.named_parameters())
    return {name: tensor.clone() for name, tensor in state.items() if name in names}


# ---------------------------------------------------------------- optimizers


def build_optimizer(training: Training, model: Any, start: Start) -> torch.optim.Optimizer:
    """AdamW, Muon, or one of ours; all else about the optimizers is the same."""
    name = training.contender
    common = {"lr": learning_rate(training, start), "betas": BETAS, "eps": 1e-8, "weight_decay": 0.0}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if name in MERGING:
        every = MERGING[name].get("merge_every", 1)
        options = {**MERGING[name], "alpha": every * training.setting, "seed": training.seed}
        if options["method"] != "onproj":
            options["reserve_rate"] = RESERVE_RATE
        return fm.MergingAdamW(named, reference_delta=_delta(start), **options, **common)
    if name.startswith("Muon"):
        optimizer = MuonAndAdamW(named, **common)
        if name != "Muon":
            for each in optimizer.optimizers:
                fm.OnlineMerging(
                    each,
                    reference_delta=_delta(start),
                    method="ondare",
                    alpha=training.setting,
                    reserve_rate=RESERVE_RATE,
                    seed=training.seed,
                )
        return optimizer
    return torch.optim.AdamW(named, **common)


def _delta(start: Start) -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_checkpoints(start.folder / "base", start.folder / "sft")


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of layers, AdamW for embeddings, norms and biases: one optimizer for a trainer."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], lr: float, **adamw: Any) -> None:
        hidden = [(name, parameter) for name, parameter in named if parameter.ndim == 2 and ".layers." in name]
        taken = {name for name, _ in hidden}
        rest = [(name, parameter) for name, parameter in named if name not in taken]
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, torch.optim.AdamW(rest, lr=lr, **adamw)]
        super().__init__([{"params": [p for _, p in pairs], "lr": lr} for pairs in (hidden, rest)], {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Step both with what a scheduler or a framework has set here."""
        for optimizer, group in zip(self.optimizers, self.param_groups, strict=True):
            # FSDP2 has put shards in the place of the parameters.
            optimizer.param_groups[0] |= {"lr": group["lr"], "params": group["params"]}
            optimizer.step()


# ---------------------------------------------------------------- what changes the steps, or watches them


def _callbacks(
    training: Training, start: Start, work: Path, kept: dict[str, tuple[float, ...]]
) -> tuple[list[TrainerCallback], list[Callable[[], dict[tuple[str, float], Weights]]]]:
    """The callbacks of a contender, and those whose records are read afterwards."""
    name, setting, steps = training.contender, training.setting, start.size.steps
    if name == "L2 to SFT":
        # What is pulled back grows with the learning rate, and the gradient of the loss does not.
        return [_PullToStart(setting / start.lr_factor)], []
    if name == "SFT replay":
        return [_Replay(setting, start.replay(1000 * training.seed + training.order))], []
    if name == "half back to SFT":
        return [_HalfBack(round(setting * steps))], []
    if name != ADAMW:
        return [], []
    stops = _EarlyStops({round(share * steps): share for share in kept.get("early stop", ())})
    averages = [_Average(decay) for decay in kept.get("weight EMA", ())]
    bemas = [_Bema(power, work / f"bias_power{power}", start.device) for power in kept.get("BEMA", ())]
    recorders = [stops, *averages, *bemas]
    return recorders, [recorder.recorded for recorder in recorders]


class _WithStart(TrainerCallback):
    """Remembers where the training began."""

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self.start = [parameter.detach().clone() for parameter in model.parameters()]


class _PullToStart(_WithStart):
    """The gradient of strength/2 |theta - theta_start|^2, there before that of the loss is added to it."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        for parameter, start in zip(model.parameters(), self.start, strict=True):
            parameter.grad = (parameter.detach() - start) * self.strength


class _Replay(TrainerCallback):
    """The gradient of weight times the SFT loss on a batch of SFT data, there before that of the loss is added."""

    def __init__(self, weight: float, batches: Iterator[Batch]) -> None:
        self.weight = weight
        self.batches = batches

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        batch = {key: value.to(model.device) for key, value in next(self.batches).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        (self.weight * loss).backward()


class _HalfBack(_WithStart):
    """Every so many steps halfway back to the start (arXiv 2501.05559)."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step % self.every == 0:
            with torch.no_grad():
                for parameter, start in zip(model.parameters(), self.start, strict=True):
                    parameter.lerp_(start, 0.5)


class _EarlyStops(TrainerCallback):
    """The weights after some of the steps."""

    def __init__(self, steps: dict[int, float]) -> None:
        self.steps = steps
        self.found: dict[tuple[str, float], Weights] = {}

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step in self.steps:
            self.found["early stop", self.steps[state.global_step]] = whole_weights(model)

    def recorded(self) -> dict[tuple[str, float], Weights]:
        return self.found


class _Average(TrainerCallback):
    """torch's exponential moving average of the weights; of a sharded model, of each process's elements."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.found: Weights = {}

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self.own = torch.nn.ParameterList([_local(parameter) for parameter in model.parameters()])
        self.average = AveragedModel(self.own, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.average.update_parameters(self.own)  # begins at the start, as the average of one

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.average.update_parameters(self.own)

    def on_train_end(self, args, state, control, model, **kwargs) -> None:
        trained = [own.detach().clone() for own in self.own]
        with torch.no_grad():
            for own, average in zip(self.own, self.average.module, strict=True):
                own.copy_(average)
            self.found = whole_weights(model)
            for own, back in zip(self.own, trained, strict=True):
                own.copy_(back)

    def recorded(self) -> dict[tuple[str, float], Weights]:
        return {("weight EMA", self.decay): self.found}


def _local(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter that shares its memory with one, or with this process's shard of it."""
    tensor = parameter.detach()
    return torch.nn.Parameter(tensor.to_local() if hasattr(tensor, "to_local") else tensor, requires_grad=False)


class _Bema(trl.BEMACallback):
    """TRL's bias-corrected average, updated every step; it writes its model beside the trainer's files."""

    def __init__(self, power: float, folder: Path, device: str) -> None:
        super().__init__(update_freq=1, bias_power=power, device=device)
        self.power = power
        self.folder = folder

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.running_model.save_pretrained(self.folder)

    def recorded(self) -> dict[tuple[str, float], Weights]:
        return {("BEMA", self.power): weights_in(self.folder)}
