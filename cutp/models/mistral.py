"""Mistral (`MistralForCausalLM`): Llama with the same sliding window in every layer, and without biases."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, {"num_key_value_heads": 8, "max_position_embeddings": 131072})


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = DecoderBuilder(sizes(config), devices, dtype, page_size)
    rope = make.rope()
    # Without the key the window is that of Mistral 7B; null means that there is none.
    window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 4096)
    return make.model(lambda i: make.block(make.attention(rope, window=window), make.mlp()), rope=rope)


FAMILIES = (ModelFamily("MistralForCausalLM", "mistral", sizes, build),)
