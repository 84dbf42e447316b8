"""OLMo 2 (`Olmo2ForCausalLM`): norms after the branches, and of queries and keys over all heads together."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import SANDWICH_NAMES, DecoderBuilder, renamed
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.norm import RMSNorm


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, {"rms_norm_eps": 1e-5})


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    # Olmo2RMSNorm rounds once, after the product with its weight.
    make = DecoderBuilder(c, devices, dtype, page_size, norm=lambda dim: RMSNorm(dim, dtype, c.rms_norm_eps))
    rope, bias = make.rope(), config.boolean("attention_bias", False)
    options = dict(qk_norm_eps=c.rms_norm_eps, qk_norm_over_projection=True, qk_norm_multiply_before_cast=True)
    return make.model(lambda i: make.block(make.attention(rope, has_bias=bias, **options), make.mlp(), pre_norm=False,
                                           post_norm=True), rope=rope)


FAMILIES = (ModelFamily("Olmo2ForCausalLM", "olmo2", sizes, build, renamed(SANDWICH_NAMES)),)
