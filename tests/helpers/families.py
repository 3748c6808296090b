"""Tiny random models of the families of architectures whose names on disk and in memory differ, or might."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

hf.utils.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

_TEXT = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 8, "patch_size": 4}
_LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8}
_LATENT |= {"first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
_LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_PLAIN = {name: _TEXT[name] for name in _TEXT if name != "num_key_value_heads"}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 24}

# Family -> class of its models and their configuration. The last one has float buffers that training moves, and
# deepseek-v3 one that is loaded.
FAMILIES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_TEXT)),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_TEXT)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_TEXT, head_dim=8)),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**_TEXT, **_ROUTED, head_dim=8)),
    "mixtral": (hf.MixtralForCausalLM, lambda: hf.MixtralConfig(**_TEXT, num_local_experts=4)),
    "deepseek-v3": (hf.DeepseekV3ForCausalLM, lambda: hf.DeepseekV3Config(**{**_TEXT, **_LATENT})),
    "olmoe": (hf.OlmoeForCausalLM, lambda: hf.OlmoeConfig(**_TEXT, num_experts=4, num_experts_per_tok=2)),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT2)),
    "gpt-neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**_PLAIN)),
    "gemma3": (
        hf.Gemma3ForConditionalGeneration,
        lambda: hf.Gemma3Config(
            text_config={**_TEXT, "head_dim": 8}, vision_config=_VISION, mm_tokens_per_image=1, image_token_index=47
        ),
    ),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**_TEXT, pad_token_id=0)),
    "bert": (hf.BertForMaskedLM, lambda: hf.BertConfig(**_PLAIN)),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    ),
    "llava": (
        hf.LlavaForConditionalGeneration,
        lambda: hf.LlavaConfig(
            text_config=hf.LlamaConfig(**_TEXT), vision_config=hf.CLIPVisionConfig(**_VISION), image_token_index=47
        ),
    ),
    "qwen2.5-vl": (
        hf.Qwen2_5_VLForConditionalGeneration,
        lambda: hf.Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE}, vision_config={**_QWEN_VISION, "patch_size": 4}
        ),
    ),
    "mistral3": (
        hf.Mistral3ForConditionalGeneration,
        lambda: hf.Mistral3Config(
            text_config=hf.MistralConfig(**_TEXT, head_dim=8),
            vision_config=hf.PixtralVisionConfig(**_VISION, head_dim=8),
            image_token_index=47,
        ),
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        lambda: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
    ),
}


def family_model(family: str, seed: int) -> Any:
    """A model with random weights and buffers: two of different seeds are theta0 and theta1."""
    kind, config = FAMILIES[family]
    model = kind(config()).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def load_family(family: str, folder: Path) -> Any:
    """Load a folder with Transformers, which must find every weight and know every tensor of it."""
    model, found = FAMILIES[family][0].from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """What a model says of some tokens, or of a picture."""
    inputs = {"input_ids": torch.arange(12).view(1, 12)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if isinstance(model, hf.ResNetForImageClassification):
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)}
    with torch.no_grad():
        return model(**inputs).logits
