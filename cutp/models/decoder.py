"""Assembles a decoder-only model, so that a family's file says only what is special about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.kv_cache.params import KVCacheParams
from cutp.models.decoder_config import DecoderConfig
from cutp.nn.attention import AttentionWithRope, TensorParallelAttentionWithRope
from cutp.nn.distributed_gemm import DistributedGemmConfig
from cutp.nn.distributed_transformer import DistributedTransformer, DistributedTransformerBlock, ShardableCallable
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear
from cutp.nn.mlp import MLP
from cutp.nn.module import Module
from cutp.nn.norm import RMSNorm
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding


class DecoderBuilder:
    """The parts of one model of sizes `c` over `devices`; each method's result goes into the next.

    norm: makes a norm of a given width, for every place of the residual stream; by default Llama's `RMSNorm`. The
    options of each method are keyword arguments of the module it makes.
    """

    def __init__(self, c: DecoderConfig, devices: DeviceGroup, dtype: np.dtype, page_size: int, *,
                 norm: Callable[[int], ShardableCallable] | None = None):
        self.c, self.devices, self.dtype, self.page_size = c, devices, dtype, page_size
        self.gemm_config = DistributedGemmConfig.generate()
        self._norm = norm or (lambda dim: RMSNorm(dim, dtype, c.rms_norm_eps, multiply_before_cast=False))

    def rope(self, parameters: RopeParameters | None = None, *, partial: bool = False,
             interleaved: bool = False) -> RotaryEmbedding:
        """The rotary embedding of config.json, or of other `parameters`.

        partial: the family's default type reads `partial_rotary_factor`; Llama's turns whole heads whatever it says.
        """
        parameters = parameters or self.c.rope
        if parameters.rope_type == "default" and not partial:
            parameters = replace(parameters, partial_rotary_factor=1.0)
        return RotaryEmbedding(self.c.head_dim, max_seq_len=self.c.max_position_embeddings, parameters=parameters,
                               interleaved=interleaved)

    def norm(self) -> ShardableCallable:
        """One norm of the residual stream."""
        return self._norm(self.c.hidden_size)

    def attention(self, rope: RotaryEmbedding | None, **options: Any) -> TensorParallelAttentionWithRope:
        """Grouped-query attention; options: those of `AttentionWithRope`."""
        c = self.c
        layer = AttentionWithRope(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, self.dtype,
                                  rope, **options)
        return TensorParallelAttentionWithRope(layer, self.devices, self.gemm_config)

    def mlp(self, **options: Any) -> MLP:
        """The gated feed-forward layer; options: those of `MLP`."""
        return MLP(self.c.hidden_size, self.c.intermediate_size, self.dtype,
                   **{"activation": self.c.hidden_act, **options})

    def block(self, attention: Module, mlp: ShardableCallable, *, pre_norm: bool = True, post_norm: bool = False,
              parallel: bool = False, residual_multiplier: float = 1.0) -> DistributedTransformerBlock:
        """One layer, with norms before its branches, after them, or both; see `DistributedTransformerBlock`.

        Only an `MLP` overlaps its all-reduce where that is asked for; other feed-forward layers do without.
        """
        return DistributedTransformerBlock(
            attention, mlp, self.norm() if pre_norm else None, self.norm() if pre_norm and not parallel else None,
            self.devices, self.gemm_config if isinstance(mlp, MLP) else None, residual_multiplier=residual_multiplier,
            post_attention_norm=self.norm() if post_norm else None, post_mlp_norm=self.norm() if post_norm else None,
            parallel=parallel)

    def model(self, block: Callable[[int], DistributedTransformerBlock], *, rope: RotaryEmbedding | None = None,
              kv_params: KVCacheParams | None = None, **options: Any) -> DistributedTransformer:
        """The whole model, without weights. block: makes layer i.

        kv_params: by default one key and one value head_dim wide for every key-value head. options: those of
        `DistributedTransformer`.
        """
        c = self.c
        embedding = VocabParallelEmbedding(c.vocab_size, c.hidden_size, self.dtype, self.devices)
        head = ColumnParallelLinear(c.hidden_size, c.vocab_size, self.dtype, self.devices,
                                    tied_weight=embedding if c.tie_word_embeddings else None)
        kv_params = kv_params or KVCacheParams(self.dtype, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                                               c.num_hidden_layers, self.page_size)
        return DistributedTransformer(c.hidden_size, c.num_attention_heads,
                                      [block(i) for i in range(c.num_hidden_layers)], self.norm(), head, embedding,
                                      kv_params, self.devices, rope, **options)


def checkpoint_name(name: str) -> str:
    """`layers.0.mlp.down_proj.weight` -> `model.layers.0.mlp.down_proj.weight`; the head stays at the top."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    """`checkpoint_name` for a family that calls some modules differently; names: module's name here -> in the file."""
    return lambda name: checkpoint_name(".".join(names.get(part, part) for part in name.split(".")))


# A family with norms on both sides of its branches (or only after them) mostly has these names for them.
SANDWICH_NAMES = {"post_self_attn_layernorm": "post_attention_layernorm",
                  "post_attention_layernorm": "pre_feedforward_layernorm",
                  "post_mlp_layernorm": "post_feedforward_layernorm"}
