"""Mixtral (`MixtralForCausalLM`): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder, renamed
from cutp.models.decoder_config import DecoderConfig
from cutp.models.moe_config import expert_counts
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import SoftmaxRouter


def sizes(config: ModelConfig) -> DecoderConfig:
    return DecoderConfig.read(config, {"num_key_value_heads": 8, "max_position_embeddings": 131072,
                                       "rms_norm_eps": 1e-5, "rope_theta": 1e6})


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope, window = make.rope(), config.positive_int("sliding_window", None)
    experts, top_k = expert_counts(config, 8, 2)

    def moe() -> MoE:
        return MoE(SoftmaxRouter(c.hidden_size, experts, top_k, dtype, renormalize=True),
                   Experts(experts, c.hidden_size, c.intermediate_size, dtype, activation=c.hidden_act))

    return make.model(lambda i: make.block(make.attention(rope, window=window), moe()), rope=rope)


NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
FAMILIES = (ModelFamily("MixtralForCausalLM", "mixtral", sizes, build, renamed(NAMES)),)
