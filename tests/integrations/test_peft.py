"""Training adapters of PEFT with a reference delta of adapters."""

from __future__ import annotations

import pytest
import torch
from adapters import adapted, load_adapter, save_adapter
from bits import assert_same_bits
from datasets import Dataset
from folders import load
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tiny import llama, save
from trl import DPOConfig, DPOTrainer
from word_tokens import tokenizer

import fused_merge as fm

OPTIONS = {"lr": 1e-2, "alpha": 0.2, "reserve_rate": 0.5}


@pytest.fixture
def folders(tmp_path):
    return save_adapter(tmp_path / "first", 0), save_adapter(tmp_path / "sft", 1)


def trained(model, delta, optimizer=fm.OnDAREAdamW, **options):
    """Three steps on the sum of all logits, of the parameters that have gradients."""
    made = optimizer(
        [(name, x) for name, x in model.named_parameters() if x.requires_grad],
        reference_delta=delta, **{**OPTIONS, **options},
    )  # fmt: skip
    for _ in range(3):
        made.zero_grad()
        model(torch.arange(9)[None]).logits.pow(2).sum().backward()
        made.step()
    return {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


def test_a_delta_has_the_names_of_the_files_and_is_one_from_wherever(folders, tmp_path):
    whole = [load(folder) for folder in folders]
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    assert set(delta.names) == set(whole[0])
    for name in delta.names:
        assert_same_bits(delta.tensor(name), whole[1][name] - whole[0][name])
    files = [folder / "adapter_model.safetensors" for folder in folders]
    lone = tmp_path / "lone.safetensors"
    save_file(whole[1], lone)
    models = [load_adapter(folder) for folder in folders]
    named = PeftModel.from_pretrained(llama(0, tied=False), str(folders[1]), adapter_name="mine")
    for other in (
        fm.ReferenceDelta.from_checkpoints(*files),
        fm.ReferenceDelta.from_checkpoints(files[0], lone),
        fm.ReferenceDelta.from_models(*models),
        fm.ReferenceDelta.from_models(folders[0], named),
        fm.ReferenceDelta.from_models(*whole),
        fm.ReferenceDelta.load(delta.save(tmp_path / "tau.safetensors")),
    ):
        assert other.identity == delta.identity
    # Unnamed parameters go by the order of the model.
    assert fm.ReferenceDelta.from_models(*models).ordered


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_masks_are_keyed_by_the_names_of_the_file(adapter, folders):
    """Whatever the adapter is called in memory, the steps are those of parameters with the names of the file."""
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    model = PeftModel.from_pretrained(
        llama(0, tied=False), str(folders[1]), adapter_name=adapter, is_trainable=True
    ).eval()
    by_name = {name.replace(f".{adapter}.", "."): x for name, x in model.named_parameters() if x.requires_grad}
    copies = {name: torch.nn.Parameter(x.detach().clone()) for name, x in by_name.items()}
    assert copies.keys() == set(delta.names)
    made = fm.OnDAREAdamW(
        [(name, x) for name, x in model.named_parameters() if x.requires_grad], reference_delta=delta, **OPTIONS
    )
    plain = fm.OnDAREAdamW(copies.items(), reference_delta=delta, **OPTIONS)
    for _ in range(3):
        made.zero_grad()
        model(torch.arange(9)[None]).logits.pow(2).sum().backward()
        for name, copy in copies.items():
            copy.grad = by_name[name].grad.clone()
        made.step()
        plain.step()
        for name, copy in copies.items():
            assert_same_bits(by_name[name].detach(), copy.detach())


def test_dora_embeddings_and_modules_to_save_have_a_tau_too(tmp_path):
    config = {"use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folders = [save_adapter(tmp_path / str(i), i, **config) for i in range(2)]
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    assert {
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    } < (set(delta.names))
    after = trained(adapted(1, **config), delta, missing="error")
    assert len(after) == len(delta)
    config = {"target_modules": ["embed_tokens", "q_proj"]}
    folders = [save_adapter(tmp_path / f"e{i}", i, **config) for i in range(2)]
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    assert len(trained(adapted(1, **config), delta, missing="error")) == len(delta)


def test_scales_that_differ_are_warned_of(tmp_path, caplog):
    folders = [save_adapter(tmp_path / str(i), i, lora_alpha=8 * (i + 1)) for i in range(2)]
    fm.ReferenceDelta.from_checkpoints(*folders)
    assert "differ in lora_alpha (8 against 16): the same factors mean another product in each" in caplog.text


@pytest.mark.parametrize("missing", ["error", "plain"])
def test_a_delta_of_full_weights_is_refused(missing, tmp_path):
    ends = [save(llama(i, tied=False), tmp_path / str(i)) for i in range(2)]
    delta = fm.ReferenceDelta.from_checkpoints(*ends)
    model = adapted(0)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    with pytest.raises(
        ValueError,
        match=r"delta is of full weights, such as 'model.layers.0.self_attn.q_proj.weight', and '.*A.weight' is "
        r"a factor of an adapter, .*; make the delta of two adapters, with ReferenceDelta.from_checkpoints",
    ):
        trained(model, delta, missing=missing)
    assert_same_bits({name: x.detach() for name, x in model.named_parameters()}, before)


def test_a_delta_of_a_model_and_an_adapter_is_refused(folders, tmp_path):
    base = save(llama(0, tied=False), tmp_path / "base")
    for make, ends in (
        (fm.ReferenceDelta.from_checkpoints, (base, folders[0])),
        (fm.ReferenceDelta.from_models, (llama(0, tied=False), load_adapter(folders[0]))),
    ):
        with pytest.raises(ValueError, match=r"holds factors of an adapter, .* holds none; give two adapters, such as"):
            make(*ends)


def test_a_model_with_an_adapter_is_not_moved(folders):
    models = [load_adapter(folder) for folder in folders]
    with pytest.raises(ValueError, match=r"holds factors of an adapter, .* of which only the product can be merged"):
        fm.RatioSweep(load_adapter(folders[0]), *models)


# --- TRL


def trainer(model, folder, **options):
    """A DPO trainer of TRL on the CPU, on pairs of words."""
    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 9} w{i + 8} w5"}
        for i in range(3, 19)
    ]
    args = DPOConfig(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="steps", save_steps=2, logging_steps=1, max_grad_norm=0.0, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **options)


