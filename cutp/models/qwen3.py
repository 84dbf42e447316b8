"""Qwen3 (`Qwen3ForCausalLM`): Llama with a norm of every query and key head, and windows as in Qwen2."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.qwen2 import windows
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768})


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope, window, bias = make.rope(), windows(config, c.num_hidden_layers), config.boolean("attention_bias", False)
    return make.model(lambda i: make.block(
        make.attention(rope, has_bias=bias, qk_norm_eps=c.rms_norm_eps, window=window[i]), make.mlp()), rope=rope)


FAMILIES = (ModelFamily("Qwen3ForCausalLM", "qwen3", sizes, build),)
