"""Qwen3-MoE (`Qwen3MoeForCausalLM`): Qwen3 with a mixture of experts in most layers, a plain MLP in the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.models.decoder import DecoderBuilder
from cutp.models.decoder_config import DecoderConfig
from cutp.models.moe_config import expert_counts
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.mlp import MLP
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import SoftmaxRouter


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    moe_intermediate_size: int

    @property
    def divided(self) -> dict[str, int]:
        return {**super().divided, "channels of an expert": self.moe_intermediate_size}


def sizes(config: ModelConfig) -> Qwen3MoeConfig:
    return Qwen3MoeConfig.read(config, {"num_key_value_heads": 4, "max_position_embeddings": 32768,
                                        "intermediate_size": 6144},
                               moe_intermediate_size=config.positive_int("moe_intermediate_size", 768))


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = sizes(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope, bias = make.rope(), config.boolean("attention_bias", False)
    window = None
    if config.boolean("use_sliding_window", False):
        window = config.positive_int("sliding_window", None if "sliding_window" in config.raw else 4096)
    renormalize, step = config.boolean("norm_topk_prob", False), config.positive_int("decoder_sparse_step", 1)
    dense = config.layer_indices("mlp_only_layers", ())
    experts, top_k = expert_counts(config, 128, 8)

    def feed_forward(layer: int) -> MoE | MLP:
        if layer in dense or (layer + 1) % step:
            return make.mlp()
        return MoE(SoftmaxRouter(c.hidden_size, experts, top_k, dtype, renormalize=renormalize),
                   Experts(experts, c.hidden_size, c.moe_intermediate_size, dtype, activation=c.hidden_act))

    return make.model(lambda i: make.block(
        make.attention(rope, has_bias=bias, qk_norm_eps=c.rms_norm_eps, window=window), feed_forward(i)), rope=rope)


FAMILIES = (ModelFamily("Qwen3MoeForCausalLM", "qwen3_moe", sizes, build),)
