"""Shapes of well-known models, for measuring without a checkpoint: config.json fields as their authors publish them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cutp.errors import ConfigError

_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE, "dtype": "bfloat16", **more}


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
            "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "dtype": "bfloat16", **more}


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "dtype": "bfloat16"},
}


def shape_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The fields of shape `name`, cut to its first `layers` layers if that is given. ConfigError lists what exists."""
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}", hint=f"the shapes are {', '.join(SHAPES)}")
    config = dict(SHAPES[name])
    if layers is not None:
        if not 1 <= layers <= config["num_hidden_layers"]:
            raise ConfigError(f"{name} has {config['num_hidden_layers']} layers; {layers} cannot be taken")
        config["num_hidden_layers"] = layers
    return config


@contextmanager
def shape_directory(name: str | None, layers: int | None) -> Iterator[str | None]:
    """A model directory that holds nothing but the shape's config.json, for the time of a `with` block; None for no
    shape."""
    if name is None:
        yield None
        return
    config = shape_config(name, layers)
    with tempfile.TemporaryDirectory(prefix="cutp-shape-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        yield directory
