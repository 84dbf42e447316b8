"""Command R7B and A (`Cohere2ForCausalLM`): parallel branches, rotation in windowed layers only, scaled logits."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.layer_types import layer_windows
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock
from cutp.nn.norm import LayerNorm

_DEFAULTS = {"vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
             "num_attention_heads": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, _DEFAULTS, rms_norm_eps=config.positive_float("layer_norm_eps", 1e-5))


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size,
                          norm=lambda dim: LayerNorm(dim, dtype, c.rms_norm_eps, use_bias=False))
    pattern = config.positive_int("sliding_window_pattern", 4)
    window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 4096)
    windows = layer_windows(config, c.num_hidden_layers, window, lambda i: (i + 1) % pattern > 0)
    rope = make.rope(interleaved=True)
    bias = config.boolean("attention_bias", False)

    def block(i: int) -> DistributedTransformerBlock:
        attention = make.attention(rope if windows[i] else None, window=windows[i], has_bias=bias)
        return make.block(attention, make.mlp(), parallel=True)

    return make.model(block, rope=rope, logits_scaling=1.0 / config.positive_float("logit_scale", 0.0625))


FAMILIES = (ModelFamily("Cohere2ForCausalLM", "cohere2", sizes, build),)
