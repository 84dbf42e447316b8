"""GLM-4-0414 (`Glm4ForCausalLM`): norms before and after both branches, half of every head rotated."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock

_DEFAULTS = {"vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
             "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
             "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5}


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, _DEFAULTS)


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = DecoderBuilder(sizes(config), devices, dtype, page_size)
    rope = make.rope(partial=True, interleaved=True)
    bias = config.boolean("attention_bias", True)

    def block(i: int) -> DistributedTransformerBlock:
        attention = make.attention(rope, has_bias=bias, has_output_bias=False)
        return make.block(attention, make.mlp(fused=True), post_norm=True)

    return make.model(block, rope=rope)


FAMILIES = (ModelFamily("Glm4ForCausalLM", "glm4", sizes, build),)
