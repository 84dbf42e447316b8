"""SmolLM3 (`SmolLM3ForCausalLM`): Llama with layers that have no positions, every fourth by default."""

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
    return DecoderConfig.read(config, {"num_key_value_heads": 4, "max_position_embeddings": 32768,
                                       "tie_word_embeddings": True, "rope_theta": 2000000.0})


def layers_with_rope(config: ModelConfig, num_layers: int) -> list[bool]:
    """Whether each layer rotates: `no_rope_layers` (1 where it does, despite the name), or by the interval."""
    flags = config.raw.get("no_rope_layers")
    if flags is None:
        interval = config.positive_int("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
        raise config.error("no_rope_layers", f"a list of 0 and 1 for each of the {num_layers} layers")
    return [bool(flag) for flag in flags[:num_layers]]


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope, rotates = make.rope(), layers_with_rope(config, c.num_hidden_layers)
    # use_sliding_window decides only where there are no layer_types; a listed window is one either way.
    window, use = config.positive_int("sliding_window", None), config.boolean("use_sliding_window", False)
    windows = layer_windows(config, c.num_hidden_layers, window,
                            lambda i: use and window is not None and not rotates[i])
    attention_bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    return make.model(lambda i: make.block(
        make.attention(rope if rotates[i] else None, has_bias=attention_bias, window=windows[i]),
        make.mlp(has_bias=mlp_bias)), rope=rope)


FAMILIES = (ModelFamily("SmolLM3ForCausalLM", "smollm3", sizes, build),)
