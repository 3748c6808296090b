"""Run mergekit on four tiny Llama models and keep what it writes.

    python -m venv ENV && ENV/bin/pip install mergekit==0.1.5
    cd tests/merge/mergekit && ENV/bin/python record.py

The models are folders of float32 weights beside this file, a merge is a `NAME.yaml`, and what mergekit made of it is
`expected/NAME.safetensors`. Random merges are left out, but for densities of 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

HERE = Path(__file__).parent
LAYERS, WIDTH, INNER, VOCABULARY = 3, 16, 16, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
BLOCK = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH // 2, WIDTH),
    "self_attn.v_proj": (WIDTH // 2, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "post_attention_layernorm": (WIDTH,),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, WIDTH),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in BLOCK.items()},
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCABULARY, WIDTH),
}


def write_models() -> None:
    random = np.random.RandomState(0)  # a stream that numpy promises never to change
    base = {name: random.standard_normal(shape) * 0.1 + (len(shape) == 1) for name, shape in SHAPES.items()}
    models = {"base": base}
    for name in ("a", "b"):
        models[name] = {key: value + 0.05 * random.standard_normal(value.shape) for key, value in base.items()}
    # On one line with the base: slerp has no arc here.
    models["a"]["model.norm.weight"] = 1.01 * base["model.norm.weight"]
    # Between the other two: angles of its deltas with theirs are below right ones, which model stock is made for.
    models["c"] = {key: (models["a"][key] + models["b"][key]) / 2 for key in base}
    for name, tensors in models.items():
        (HERE / name).mkdir(exist_ok=True)
        save_file({key: value.astype(np.float32) for key, value in tensors.items()}, HERE / name / "model.safetensors")
        (HERE / name / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def record() -> None:
    program = Path(sys.executable).with_name("mergekit-yaml")
    (HERE / "expected").mkdir(exist_ok=True)
    for case in sorted(HERE.glob("*.yaml")):
        with tempfile.TemporaryDirectory() as out:
            # There is no tokenizer to copy, and a model card would ask the hub about the folders.
            options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
            subprocess.run([program, case.name, out, *options], cwd=HERE, check=True)
            merged: dict = {}
            for file in sorted(Path(out).glob("*.safetensors")):
                merged |= load_file(file)
        save_tensors(merged, HERE / "expected" / f"{case.stem}.safetensors", {"mergekit": version("mergekit")})


if __name__ == "__main__":
    write_models()
    record()
