"""Gemma 2 (`Gemma2ForCausalLM`): sandwich norms, capped scores and logits, a window in every second layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import UnsupportedModelError
from cutp.models.decoder import SANDWICH_NAMES, DecoderBuilder, renamed
from cutp.models.decoder_config import DecoderConfig
from cutp.models.layer_types import layer_windows
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock
from cutp.nn.norm import RMSNorm
from cutp.nn.rotary_embedding import RotaryEmbedding

GEMMA_DEFAULTS = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
                  "rms_norm_eps": 1e-6, "tie_word_embeddings": True}

checkpoint_name = renamed(SANDWICH_NAMES)


def gemma_activation(config: ModelConfig) -> str:
    """Gemma's files have `hidden_act` too, which is not the one that counts."""
    return config.string("hidden_activation", "gelu_pytorch_tanh")


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, GEMMA_DEFAULTS, hidden_act=gemma_activation(config))


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    make = gemma_builder(sizes(config), devices, dtype, page_size)
    rope = make.rope()
    return gemma_model(config, make, rope, rope, lambda i: i % 2 == 0, final_cap=30.0,
                       softcap=null_is_none(config, "attn_logit_softcapping", 50.0))


def gemma_builder(c: DecoderConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DecoderBuilder:
    """A builder whose norms multiply by 1 + weight, before they round."""
    return DecoderBuilder(c, devices, dtype, page_size,
                          norm=lambda dim: RMSNorm(dim, dtype, c.rms_norm_eps, weight_offset=1.0))


def gemma_model(config: ModelConfig, make: DecoderBuilder, rope: RotaryEmbedding, windowed_rope: RotaryEmbedding,
                is_windowed: Callable[[int], bool], *, final_cap: float | None,
                **attention: Any) -> DistributedTransformer:
    """A model with one rotary embedding for layers without a window and one for those with.

    is_windowed: whether layer i has a window, in a file without `layer_types`. final_cap: the cap of the logits in a
    file that does not name it. attention: more options of `AttentionWithRope`. Raises UnsupportedModelError for a model
    without causal masks.
    """
    if config.boolean("use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{config.path}: use_bidirectional_attention is on; cutp runs causal models only")
    c = make.c
    window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 4096)
    windows = layer_windows(config, c.num_hidden_layers, window, is_windowed)
    has_bias = config.boolean("attention_bias", False)
    scale = config.positive_float("query_pre_attn_scalar", 256.0) ** -0.5

    def block(i: int) -> DistributedTransformerBlock:
        layer = make.attention(windowed_rope if windows[i] else rope, window=windows[i], has_bias=has_bias, scale=scale,
                               **attention)
        return make.block(layer, make.mlp(), post_norm=True)

    # The multiplier is itself rounded to the model's dtype.
    return make.model(block, rope=rope, embedding_multiplier=float(np.float32(c.hidden_size**0.5).astype(make.dtype)),
                      logit_softcapping=null_is_none(config, "final_logit_softcapping", final_cap))


def null_is_none(config: ModelConfig, key: str, default: float | None) -> float | None:
    """A number that a null switches off; `default` is for a file without the key."""
    return config.positive_float(key, None if key in config.raw else default)


FAMILIES = (ModelFamily("Gemma2ForCausalLM", "gemma2", sizes, build, checkpoint_name),)
