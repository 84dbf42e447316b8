"""Writes rope.npz: rotary frequencies and cos/sin computed by Hugging Face transformers.

    pip install torch transformers
    python tests/golden/make_rope_golden.py

Contents of the file, for case NAME and total length L:
    cases                      JSON: [{"name", "head_dim", "max_position_embeddings", "rope_parameters", "lengths"}]
    versions                   JSON: {"transformers", "torch"}
    NAME.L.inv_freq            float32 [rotary_dim / 2]
    NAME.L.attention_scaling   float64 scalar
    NAME.L.positions           int64 [P], chosen positions below L
    NAME.L.cos, NAME.L.sin     float32 [P, rotary_dim / 2], scaled, as the model multiplies them
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding


def case(name, head_dim, max_position_embeddings, lengths, **rope_parameters):
    rope_parameters = {"rope_theta": 10000.0} | rope_parameters
    return {
        "name": name,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "lengths": lengths,
        "rope_parameters": rope_parameters,
    }


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 32768}
SMALL_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PHI3_SHORT = [round(1.0 + 0.03 * i + 0.01 * (i % 3), 4) for i in range(48)]
PHI3_LONG = [round(1.05 + 0.004 * i**2.5, 4) for i in range(48)]
PHI3 = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 4096,
    "short_factor": PHI3_SHORT,
    "long_factor": PHI3_LONG,
}

CASES = [
    case("llama2", 128, 4096, [4096], rope_type="default"),
    case("theta_500000", 128, 8192, [8192], rope_type="default", rope_theta=500000.0),
    case("head_80", 80, 2048, [2048], rope_type="default"),
    case("partial_default", 80, 2048, [2048], rope_type="default", partial_rotary_factor=0.4),
    case("linear_2", 128, 4096, [8192], rope_type="linear", factor=2.0),
    case("linear_2_5_partial", 64, 2048, [4096], rope_type="linear", factor=2.5, partial_rotary_factor=0.5),
    case("dynamic_2", 128, 4096, [1000, 4096, 4097, 8000], rope_type="dynamic", factor=2.0),
    case("dynamic_4", 64, 2048, [2048, 2049, 5000, 8192], rope_type="dynamic", factor=4.0),
    case("dynamic_partial", 64, 32, [32, 120], rope_type="dynamic", factor=4.0, partial_rotary_factor=0.75),
    case("llama31_8b", 128, 131072, [8192], factor=8.0, original_max_position_embeddings=8192, **LLAMA3),
    case("llama32_1b", 64, 131072, [8192], factor=32.0, original_max_position_embeddings=8192, **LLAMA3),
    case("llama3_no_original", 64, 4096, [4096], factor=8.0, **LLAMA3),
    case("llama3_small", 16, 128, [128], factor=4.0, original_max_position_embeddings=32, **LLAMA3),
    case("qwen_yarn_4", 128, 131072, [8192], factor=4.0, **YARN),
    case("yarn_factor_from_ratio", 128, 131072, [8192], factor=None, **YARN),
    case("yarn_no_truncate", 64, 131072, [8192], factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
         rope_type="yarn", rope_theta=150000.0, original_max_position_embeddings=4096),
    case("deepseek_yarn", 64, 163840, [8192], rope_type="yarn", factor=40.0, original_max_position_embeddings=4096,
         mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
    case("deepseek_yarn_mscale", 64, 163840, [8192], rope_type="yarn", factor=40.0,
         original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.5, beta_fast=32, beta_slow=1),
    case("yarn_mscale_alone", 64, 128, [128], mscale=0.5, **SMALL_YARN),
    case("yarn_attention_factor", 64, 128, [128], attention_factor=1.25, **SMALL_YARN),
    case("yarn_partial", 64, 128, [128], partial_rotary_factor=0.5, beta_fast=8.0, beta_slow=0.5, **SMALL_YARN),
    case("yarn_factor_below_one", 64, 32, [32], rope_type="yarn", factor=0.5, original_max_position_embeddings=32),
    case("yarn_one_step_ramp", 16, 128, [128], beta_fast=2.0, beta_slow=2.0, truncate=False, **SMALL_YARN),
    case("yarn_clipped_ramp", 16, 8192, [8192], rope_type="yarn", rope_theta=20.0, factor=2.0, beta_fast=600,
         original_max_position_embeddings=4096),
    case("phi3_128k", 96, 131072, [4096, 4097, 8192], **PHI3),
    case("longrope_factor", 96, 131072, [100, 8192], factor=8.0, **PHI3),
    case("longrope_attention_factor", 96, 131072, [100, 8192], attention_factor=1.5, **PHI3),
    case("longrope_partial", 128, 131072, [100, 8192], partial_rotary_factor=0.75, **PHI3),
]


def rotary(c, length: int):
    """Frequencies, scaling, cos and sin of a fresh module that has seen positions 0 .. length - 1 in one forward."""
    config = LlamaConfig(
        hidden_size=2 * c["head_dim"],
        num_attention_heads=2,
        head_dim=c["head_dim"],
        max_position_embeddings=c["max_position_embeddings"],
        rope_parameters=dict(c["rope_parameters"]),
    )
    partial = c["rope_parameters"].get("partial_rotary_factor", 1.0) != 1.0
    # Llama's own default formula has no partial rotation; Phi-3's does, and the two agree otherwise.
    module = (Phi3RotaryEmbedding if partial else LlamaRotaryEmbedding)(config)
    positions = np.unique(np.array([0, 1, 17, length // 3, length - 1]))
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    pick = torch.from_numpy(positions)
    return {
        "inv_freq": module.inv_freq.numpy(),
        "attention_scaling": np.float64(module.attention_scaling),
        "positions": positions,
        "cos": cos[0, pick, :half].numpy(),
        "sin": sin[0, pick, :half].numpy(),
    }


def main():
    torch.set_num_threads(1)
    arrays = {
        "cases": json.dumps(CASES),
        "versions": json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}),
    }
    for c in CASES:
        for length in c["lengths"]:
            for key, value in rotary(c, length).items():
                arrays[f"{c['name']}.{length}.{key}"] = value
    path = Path(__file__).parent / "rope.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
