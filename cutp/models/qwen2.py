"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases of queries, keys and values, and windows if asked for."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.layer_types import layer_windows
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, {"num_key_value_heads": 32, "max_position_embeddings": 32768})


def windows(config: ModelConfig, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: none unless `use_sliding_window`, then from layer `max_window_layers` on."""
    window = None
    if config.boolean("use_sliding_window", False):
        window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 4096)
    first = config.non_negative_int("max_window_layers", 28)
    return layer_windows(config, num_layers, window, lambda i: window is not None and i >= first)


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope, window = make.rope(), windows(config, c.num_hidden_layers)
    return make.model(lambda i: make.block(
        make.attention(rope, has_bias=True, has_output_bias=False, window=window[i]), make.mlp()), rope=rope)


FAMILIES = (ModelFamily("Qwen2ForCausalLM", "qwen2", sizes, build),)