def by_factory(trainer, delta):
    """Let the trainer make the optimizer of the model that it has, and record what each step is given."""
    steps = []

    def build(model, **_):
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
        start = {name: x.detach().clone() for name, x in named}
        optimizer = fm.OnDAREAdamW(named, reference_delta=delta, **OPTIONS)

        def record(made, *_):
            steps.append((made.param_groups[0]["lr"], {name: x.grad.clone() for name, x in named}))

        optimizer.register_step_pre_hook(record)
        steps.append(start)
        return optimizer

    trainer.optimizer_cls_and_kwargs = (lambda: build, {})
    return steps


def replay(steps, delta):
    """The same steps on tensors that have the names of the file."""
    start, *steps = steps
    copies = {name.replace(".default.", "."): torch.nn.Parameter(x.clone()) for name, x in start.items()}
    optimizer = fm.OnDAREAdamW(copies.items(), reference_delta=delta, **OPTIONS)
    for lr, grads in steps:
        optimizer.param_groups[0]["lr"] = lr
        for copy, grad in zip(copies.values(), grads.values(), strict=True):
            copy.grad = grad
        optimizer.step()
    return {name: x.detach() for name, x in copies.items()}


@pytest.mark.parametrize("path", ["peft_config", "adapter"])
def test_dpo_from_the_initial_adapter_and_from_that_of_sft(path, folders, tmp_path):
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    base, options = llama(0, tied=False), {}
    if path == "peft_config":
        options["peft_config"] = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
    else:
        base = PeftModel.from_pretrained(base, str(folders[1]), is_trainable=True)
    made = trainer(base, tmp_path / "run", **options)
    steps = by_factory(made, delta)
    made.train()
    model = made.accelerator.unwrap_model(made.model)
    # The reference of the loss is a frozen copy, which has no part in the merge.
    assert path == "peft_config" or any(".ref." in each for each, _ in model.named_parameters())
    found = {each.replace(".default.", "."): x.detach() for each, x in model.named_parameters() if x.requires_grad}
    assert len(steps) == 4
    assert_same_bits(found, replay(steps, delta))
    assert all((x.detach() != steps[0][each]).any() for each, x in model.named_parameters() if x.requires_grad)
    # What was saved is an adapter again, of which a delta can be made.
    saved = tmp_path / "saved"
    made.save_model(str(saved))
    assert_same_bits(load(saved), found)


def test_dpo_resumes_bit_for_bit(folders, tmp_path):
    delta = fm.ReferenceDelta.from_checkpoints(*folders)
    ends = []
    for resumed in (False, True):
        model = PeftModel.from_pretrained(llama(0, tied=False), str(folders[1]), is_trainable=True)
        made = trainer(model, tmp_path / "run")
        by_factory(made, delta)
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resumed else None)
        ends.append({name: x.detach() for name, x in model.named_parameters() if x.requires_grad})
    assert_same_bits(*ends)


def test_attach_makes_the_delta_of_the_adapter_in_training(folders, tmp_path):
    ends = []
    for given in ({"reference_delta": fm.ReferenceDelta.from_checkpoints(*folders)}, {"base": folders[0]}):
        model = PeftModel.from_pretrained(llama(0, tied=False), str(folders[1]), is_trainable=True)
        made = trainer(model, tmp_path / "run")
        fm.attach(made, **given, alpha=0.2, reserve_rate=0.5)
        made.train()
        ends.append({name: x.detach() for name, x in model.named_parameters() if x.requires_grad})
    assert_same_bits(*ends)
