"""Llama (`LlamaForCausalLM`): pre-norm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cutp.checkpoint.config import ModelConfig
from cutp.comm.device_group import DeviceGroup
from cutp.kv_cache.params import KVCacheParams
from cutp.models.decoder_config import DecoderConfig
from cutp.models.registry import ModelFamily, register
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.distributed_gemm import DistributedGemmConfig
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear
from cutp.nn.mlp import MLP
from cutp.nn.norm import RMSNorm
from cutp.nn.rotary_embedding import RotaryEmbedding


def build(config: ModelConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int) -> DistributedTransformer:
    """The model that `config` describes, over `devices`, without weights."""
    c = DecoderConfig.read(config)
    # LlamaRotaryEmbedding turns whole heads; its default type does not read partial_rotary_factor.
    parameters = replace(c.rope, partial_rotary_factor=1.0) if c.rope.rope_type == "default" else c.rope
    rope = RotaryEmbedding(c.head_dim, max_seq_len=c.max_position_embeddings, parameters=parameters)
    gemm_config = DistributedGemmConfig.generate()
    attention_bias = config.boolean("attention_bias", False)
    mlp_bias = config.boolean("mlp_bias", False)

    def norm() -> RMSNorm:
        return RMSNorm(c.hidden_size, dtype, c.rms_norm_eps, multiply_before_cast=False)

    def block() -> DistributedTransformerBlock:
        attention = AttentionWithRope(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, dtype,
                                      rope, has_bias=attention_bias)
        mlp = MLP(c.hidden_size, c.intermediate_size, dtype, activation=c.hidden_act, has_bias=mlp_bias)
        return DistributedTransformerBlock(TensorParallelAttentionWithRope(attention, devices, gemm_config), mlp,
                                           norm(), norm(), devices, gemm_config)

    embedding = VocabParallelEmbedding(c.vocab_size, c.hidden_size, dtype, devices)
    head = ColumnParallelLinear(c.hidden_size, c.vocab_size, dtype, devices,
                                tied_weight=embedding if c.tie_word_embeddings else None)
    kv_params = KVCacheParams(dtype, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.num_hidden_layers,
                              page_size)
    return DistributedTransformer(c.hidden_size, c.num_attention_heads, [block() for _ in range(c.num_hidden_layers)],
                                  norm(), head, embedding, kv_params, devices, rope)


def checkpoint_name(name: str) -> str:
    """`layers.0.mlp.down_proj.weight` -> `model.layers.0.mlp.down_proj.weight`; the head stays at the top."""
    return name if name.startswith("lm_head.") else f"model.{name}"


register(ModelFamily("LlamaForCausalLM", "llama", DecoderConfig.read, build, checkpoint_name))
