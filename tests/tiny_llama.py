"""Tiny random Llama checkpoints in Hugging Face layout, equal on every machine.

The golden script computes their expected outputs with transformers; the tests rebuild the same files without torch.
Weights are made of raw Philox bits, keyed by case and tensor name: NumPy guarantees the bit stream across versions,
but not its distributions. They are scaled so that scores and logits spread as in a trained model (attention is far
from uniform, greedy tokens lead clearly).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}

ORIGINAL = 32  # the original context length of every case that scales its rotary embedding
_LONGROPE = {
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.3, 1.7, 2.2, 2.8, 3.2, 3.6, 4.0],
}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}

# name -> what differs from BASE. The older spelling (rope_theta, rope_scaling) and the newer one (rope_parameters)
# both occur on purpose.
CASES: dict[str, dict] = {
    "mha": {"num_key_value_heads": 4, "rope_theta": 10000.0},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3},
    "gqa_6_heads_2_kv": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 500000.0},
    "tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
    "untied": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"hidden_size": 48, "head_dim": 16},
    "odd_vocab": {"vocab_size": 515},
    "odd_ffn": {"intermediate_size": 101},
    "rope_linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    # HF scales `dynamic` from max_position_embeddings itself, so that is the original length here.
    "rope_dynamic": {
        "max_position_embeddings": ORIGINAL,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "rope_llama3": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3"} | _LLAMA3},
    "rope_llama3_new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0} | _LLAMA3},
    "rope_yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "beta_fast": 8.0} | _YARN},
    "rope_yarn_mscale": {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "yarn", "mscale": 1.2, "mscale_all_dim": 0.4, "beta_fast": 4, "beta_slow": 1} | _YARN,
    },
    "rope_yarn_no_truncate": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "truncate": False, "attention_factor": 1.2}
        | _YARN,
    },
    "rope_longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0} | _LONGROPE},
    "rope_longrope_old": {"rope_theta": 1000.0, "rope_scaling": {"type": "longrope"} | _LONGROPE},
}

# Draws (0 unless named) in which the best token leads clearly at every greedy step.
SEEDS = {"mha": 2, "gqa": 1, "gqa_6_heads_2_kv": 1, "mqa": 1, "rope_yarn_mscale": 1}


def config(case: str) -> dict:
    """The complete content of config.json."""
    return BASE | CASES[case]


def uniform(n: int, *key: object) -> np.ndarray:
    """float32 [n] in [-1, 1), a pure function of `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def _shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape. A Linear weight is [out, in]."""
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part, linears, bias in (
            ("self_attn", attention, c["attention_bias"]),
            ("mlp", mlp, c["mlp_bias"]),
        ):
            for name, shape in linears.items():
                shapes[f"{prefix}.{part}.{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}.{part}.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return shapes


# Standard deviation of a Linear's output for an input of unit size.
_GAIN = {"q_proj": 1.4, "k_proj": 1.4, "o_proj": 1.5, "down_proj": 2.5, "lm_head": 4.0, "embed_tokens": 4.0}


def tensors(case: str) -> dict[str, np.ndarray]:
    """float32 tensors by HF name (`model.layers.0.self_attn.q_proj.weight`, ...); no `lm_head.weight` when tied."""
    made = {}
    for name, shape in _shapes(config(case)).items():
        values = uniform(math.prod(shape), case, SEEDS.get(case, 0), name).reshape(shape)
        module = name.split(".")[-2]
        if module.endswith("norm"):
            values = 1 + np.float32(0.2) * values
        elif name.endswith("bias"):
            values = np.float32(0.4) * values
        else:
            # An embedding row is scaled like the head's, since a tied case uses it as the head. Uniform values have
            # a variance of 1/3.
            values = values * np.float32(_GAIN.get(module, 1.0) * math.sqrt(3.0 / shape[-1]))
        made[name] = values.astype(np.float32)
    return made


def prompts(case: str) -> list[list[int]]:
    """Token ids of four prompts. With scaled RoPE they lie below, at and beyond `ORIGINAL` tokens."""
    c = config(case)
    lengths = (7, 20, ORIGINAL, 80) if case.startswith("rope_") else (1, 5, 17, 40)
    return [
        [int(t) for t in (uniform(n, case, "prompt", i) + 1) * (c["vocab_size"] / 2)] for i, n in enumerate(lengths)
    ]


def write_checkpoint(case: str, directory: str | Path) -> Path:
    """Writes config.json and model.safetensors (no tokenizer) into `directory`, which is made if needed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(case), indent=2) + "\n")
    save_file(tensors(case), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
