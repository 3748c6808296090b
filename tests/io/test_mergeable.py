"""Quantized checkpoints, adapters and other formats are recognized as what they are, and nothing else is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import fused_merge as fm
from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.sources import open_source

LAYER = "model.layers.0.mlp.down_proj"
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


def source(tensors: dict[str, tuple[torch.dtype, list[int]]], **more):
    """Tensors of a layer beside one that no method quantizes."""
    own = {f"{LAYER}.{name}": torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    return open_source({"model.norm.weight": torch.ones(4), **own, **more}, role="base")


QUANTIZED = {
    "GPTQ": ({"qweight": (torch.int32, [8, 8]), "qzeros": (torch.int32, [1, 1]), "scales": (torch.float16, [1, 8]),
              "g_idx": (torch.int32, [8])}, "qweight", "take the checkpoint that it was made of"),
    "AWQ": ({"scales": (torch.float16, [1, 8]), "qweight": (torch.int32, [8, 1])}, "qweight", "take the checkpoint"),
    "bitsandbytes, 8 bits": ({"weight": (torch.int8, [8, 8]), "SCB": (FP32, [8])}, "weight", r"model\.dequantize\(\)"),
    "bitsandbytes, 4 bits": (
        {"weight": (torch.uint8, [32, 1]), "weight.absmax": (torch.uint8, [1]), "weight.quant_map": (FP32, [16]),
         "weight.quant_state.bitsandbytes__nf4": (torch.uint8, [80])}, "weight", r"model\.dequantize\(\)"),
    "MXFP4": ({"gate_up_proj_blocks": (torch.uint8, [2, 8, 1, 16]), "gate_up_proj_scales": (torch.uint8, [2, 8, 1]),
               "down_proj_scales": (torch.uint8, [2, 8, 1]), "gate_up_proj_bias": (BF16, [2, 8])},
              "gate_up_proj_blocks", r"Mxfp4Config\(dequantize=True\)"),
    "fp8, blocks": ({"weight": (FP8, [8, 8]), "weight_scale_inv": (FP32, [1, 1])}, "weight",
                    r"FineGrainedFP8Config\(dequantize=True\)"),
    "fp8, static": ({"weight": (FP8, [8, 8]), "weight_scale": (BF16, []), "input_scale": (BF16, [])}, "weight",
                    "take the checkpoint"),
    "MXFP8": ({"weight": (FP8, [8, 8]), "weight_scale": (torch.uint8, [8, 1])}, "weight", "dequantize it first"),
    "compressed-tensors": ({"weight_packed": (torch.int32, [8, 1]), "weight_scale": (BF16, [8, 1]),
                            "weight_shape": (torch.int64, [2])}, "weight_packed", "dequantize it first"),
    "NVFP4": ({"weight": (torch.uint8, [8, 4]), "weight_scale": (FP8, [8, 1]), "weight_scale_2": (FP32, [])}, "weight",
              "dequantize it first"),
    "W8A8": ({"weight": (torch.int8, [8, 8]), "weight_scale": (FP32, [8, 1])}, "weight", "dequantize it first"),
    "HQQ": ({"W_q": (torch.uint8, [8, 4]), "scale": (torch.float16, [8, 1]), "zero": (torch.float16, [8, 1])}, "W_q",
            "dequantize it first"),
    "torchao": ({"_weight_qdata": (torch.int8, [8, 8]), "_weight_scale": (FP32, [8])}, "_weight_qdata", "dequantize"),
    "quanto": ({"weight._data": (torch.int8, [8, 8]), "weight._scale": (FP32, [8, 1])}, "weight._data", "dequantize"),
    "EXL2": ({"q_weight": (torch.int32, [8, 8]), "q_scale": (torch.int32, [1, 1])}, "q_weight", "dequantize"),
    "codes alone": ({"weight": (torch.int8, [8, 8])}, "weight", "dequantize it first"),
}  # fmt: skip


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_tensors_are_refused_by_what_they_are(method):
    tensors, codes, way_out = QUANTIZED[method]
    with pytest.raises(ValueError, match=rf"^base \(state dict\) is quantized.*'{LAYER}\.{codes}' is .*{way_out}"):
        check_mergeable(source(tensors))


PLAIN = {
    "indices and counters": {"position_ids": (torch.int64, [1, 8]), "num_batches_tracked": (torch.int64, [])},
    "a scale beside a table of indices": {"relative_position_index": (torch.int64, [4, 4]), "logit_scale": (FP32, [2])},
    "masks in bytes": {"attn.bias": (torch.uint8, [1, 1, 4, 4]), "attn.scale": (FP32, []), "m": (torch.bool, [4, 4])},
    "token ids": {"ids": (torch.int32, [4, 4]), "scale": (FP32, [])},
    "batch norm, layer scale, weight norm": {"running_var": (FP32, [4]), "layer_scale": (FP32, [4]),
                                             "weight_g": (FP32, [4, 1]), "weight_v": (FP32, [4, 4])},
    "state spaces": {"A_log": (FP32, [4, 4]), "dt_bias": (FP32, [4]), "conv1d.weight": (BF16, [4, 1, 4])},
    "scales of a cache of keys": {"weight": (BF16, [4, 4]), "k_scale": (FP32, []), "v_scale": (FP32, [])},
    "latent attention, a layer called lora": {"q_a_proj.weight": (BF16, [4, 4]), "w_lora.lora.0.weight": (BF16, [4])},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_tensors_are_not_refused(kind):
    check_mergeable(source(PLAIN[kind]))


# The first two are what Transformers writes, the third what llm-compressor did.
@pytest.mark.parametrize(
    ("config", "method", "way_out"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ({"text_config": {"quantization_config": {"load_in_4bit": True}}}, "bitsandbytes", r"model\.dequantize\(\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", "CompressedTensorsConf"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq", "take the checkpoint that it was made"),
    ],
)
def test_a_configuration_that_says_so_is_believed(config, method, way_out, tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None, "vision_config": {}}))
    check_mergeable(open_source(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = "if its tensors are plain, remove quantization_config there"
    with pytest.raises(ValueError, match=rf"is quantized \({method}\), as its config\.json says; .*{way_out}.*{plain}"):
        check_mergeable(open_source(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.q_proj.lora_A.weight",
        "q_proj.lora_B.weight",
        "embed.lora_embedding_A",
        "q_proj.lora_magnitude_vector",
        "lora_unet_mid_block.lora_down.weight",
        "k_proj.ia3_l",
    ],
)
def test_factors_of_adapters_are_refused(name):
    message = (
        rf"holds factors of an adapter, such as '{name}', of which only .*; merge it into its base first, with merge_"
    )
    with pytest.raises(ValueError, match=message):
        check_mergeable(open_source({name: torch.ones(2, 2), "norm.weight": torch.ones(2)}))


@pytest.fixture
def adapter(tmp_path):
    """An adapter that is not one of LoRA, under names that do not show what it is."""
    save_file({"q_proj.vectors": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    return tmp_path


def test_the_folder_of_an_adapter_is_recognized_unless_it_holds_a_model(adapter):
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(
            ValueError, match=r"is an adapter of the type 'VERA', as adapter_config\.json says.*; merge it into"
        ):
            open_source(path)
    save_file({"w": torch.ones(2)}, adapter / "model.safetensors")
    check_mergeable(open_source(adapter))


def test_gguf_is_recognized_by_its_first_bytes_and_by_its_folder(tmp_path):
    message = r"whose tensors are other ones and mostly quantized; take .* and gguf_file='x\.gguf', and save that"
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    with pytest.raises(ValueError, match=rf"holds x\.gguf, in GGUF, {message}"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=rf"x\.gguf is a GGUF file, {message}"):
        open_source(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a GGUF file"):
        open_source(tmp_path / "model.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_recognized(name, tmp_path):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name} .*\(it is a pointer of Git LFS to .* not here: run `git lfs pull`"):
        open_source(tmp_path)


def test_every_call_that_pairs_two_models_refuses_them(tmp_path):
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        codes = {f"{LAYER}.weight": torch.ones(8, 8).to(FP8), f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}
        save_file({"norm": torch.ones(2), **codes}, tmp_path / folder / "model.safetensors")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for call in (
        lambda: fm.interpolate_checkpoints(base, tuned, [0.5], tmp_path / "out"),
        lambda: fm.merge_checkpoints(base, {tuned: 0.5}, method="ties", out=tmp_path / "out"),
        lambda: fm.ReferenceDelta.from_checkpoints(base, tuned),
        lambda: fm.interpolate(dict(open_source(base)), dict(open_source(tuned)), [0.5]),
        lambda: fm.LayerRatios.by_parts(base, [0.2, 0.4]),
    ):
        with pytest.raises(ValueError, match=r"is quantized \(fp8\): .* dequantize it first: .*FineGrainedFP8Config"):
            call()
    assert not (tmp_path / "out").exists()
