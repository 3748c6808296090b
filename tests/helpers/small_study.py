"""The study of bench/study on a model and data that are next to nothing, in one process or sharded over several."""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench/alignment_tax"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench/study"))  # first: both have a run.py

import afterwards
import plan
import pytest
import real
import run
import study_jobs
import torch
from data import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# Of the averages, one of each family.
FEW_AVERAGES = {"UNIFORM_RATIOS": (0.5,), "PART_RATIOS": (0.5,), "SEARCHED_PARTS": (2,)}


def write_model(folder: Path, layers: int = 6) -> Path:
    """As many layers as the study cuts a model into parts, and a token for each character."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.2,  # so that answers differ from model to model
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(file: Path, count: int = 38) -> Path:
    """Different prompts, and answers at random; without the 6 held out, halves of whole batches."""
    rng = random.Random(0)

    def words() -> str:
        return "".join(rng.choices("abcdefgh ", k=8))

    rows = [{"prompt": f"tell {i}:", "chosen": words(), "rejected": words()} for i in range(count)]
    file.write_text(json.dumps(rows))
    return file


def size(*algorithms: str, **changes) -> plan.Size:
    few = {
        "tuning_seed": None,
        "seeds": (0,),
        "orders": (0,),
        "steps": 3,
        "batch": 4,
        "micro_batch": 2,
        "warmup": 1,
        "prompts": 12,
        "samples": 2,
        "new_tokens": 6,
        "max_length": 64,
        "generation_batch": 32,
        "generated_at_once": 8,
        "examined_prompts": 6,
        "examined_tasks": 1,
        "answers": 8,
        "search_steps": 2,
        "reward_search_steps": 2,
        "reward_search_answers": 4,
    }
    return plan.Size("small", algorithms=algorithms, **few | changes)


def world(out: Path, data: Path, *algorithms: str, **changes) -> real.Real:
    """The world of `data`, which has a model, pairs and a text; at a learning rate that a few steps show."""
    return real.Real(
        out,
        size(*algorithms, **changes),
        str(data / "base"),
        str(data / "pairs.json"),
        device="cpu",
        text=data / "text.txt",
        lr=1e-3,
    )


def write_data(folder: Path) -> Path:
    """All that a world reads."""
    write_model(folder / "base")
    write_pairs(folder / "pairs.json")
    (folder / "text.txt").write_text("All texts are made of words. " * 10)
    return folder


@contextmanager
def smaller(*contenders: str):
    """Leave out the other contenders and most averages, and let a few steps of SFT show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "SFT_LR", 3e-3)
        kept = {name: contender for name, contender in plan.CONTENDERS.items() if name in contenders}
        for module in (study_jobs, plan, run):
            patch.setattr(module, "CONTENDERS", kept)
        for name, value in FEW_AVERAGES.items():
            patch.setattr(afterwards, name, value)
        yield


def study(out: Path, data: Path, algorithms: tuple[str, ...], contenders: tuple[str, ...]) -> list[plan.Point]:
    """Run it, or go on with it, in this process."""
    run.quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    small = world(out, data, *algorithms)
    try:
        with smaller(*contenders), run.Study(small, small.size, out, workers=0) as running:
            return running.run()[0]
    finally:
        torch.set_num_threads(threads)


def prepare(out: Path, data: Path) -> None:
    """Make the start of seed 0 alone."""
    run.quiet()
    with smaller():
        world(out, data, "dpo").prepare(0)


# ---------------------------------------------------------------- several processes


def ready(rank: int) -> None:
    """Called first, so that the imports above belong to starting."""


def sharded(rank: int, function, *arguments):
    """Call a function as `accelerate launch` with bench/study/fsdp2.yaml starts the study, on CPUs by force."""
    import accelerated
    import transformers
    import yaml

    class Accelerator(accelerated.ForcedAccelerator):
        def __init__(self, *args, fsdp_plugin=None, **options):
            # The launcher hands its file over in the environment.
            super().__init__(*args, fsdp_plugin=accelerated.FullyShardedDataParallelPlugin(), **options)

    settings = yaml.safe_load((Path(run.__file__).parent / "fsdp2.yaml").read_text())["fsdp_config"]
    with accelerated.environment(rank), pytest.MonkeyPatch.context() as patch:
        os.environ.update({key.upper(): str(value) for key, value in settings.items()})
        patch.setattr(transformers.trainer, "Accelerator", Accelerator)
        return function(*arguments)
