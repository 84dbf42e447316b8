"""Granite (`GraniteForCausalLM`): Llama with four multipliers, of embeddings, scores, branches and logits."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = DecoderBuilder(DecoderConfig.read(config), devices, dtype, page_size)
    rope = make.rope()
    attention_bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    scale = config.positive_float("attention_multiplier", 1.0)  # instead of 1 / sqrt(head_dim)
    residual = config.positive_float("residual_multiplier", 1.0)
    return make.model(
        lambda i: make.block(make.attention(rope, has_bias=attention_bias, scale=scale), make.mlp(has_bias=mlp_bias),
                             residual_multiplier=residual),
        rope=rope, logits_scaling=config.positive_float("logits_scaling", 1.0),
        embedding_multiplier=config.positive_float("embedding_multiplier", 1.0))


FAMILIES = (ModelFamily("GraniteForCausalLM", "granite", DecoderConfig.read, build),)
