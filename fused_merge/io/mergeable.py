"""What looks like a model and cannot be merged: quantized checkpoints and adapters.

The codes of a quantized tensor are numbers only together with its scales, and the two factors of an adapter only
together with each other. Merged apart, they give weights that are neither model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fused_merge.io.formats import MERGE_ADAPTER
from fused_merge.io.sources import TensorSource

# The factors of LoRA and its relatives, by PEFT and by kohya's scripts.
_FACTOR = re.compile(
    r"(?:^|[._\n])(?:lora_(?:[AB]|embedding_[AB]|magnitude_vector|down|up)|ia3_l|hada_w1_a|lokr_w[12]|oft_[rR]"
    r"|vera_lambda_[bd])(?:[._\n]|$)"
)
# Integers of 64 bits are indices and counters.
_CODES = frozenset({torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32})
_FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})
# Last components of names that only quantized layers have.
_CODE_NAMES = frozenset({"qweight", "q_weight", "W_q", "weight_packed", "trellis"})
# Masks and tables of indices, as some models keep them beside a scale of their own.
_NO_CODES = re.compile(r"bias|mask|index|ids|position")
_NO_SCALES = frozenset({"logit_scale", "layer_scale"})

# How Transformers makes plain tensors of a quantized checkpoint; of other methods it cannot.
_WHEN_LOADED = "load it with Transformers and quantization_config={}(dequantize=True), and save that"
_AFTERWARDS = "load it with Transformers, and save what model.dequantize() returns"
_HOW = {
    **dict.fromkeys(("bitsandbytes", "higgs"), _AFTERWARDS),
    **dict.fromkeys(("fp8", "mxfp8"), _WHEN_LOADED.format("FineGrainedFP8Config")),
    "mxfp4": _WHEN_LOADED.format("Mxfp4Config"),
    "compressed-tensors": _WHEN_LOADED.format("CompressedTensorsConfig"),
    "metal": _WHEN_LOADED.format("MetalConfig"),
}
_ORIGINAL = "take the checkpoint that it was made of"


def factor_in(source: TensorSource) -> str | None:
    """Return a tensor of a source that is a factor of an adapter, if one is."""
    # All names at once, since there may be hundreds of thousands.
    return next(filter(_FACTOR.search, source), None) if _FACTOR.search("\n".join(source)) else None


def check_mergeable(source: TensorSource, *, factors: bool = False) -> None:
    """Raise ValueError if a source holds codes of a quantized model or factors of an adapter; reads no tensor.

    With `factors` those are accepted.
    """
    if not factors and (factor := factor_in(source)):
        raise ValueError(
            f"{source.origin} holds factors of an adapter, such as {factor!r}, of which only the product can be "
            f"merged; {MERGE_ADAPTER}"
        )
    found = next(_quantized(source), None)
    said = _method_in(source.config)
    if found is not None:
        codes, beside, method = found
        method = said or method
        raise ValueError(
            f"{source.origin} is quantized{f' ({method})' if method else ''}: {codes!r} is {source.dtype(codes)}"
            f"{f', with {beside!r}' if beside else ''}; dequantize it first: {_HOW.get(method or '', _ORIGINAL)}"
        )
    if said is not None:
        raise ValueError(
            f"{source.origin} is quantized ({said}), as its config.json says; dequantize it first: "
            f"{_HOW.get(said, _ORIGINAL)}; if its tensors are plain, remove quantization_config there"
        )


def _quantized(source: TensorSource) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield tensors of codes, with what lies beside them and the method, where these are known."""
    if not (_CODES | _FLOAT8) & source.dtypes.keys():
        return
    codes = [name for name in source if source.dtype(name) in _CODES | _FLOAT8 and len(source.shape(name)) > 1]
    if not codes:
        return
    modules: dict[str, list[str]] = {}
    for name in source:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for name in codes:
        module, _, own = name.rpartition(".")
        # bitsandbytes keeps what belongs to W.weight under W.weight.absmax and so on.
        beside = [other for other in (*modules[module], *modules.get(name, ())) if other != name]
        float8 = source.dtype(name) in _FLOAT8
        if block := next((x for x in beside if x in (f"{name}.absmax", f"{name}.quant_map", f"{module}.SCB")), None):
            yield name, block, "bitsandbytes"
        elif _is_scale(own) or (_NO_CODES.search(own) and not float8):
            continue
        elif scale := next((x for x in beside if _is_scale(x.rpartition(".")[2])), None):
            known = {f"{name}_scale_inv": "fp8", name.removesuffix("_blocks") + "_scales": "mxfp4"}
            yield name, scale, known.get(scale)
        elif not float8 and (own == "weight" or own in _CODE_NAMES):
            yield name, None, None


def _is_scale(name: str) -> bool:
    return "scale" in name and name not in _NO_SCALES


def _method_in(config: Mapping[str, Any]) -> str | None:
    """Return the method of quantization that a configuration names, for all of a model or a part of it."""
    for part in (config, *config.values()):
        for key in ("quantization_config", "compression_config") if isinstance(part, Mapping) else ():
            if said := part.get(key):
                flags = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
                known = said if isinstance(said, Mapping) else {}
                default = "bitsandbytes" if any(map(known.get, flags)) else key
                return str(known.get("quant_method") or default)
    return None
