"""Multi-head latent attention (MLA) over the paged latent cache (DeepSeek-V2, 2024, arXiv:2405.04434)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.array.scratch import on_device
from cutp.errors import ConfigError
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.attention import TensorParallelAttentionWithRope
from cutp.nn.device_batch import DeviceBatch
from cutp.nn.linear import Linear
from cutp.nn.module import ShardableModule
from cutp.nn.norm import RMSNorm
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import HeadSegment, ShardingStrategy
from cutp.ops.dispatch import latent_rotary_write, linear_per_head
from cutp.ops.kv_write import latent_write
from cutp.ops.latent_attention import expanded_latent_attention, latent_attention
from cutp.ops.rotary import apply_rotary


def mla_softmax_scale(qk_head_dim: int, rope: RopeParameters) -> float:
    """1 / sqrt(qk_head_dim), times mscale^2 where a stretched rotary table names `mscale_all_dim` (as HF does)."""
    scale = qk_head_dim**-0.5
    if rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor is None or rope.factor <= 1:
        return scale
    return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


class MultiHeadLatentAttention(ShardableModule):
    """Attention whose keys and values are made from one cached latent vector a token; one device's heads.

    q_lora_rank: channels of the query's own latent (weights `q_a_proj`, `q_a_layernorm`, `q_b_proj`), or None for one
    `q_proj`. kv_lora_rank: channels of the cached latent. qk_nope_head_dim, qk_rope_head_dim: channels of a query or
    key head without and with positions. has_bias: of `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`. norm_eps: of the
    norms of both latents. rope: of qk_rope_head_dim channels. scale: default `mla_softmax_scale`.

    Called like `AttentionWithRope`, on a cache whose `KVCacheParams` are latent, with a head_dim of kv_lora_rank +
    qk_rope_head_dim. Each request of a batch is computed in the cheaper of two forms, see `expands`; they differ by
    rounding only. On a device all take the absorbed one. ConfigError for a rotary embedding or a cache of other sizes.

    Accepts the strategies replicate and tensor_parallel; under the second a shard has whole heads, the projections to
    the latents and their norms are replicated, and the result is a partial sum over ranks.
    """

    def __init__(self, hidden_dim: int, n_heads: int, dtype: np.dtype, rope: RotaryEmbedding, *,
                 q_lora_rank: int | None, kv_lora_rank: int, qk_nope_head_dim: int, qk_rope_head_dim: int,
                 v_head_dim: int, has_bias: bool = False, norm_eps: float = 1e-6, scale: float | None = None):
        if rope.rotary_dim != qk_rope_head_dim:
            raise ConfigError(f"the rotary embedding turns {rope.rotary_dim} channels, the attention has "
                              f"{qk_rope_head_dim} with positions")
        self.n_heads = n_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.rope = rope
        self.scale = mla_softmax_scale(self.qk_head_dim, rope.parameters) if scale is None else scale

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, dtype, norm_eps, multiply_before_cast=False)

        if q_lora_rank is None:
            self.q_proj = Linear(hidden_dim, n_heads * self.qk_head_dim, dtype)
        else:
            self.q_a_proj = Linear(hidden_dim, q_lora_rank, dtype, has_bias=has_bias)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = Linear(q_lora_rank, n_heads * self.qk_head_dim, dtype)
        self.kv_a_proj_with_mqa = Linear(hidden_dim, kv_lora_rank + qk_rope_head_dim, dtype, has_bias=has_bias)
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = Linear(kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim), dtype)
        self.o_proj = Linear(n_heads * v_head_dim, hidden_dim, dtype, has_bias=has_bias)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def expands(self, lengths: np.ndarray, cache_lengths: np.ndarray) -> np.ndarray:
        """For requests of `lengths` new tokens after `cache_lengths` cached ones: which take the expanded form; [B].

        The form with fewer multiplications a head. Expanded makes keys and values of the whole context once; absorbed
        reads wider vectors for every pair of tokens, and moves every query into the latent space and back. So prompts
        expand, and short continuations of long contexts do not. A single token never does: decoding takes one form
        whatever its length. The answer is about each request alone, so it does not depend on the rest of the batch.
        """
        n, total = lengths.astype(np.float64), (lengths + cache_lengths).astype(np.float64)
        token = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        pairs = n * (total - (n - 1) / 2)
        expanded = total * token + pairs * (self.qk_head_dim + self.v_head_dim)
        absorbed = n * token + pairs * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return (lengths > 1) & (expanded <= absorbed)

    def __call__(self, layer_idx: int, x: np.ndarray, cache: PagedKVCache, batch: RaggedBatch) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; writes the new latents into layer `layer_idx` of `cache`."""
        return self.o_proj(self.attended(layer_idx, x, cache, batch))

    def attended(self, layer_idx: int, x: np.ndarray, cache: PagedKVCache, batch: RaggedBatch) -> np.ndarray:
        """The input of o_proj: [T, heads of this shard * v_head_dim]."""
        channels = self.kv_lora_rank + self.qk_rope_head_dim
        if not cache.params.latent or cache.params.head_dim != channels:
            raise ConfigError(f"multi-head latent attention needs a latent cache of {channels} values a token, "
                              f"not {cache.params}")
        cos, sin = batch.rotary(self.rope, x.dtype)
        if on_device(x):
            return self._attended_on_device(x, cache.blocks[layer_idx], cos, sin, batch)
        compressed = self.kv_a_proj_with_mqa(x)
        rope_key = apply_rotary(compressed[:, None, self.kv_lora_rank:], cos, sin, interleaved=self.rope.interleaved)
        latent = self.kv_a_layernorm(compressed[:, : self.kv_lora_rank])
        pages = cache.blocks[layer_idx]
        latent_write(np.concatenate([latent, rope_key[:, 0]], axis=1), pages, batch.slots)

        q = self._queries(x)
        q_rope = apply_rotary(q[..., self.qk_nope_head_dim:], cos, sin, interleaved=self.rope.interleaved)
        q = np.concatenate([q[..., : self.qk_nope_head_dim], q_rope], axis=-1)
        y = np.empty((len(x), self.n_heads, self.v_head_dim), x.dtype)
        expand = self.expands(batch.lengths, batch.cache_lengths)
        for attend, chosen in ((self._expanded, expand), (self._absorbed, ~expand)):
            rows = chosen[batch.request_of_token]
            offsets = np.concatenate([[0], np.cumsum(batch.lengths[chosen])])
            y[rows] = attend(q[rows], pages, batch.lookup_table[chosen], offsets, batch.cache_lengths[chosen])
        return y.reshape(len(x), self.n_heads * self.v_head_dim)

    def _attended_on_device(self, x: Any, pages: Any, cos: Any, sin: Any, batch: DeviceBatch) -> Any:
        compressed = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(compressed[:, : self.kv_lora_rank])
        q = self._queries(x)
        q_latent = latent_rotary_write(compressed, latent, q, cos, sin, batch.slots, pages,
                                       interleaved=self.rope.interleaved)
        key_rows, value_rows = self._kv_b[:, : self.qk_nope_head_dim], self._kv_b[:, self.qk_nope_head_dim :]
        linear_per_head(q[..., : self.qk_nope_head_dim], key_rows.transpose(0, 2, 1),
                        out=q_latent[..., : self.kv_lora_rank])
        mixed = batch.latent_attention(q_latent, pages, self.scale, self.kv_lora_rank)
        y = linear_per_head(mixed, value_rows)
        return y.reshape(y.shape[0], self.n_heads * self.v_head_dim)

    def _queries(self, x: np.ndarray) -> np.ndarray:
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.reshape(q.shape[0], self.n_heads, self.qk_head_dim)

    @property
    def _kv_b(self) -> np.ndarray:
        """[heads of this shard, D_n + D_v, kv_lora_rank], a view."""
        return self.kv_b_proj.weight.value.reshape(self.n_heads, -1, self.kv_lora_rank)

    def _expanded(self, q: np.ndarray, pages: np.ndarray, *requests: np.ndarray) -> np.ndarray:
        return expanded_latent_attention(q, self._kv_b, pages, *requests, self.scale)

    def _absorbed(self, q: np.ndarray, pages: np.ndarray, *requests: np.ndarray) -> np.ndarray:
        key_rows, value_rows = np.split(self._kv_b, [self.qk_nope_head_dim], axis=1)
        q_latent = linear_per_head(q[..., : self.qk_nope_head_dim], key_rows.transpose(0, 2, 1))
        q_latent = np.concatenate([q_latent, q[..., self.qk_nope_head_dim:]], axis=-1)
        mixed = latent_attention(q_latent, pages, *requests, self.scale, self.kv_lora_rank)
        return linear_per_head(mixed, value_rows)

    def signature(self) -> dict[str, object]:
        rope = self.rope
        return {**super().signature(),
                "rope": (rope.dim, rope.rotary_dim, rope.interleaved, rope.max_seq_len, rope.parameters)}

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> MultiHeadLatentAttention:
        part = self._copy()
        size = strategy.num_devices
        whole = ShardingStrategy.replicate(size)
        divided: dict[str, ShardingStrategy] = {}
        if not strategy.is_replicate:
            first, last = HeadSegment(self.n_heads, 1).share(rank, size)
            part.n_heads = last - first
            rows = {"q_proj": self.qk_head_dim, "q_b_proj": self.qk_head_dim,
                    "kv_b_proj": self.qk_nope_head_dim + self.v_head_dim}
            divided = {name: ShardingStrategy.segmented(size, 0, [HeadSegment(self.n_heads, head_dim)])
                       for name, head_dim in rows.items()}
            divided["o_proj"] = ShardingStrategy.head_aware_columnwise(size, self.n_heads, self.v_head_dim)
        for name, child in vars(self).items():
            if isinstance(child, ShardableModule):
                setattr(part, name, child._shard(divided.get(name, whole), rank))
        return part


class TensorParallelMultiHeadLatentAttention(TensorParallelAttentionWithRope):
    """`MultiHeadLatentAttention` divided by heads over the devices; its result is the sum over all of them."""

    def attended(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
                 batch: RaggedBatch) -> list[np.ndarray]:
        """The input of each local shard's o_proj, whose results are partial sums over the group."""
        return [shard.attended(layer_idx, x, cache, batch)
                for shard, x, cache in zip(self.shards, xs, caches, strict=True)]
