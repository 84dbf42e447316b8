"""Llama (`LlamaForCausalLM`): pre-norm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder, checkpoint_name
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = DecoderBuilder(DecoderConfig.read(config), devices, dtype, page_size)
    rope = make.rope()
    attention_bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    return make.model(lambda i: make.block(make.attention(rope, has_bias=attention_bias), make.mlp(has_bias=mlp_bias)),
                      rope=rope)


FAMILIES = (ModelFamily("LlamaForCausalLM", "llama", DecoderConfig.read, build, checkpoint_name),)
