"""The inputs of `bench/bench_checkpoints.py`: two checkpoints; and outputs held against them, bit for bit."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

SIGMA, DELTA = 0.02, 1e-3
CHUNK = 2**20
# Of inner ratios, how many elements are compared for one provider.
COMPARED = 5 * 10**8
# What docs/explanation/numerics.md promises of 16-bit weights.
MOST_OFF = 1e-4


# ---------------------------------------------------------------- inputs


class Pair(NamedTuple):
    """Two checkpoints of the same shape, sharded in the same way."""

    base: Path
    tuned: Path
    parameters: int

    @property
    def bytes(self) -> int:
        """Bytes of the tensors of one of them."""
        return 2 * self.parameters

    def files(self) -> list[Path]:
        """Return the shards of both."""
        return [file for folder in (self.base, self.tuned) for file in sorted(folder.glob("*.safetensors"))]


def llama(parameters: float) -> dict[str, Any]:
    """Return the configuration of a Llama of about so many parameters, as wide for its depth as they are."""
    hidden = max(64, 64 * round((4 * parameters) ** (1 / 3) / 64))
    intermediate = 64 * round(8 / 3 * hidden / 64)
    vocabulary = min(32000, max(64, round(parameters / (4 * hidden))))
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": max(1, round((parameters - vocabulary * hidden) / layer)),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Llama, in the order of its files; a tied head is left out."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            **{f"self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"},
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        result |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return result | {"model.norm.weight": (hidden,)}


def pair_at(work: Path, size: float) -> tuple[Pair, dict[str, Any], bool]:
    """Return where the pair of a size lies, its configuration, and whether it is there already."""
    config = llama(size * 1e9)
    folder = work / f"pair-{size:g}B"
    pair = Pair(folder / "base", folder / "tuned", sum(map(math.prod, shapes(config).values())))
    # Written last, so with it the folder is whole.
    files = [checkpoint / "config.json" for checkpoint in (pair.base, pair.tuned)]
    return pair, config, all(file.is_file() and json.loads(file.read_bytes()) == config for file in files)


def make_pair(pair: Pair, config: Mapping[str, Any]) -> None:
    """Write both checkpoints tensor by tensor, always the same: normal weights, and normal changes to them."""
    from fused_merge.io.writer import SafetensorsWriter

    print(f"making two checkpoints of {pair.parameters / 1e9:.3g} B parameters in {pair.base.parent}", flush=True)
    shutil.rmtree(pair.base.parent, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    done = 0
    shards: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, shape in shapes(config).items():
        shards[2 * done >= pair.parameters][name] = (torch.bfloat16, shape)
        done += math.prod(shape)
    for i, manifest in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(manifest, file)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(SafetensorsWriter(folder / file, manifest, {"format": "pt"}))
                for folder in (pair.base, pair.tuned)
            ]
            for name, (dtype, shape) in manifest.items():
                tensors = [torch.empty(math.prod(shape), dtype=dtype) for _ in writers]
                for base, tuned in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
                    base.copy_(SIGMA * torch.randn(base.shape, generator=generator))
                    tuned.copy_(base.float() + DELTA * torch.randn(base.shape, generator=generator))
                for writer, tensor in zip(writers, tensors, strict=True):
                    writer.write(name, tensor.view(shape))
    for folder in (pair.base, pair.tuned):
        index = {"metadata": {"total_size": pair.bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- bits


class Failure(Exception):
    """A provider that did not do what it was asked."""


class Bits(NamedTuple):
    """What was found between the ends of a line."""

    compared: int = 0  # elements
    off: int = 0  # not the exact value rounded once
    ulps: int = 0  # the largest distance, but for these:
    ulps_cancelled: int = 0  # where the line crosses zero, and an ulp is less than fp32 can tell apart at the ends


def rounded_once(x: torch.Tensor) -> torch.Tensor:
    """Round float64 to bf16, to nearest with ties to even, without the stop at float32 that a conversion makes.

    Args:
        x: float64 of any shape; zero or of a magnitude that bf16 has normal numbers for.
    """
    bits = x.view(torch.int64)
    # 52 bits after the point become 7; a carry into the exponent is right.
    return (((bits >> 45 & 1) + bits + (2**44 - 1)) & -(2**45)).view(torch.float64).bfloat16()


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Return bf16 as integers in the order of the values: neighbors are one apart, and both zeros are 0."""
    bits = x.view(torch.int16).long()
    return torch.where(bits >= 0, bits, -(2**15) - bits)


class Checkpoint:
    """The tensors of a folder, by name, without its index."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        self.names = sorted(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def compare(pair: Pair, ratios: Sequence[float], out: Path) -> Bits:
    """Hold the outputs below `out` against the inputs, bit for bit, and between them against float64 rounded once.

    At the ends every tensor is compared, between them whole tensors: all where these are small enough, else some that
    chance chooses, always the same.

    Raises:
        Failure: if an output is missing or has other tensors, an end is not a copy, or a value is further off than
            docs/explanation/numerics.md allows.
    """
    folders = {min(ratios, key=lambda r: abs(r - float(path.name[1:]))): path for path in out.glob("r*")}
    if sorted(folders) != sorted(ratios):
        raise Failure(f"{out} has folders for the ratios {sorted(folders)} and not for {sorted(ratios)}")
    found = Bits()
    with ExitStack() as stack:
        base, tuned = Checkpoint(pair.base, stack), Checkpoint(pair.tuned, stack)
        made = {ratio: Checkpoint(folders[ratio], stack) for ratio in ratios}
        for ratio, points in made.items():
            if points.names != base.names:
                raise Failure(f"{folders[ratio]} does not hold the tensors of {pair.base}")
            for name in base.names if ratio in (0, 1) else ():
                end = (tuned if ratio else base)[name]
                if not torch.equal(points[name].view(torch.int16), end.view(torch.int16)):
                    raise Failure(f"{name!r} of {folders[ratio]} is not a copy")
        for name in random.Random(0).sample(base.names, len(base.names)):
            if found.compared >= COMPARED:
                break
            for ratio in set(ratios) - {0, 1}:
                found = compare_tensor(base[name], tuned[name], made[ratio][name], ratio, found)
    if found.ulps > 1 or found.off > MOST_OFF * found.compared:
        raise Failure(f"{sentence(found)}: more than the numerics contract allows")
    return found


def compare_tensor(base: torch.Tensor, tuned: torch.Tensor, point: torch.Tensor, ratio: float, found: Bits) -> Bits:
    """Return the findings with those of one more tensor."""
    compared, off, ulps, ulps_cancelled = found
    for a, b, p in zip(*(x.flatten().split(CHUNK) for x in (base, tuned, point)), strict=True):
        start, end = a.double(), b.double()
        exact = rounded_once(start + ratio * (end - start))
        compared += a.numel()
        if torch.equal(p, exact):
            continue
        distance = (ordered(p) - ordered(exact)).abs()
        cancelled = (p.double() - exact.double()).abs() <= 2**-23 * torch.maximum(start.abs(), end.abs())
        off += int(distance.count_nonzero())
        ulps = max(ulps, int((distance * ~cancelled).max()))
        ulps_cancelled = max(ulps_cancelled, int((distance * cancelled).max()))
    return Bits(compared, off, ulps, ulps_cancelled)


def sentence(found: Bits) -> str:
    """Return findings as words."""
    text = f"of {found.compared:.3g} elements {found.off} are not float64 rounded once, by at most {found.ulps} ulp"
    return text + f", {found.ulps_cancelled} where the line crosses zero" * bool(found.ulps_cancelled)
