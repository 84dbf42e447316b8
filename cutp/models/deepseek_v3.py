"""DeepSeek-V3 (`DeepseekV3ForCausalLM`): multi-head latent attention, experts chosen inside groups by sigmoid scores.

Layers for multi-token prediction, which released checkpoints hold after the last one, are not part of the model.
Quantized weights of released checkpoints are read as `dtype` numbers, and everything is computed in `dtype`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.errors import UnsupportedModelError
from cutp.kv_cache.params import KVCacheParams
from cutp.models.block_scaled_tensor import BlockScaledTensor, check_block_size
from cutp.models.decoder import DecoderBuilder, checkpoint_name
from cutp.models.decoder_config import DecoderConfig
from cutp.models.moe_config import expert_counts
from cutp.models.registry import ModelFamily
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.mla import MultiHeadLatentAttention, TensorParallelMultiHeadLatentAttention
from cutp.nn.mlp import MLP
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import GroupLimitedRouter

# What DeepSeek's own code can do besides, and its released models do not use.
_ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(DecoderConfig):
    """More sizes, by their Hugging Face names; `head_dim` is that of the rotated part of a head."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int

    @classmethod
    def of(cls, config: ModelConfig) -> DeepseekV3Config:
        """The sizes in `config`; UnsupportedModelError for what only DeepSeek's own code has."""
        for key, value in _ONLY.items():
            if config.raw.get(key) not in (None, value):
                raise UnsupportedModelError(f"{config.path}: {key} {config.raw[key]!r} is not implemented for "
                                            f"DeepseekV3ForCausalLM, only {value!r}")
        check_block_size(config)
        n_heads = config.positive_int("num_attention_heads")
        rope_dim = config.positive_int("qk_rope_head_dim", 64)
        config.choice("num_key_value_heads", (n_heads,), n_heads)  # every head has its own key and value
        config.choice("head_dim", (rope_dim,), rope_dim)
        experts, experts_per_token = expert_counts(config, 256, 8, ("n_routed_experts", "num_local_experts"))
        has_no_query_latent = "q_lora_rank" in config.raw and "q_lora_rank" not in config
        return cls.read(
            config,
            defaults={"max_position_embeddings": 4096},
            head_dim=rope_dim,
            q_lora_rank=None if has_no_query_latent else config.positive_int("q_lora_rank", 1536),
            kv_lora_rank=config.positive_int("kv_lora_rank", 512),
            qk_nope_head_dim=config.positive_int("qk_nope_head_dim", 128),
            v_head_dim=config.positive_int("v_head_dim", 128),
            moe_intermediate_size=config.positive_int("moe_intermediate_size", 2048),
            n_routed_experts=experts,
            n_shared_experts=config.non_negative_int("n_shared_experts", int("n_shared_experts" not in config.raw)),
            num_experts_per_tok=experts_per_token,
            first_k_dense_replace=config.non_negative_int("first_k_dense_replace", 3),
        )

    @property
    def divided(self) -> dict[str, int]:
        found = super().divided
        if self.first_k_dense_replace == 0:
            del found["feed-forward channels"]
        if self.first_k_dense_replace < self.num_hidden_layers:
            found["channels of an expert"] = self.moe_intermediate_size
        return found


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = DeepseekV3Config.of(config)
    make = DecoderBuilder(c, devices, dtype, page_size)
    rope = make.rope(interleaved=config.boolean("rope_interleave", "rope_interleave" not in config.raw))
    has_bias = config.boolean("attention_bias", False)
    routing = {"num_groups": config.positive_int("n_group", 8), "top_groups": config.positive_int("topk_group", 4),
               "renormalize": config.boolean("norm_topk_prob", "norm_topk_prob" not in config.raw),
               "scaling": config.positive_float("routed_scaling_factor", 2.5)}

    def attention() -> TensorParallelMultiHeadLatentAttention:
        layer = MultiHeadLatentAttention(
            c.hidden_size, c.num_attention_heads, dtype, rope, q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank,
            qk_nope_head_dim=c.qk_nope_head_dim, qk_rope_head_dim=c.head_dim, v_head_dim=c.v_head_dim,
            has_bias=has_bias)
        return TensorParallelMultiHeadLatentAttention(layer, devices, make.gemm_config)

    def experts() -> MoE:
        router = GroupLimitedRouter(c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, dtype, **routing)
        routed = Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, dtype, activation=c.hidden_act)
        shared = None
        if c.n_shared_experts:
            shared = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts, dtype, activation=c.hidden_act)
        return MoE(router, routed, shared_experts=shared)

    kv_params = KVCacheParams(dtype, c.num_attention_heads, 1, c.kv_lora_rank + c.head_dim, c.num_hidden_layers,
                              page_size, latent=True)
    return make.model(lambda i: make.block(attention(), make.mlp() if i < c.first_k_dense_replace else experts()),
                      rope=rope, kv_params=kv_params)


def source(name: str) -> BlockScaledTensor:
    """Where a weight comes from."""
    return BlockScaledTensor(checkpoint_name(name))


FAMILIES = (ModelFamily("DeepseekV3ForCausalLM", "deepseek_v3", DeepseekV3Config.of, build, source,
                        quantizations=("fp8",)),)
