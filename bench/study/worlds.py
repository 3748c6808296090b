"""What the study asks of a world: a toy that two CPU cores can train, or a real model with real data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from evaluate import Scores, Weights, sample
from plan import Size
from safetensors.torch import load_file

import fused_merge as fm

Batch = dict[str, torch.Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Where the trainings of a seed begin, and all that they are told.

    `folder` holds `base/`, `sft/` and `data.json`: `prompts`, `pairs` (prompt, chosen, rejected) and `best` (prompt,
    completion: the best-rewarded of the start's own answers).

    Attributes:
        load: reads a model from a folder, onto the device.
        examine: what a model earns and what it has kept.
        reward: of completions to prompts, one number for each.
        replay: batches of the SFT, from a seed.
        parts: K parts of the network from low to high, all at one ratio.
        device: where models are trained and examined.
        processes: how many train together, by FSDP2.
        lr_factor: of the learning rates of `plan.ALGORITHMS`, which are the toy's.
    """

    seed: int
    folder: Path
    size: Size
    tokenizer: Any
    load: Callable[[Path], Any]
    examine: Callable[[Any], Scores]
    reward: Callable[[Sequence[str], Sequence[str]], list[float]]
    replay: Callable[[int], Iterator[Batch]]
    parts: Callable[[int, float], fm.LayerRatios]
    device: str = "cpu"
    processes: int = 1
    lr_factor: float = 1.0

    @cached_property
    def data(self) -> dict[str, list[Any]]:
        """Prompts, pairs and best answers."""
        return json.loads((self.folder / "data.json").read_text())

    @cached_property
    def base(self) -> Weights:
        """The tensors of the base, in main memory."""
        return weights_in(self.folder / "base")

    @cached_property
    def sft(self) -> Weights:
        """The tensors from which preferences are trained."""
        return weights_in(self.folder / "sft")

    @cached_property
    def tau(self) -> Weights:
        """What SFT has added to the base."""
        return {name: tensor - self.base[name] for name, tensor in self.sft.items()}

    def model(self, weights: Weights | None = None) -> Any:
        """The start, or a model with other weights, in evaluation mode."""
        model = self.load(self.folder / "sft")
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        return model.eval()

    def answers(self, model: Any, prompts: Sequence[str], seed: int) -> list[str]:
        """The model's answers at temperature 1."""
        torch.manual_seed(seed)
        size = self.size
        return sample(model, self.tokenizer, prompts, new_tokens=size.new_tokens, at_once=size.generation_batch)


class World(Protocol):
    """Makes the starts; pickled for worker processes."""

    def prepare(self, seed: int) -> None:
        """Write the folder of a start; all of it or nothing. All processes call it."""

    def start(self, seed: int) -> Start:
        """Open what `prepare` wrote."""


def weights_in(folder: Path) -> Weights:
    """The tensors of a checkpoint, of one file or several."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def write_data(start: Start, prompts: Sequence[str], pairs: Sequence[dict[str, str]] | None = None) -> None:
    """Let the start answer every prompt several times, and write data.json.

    Without `pairs` the best answer to a prompt is preferred to the worst, where their rewards differ.
    """
    size = start.size
    repeated = [prompt for prompt in prompts for _ in range(size.samples)]
    answers = start.answers(start.model(), repeated, start.seed)
    rewards = start.reward(repeated, answers)
    best, own = [], []
    for first in range(0, len(repeated), size.samples):
        ranked = sorted(range(first, first + size.samples), key=lambda i: rewards[i])
        low, high = ranked[0], ranked[-1]
        best.append({"prompt": repeated[high], "completion": answers[high]})
        if rewards[high] > rewards[low]:
            own.append({"prompt": repeated[high], "chosen": answers[high], "rejected": answers[low]})
    content = {"prompts": list(prompts), "pairs": own if pairs is None else list(pairs), "best": best}
    (start.folder / "data.json").write_text(json.dumps(content, indent=0) + "\n")


# ---------------------------------------------------------------- processes that share a model


def processes() -> int:
    """How many train together; all see the same files, and the first writes them."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes, examines and answers."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: T) -> T:
    """What the first process passes, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
