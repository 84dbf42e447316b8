"""Grouped-query attention with rotary positions over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.comm.partition import split_heads
from cutp.errors import ConfigError
from cutp.kv_cache.paged import PagedKVCache
from cutp.nn.distributed_gemm import DistributedGemmConfig, matmul_allreduce
from cutp.nn.linear import Linear, qkv_linear
from cutp.nn.module import Module, ShardableModule, Weight, sharded
from cutp.nn.norm import RMSNorm, ShardedRMSNorm
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import HeadSegment, ShardingStrategy, qkv_segments
from cutp.ops.dispatch import clip, joined_heads, square_sums


class AttentionWithRope(ShardableModule):
    """softmax(scale * rope(q) rope(k)^T) v, projected back; one device's heads.

    rope: positions, or None for a layer without them. n_kv_heads: each serves n_heads / n_kv_heads query heads.
    has_bias, has_output_bias: biases of the q/k/v and of the output projection (the second follows the first by
    default). fused_qkv: the three projections are one weight, `qkv_proj`. qk_norm_eps: RMS-normalises queries and keys
    before the rotation (weights `q_norm`, `k_norm`), every head by itself or, with qk_norm_over_projection, all heads
    of all ranks as one vector (Olmo2); qk_norm_offset, qk_norm_multiply_before_cast: as in `RMSNorm`. clip_qkv: clamps
    the projected queries, keys and values to [-clip, clip] (`Linear(clip_weight=...)` clamps a weight instead). scale:
    default 1 / sqrt(head_dim). window, softcap, has_sinks: see `cutp.ops.attention.paged_attention`. ConfigError for
    sizes that do not fit.

    Accepts the strategies replicate and tensor_parallel; under the second a shard has whole heads and its result is
    a partial sum over ranks.
    """

    def __init__(self, hidden_dim: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: np.dtype,
                 rope: RotaryEmbedding | None, *, has_bias: bool = False, has_output_bias: bool | None = None,
                 fused_qkv: bool = False, qk_norm_eps: float | None = None, qk_norm_over_projection: bool = False,
                 qk_norm_offset: float = 0.0, qk_norm_multiply_before_cast: bool = False,
                 clip_qkv: float | None = None, scale: float | None = None, window: int | None = None,
                 softcap: float | None = None, has_sinks: bool = False):
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ConfigError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly")
        if rope is not None and rope.dim != head_dim:
            raise ConfigError(f"the rotary embedding is for heads of {rope.dim}, the attention has heads of {head_dim}")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rope = rope
        self.clip_qkv = clip_qkv
        self.scale = head_dim**-0.5 if scale is None else scale
        if window is not None and window < 1:
            raise ConfigError(f"an attention window of {window} tokens would leave nothing to attend to")
        self.window, self.softcap = window, softcap
        self.qkv_proj = qkv_linear(hidden_dim, n_heads, n_kv_heads, head_dim, dtype, has_bias=has_bias, fused=fused_qkv)
        output_bias = has_bias if has_output_bias is None else has_output_bias
        self.o_proj = Linear(n_heads * head_dim, hidden_dim, dtype, has_bias=output_bias)
        self.q_norm = self.k_norm = None
        self.norm_over_projection = qk_norm_eps is not None and qk_norm_over_projection
        # Whether this shard's keys count in the mean square: those of a replicated head count on one rank.
        self._counts_keys = True
        if qk_norm_eps is not None:
            norm = ShardedRMSNorm if qk_norm_over_projection else RMSNorm
            self.q_norm, self.k_norm = (
                norm(head_dim * (heads if qk_norm_over_projection else 1), dtype, qk_norm_eps, qk_norm_offset,
                     qk_norm_multiply_before_cast) for heads in (n_heads, n_kv_heads))
        self.sinks = Weight((n_heads,), dtype, device_dtype=np.dtype(np.float32)) if has_sinks else None

    def __call__(self, layer_idx: int, x: np.ndarray, cache: PagedKVCache, batch: RaggedBatch) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; writes the new keys and values into layer `layer_idx` of `cache`."""
        return self.o_proj(self.attended(layer_idx, self.projected(x), cache, batch))

    def projected(self, x: np.ndarray) -> np.ndarray:
        """Queries, keys and values of this shard's heads side by side, [T, (n_heads + 2 * n_kv_heads) * head_dim],
        before norm and rotation."""
        qkv = self.qkv_proj(x)
        return qkv if self.clip_qkv is None else clip(qkv, self.clip_qkv)

    def square_sums(self, qkv: np.ndarray) -> np.ndarray:
        """What this shard adds to the sums of squares of all queries and all keys of a token, float32 [T, 2]."""
        q, k = self._queries_and_keys(qkv)
        return square_sums(q, k if self._counts_keys else None)

    def attended(self, layer_idx: int, qkv: np.ndarray, cache: PagedKVCache, batch: RaggedBatch,
                 square_sums: np.ndarray | None = None) -> np.ndarray:
        """The input of o_proj, [T, heads of this shard * head_dim], from the result of `projected`, which is used up.

        square_sums: with a norm over the projection, those of all ranks together; one rank alone needs none.
        """
        if self.q_norm is not None:
            self._normalize(qkv, square_sums)
        cos, sin = (None, None) if self.rope is None else batch.rotary(self.rope, qkv.dtype)
        y = batch.rotary_attention(qkv, self.n_heads, cos, sin, cache.blocks[layer_idx], self.scale,
                                   interleaved=self.rope is not None and self.rope.interleaved, window=self.window,
                                   softcap=self.softcap, sinks=None if self.sinks is None else self.sinks.value)
        return joined_heads(y, self.head_dim)

    def _queries_and_keys(self, qkv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views of `qkv`: [T, n_heads * head_dim] and [T, n_kv_heads * head_dim]."""
        first, last = self.n_heads * self.head_dim, (self.n_heads + self.n_kv_heads) * self.head_dim
        return qkv[:, :first], qkv[:, first:last]

    def _normalize(self, qkv: np.ndarray, square_sums: np.ndarray | None) -> None:
        """Replaces queries and keys in `qkv` by their norms."""
        parts = self._queries_and_keys(qkv)
        sums = (None, None) if square_sums is None else (square_sums[:, :1], square_sums[:, 1:])
        for norm, part, total in zip((self.q_norm, self.k_norm), parts, sums, strict=True):
            if self.norm_over_projection:
                norm(part, total, out=part)
            else:
                heads = part.reshape(part.shape[0], part.shape[1] // self.head_dim, self.head_dim)
                norm(heads, out=heads)

    def signature(self) -> dict[str, object]:
        rope = self.rope
        setting = rope and (rope.dim, rope.rotary_dim, rope.interleaved, rope.max_seq_len, rope.parameters)
        return {**super().signature(), "rope": setting}

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> AttentionWithRope:
        part = self._copy()
        size = strategy.num_devices
        part.qkv_proj = self.qkv_proj._shard(strategy, rank)
        columns = heads = q_channels = k_channels = ShardingStrategy.replicate(size)
        if not strategy.is_replicate:
            share = split_heads(self.n_heads, self.n_kv_heads, size, rank)
            part.n_heads, part.n_kv_heads = share.n_heads, share.n_kv_heads
            columns = ShardingStrategy.head_aware_columnwise(size, self.n_heads, self.head_dim, self.n_kv_heads)
            heads = ShardingStrategy.segmented(size, 0, [HeadSegment(self.n_heads, 1, self.n_kv_heads)])
            if self.norm_over_projection:
                q_channels, k_channels, _ = (ShardingStrategy.segmented(size, 0, [segment]) for segment in
                                             qkv_segments(self.n_heads, self.head_dim, self.n_kv_heads))
                before = split_heads(self.n_heads, self.n_kv_heads, size, rank - 1).kv_start if rank else None
                part._counts_keys = share.kv_start != before
        part.o_proj = self.o_proj._shard(columns, rank)
        if self.q_norm is not None:
            part.q_norm, part.k_norm = self.q_norm._shard(q_channels, rank), self.k_norm._shard(k_channels, rank)
        if self.sinks is not None:
            part.sinks = self.sinks.share(heads, rank)
        return part


class TensorParallelAttentionWithRope(Module):
    """`AttentionWithRope` divided by heads over the devices; its result is the sum over all of them.

    distributed_gemm_config: with `enable_matmul_allreduce`, the output projection is split into chunks of rows whose
    sums overlap the next chunk.
    """

    def __init__(self, attention: AttentionWithRope, devices,
                 distributed_gemm_config: DistributedGemmConfig | None = None):
        self.group = DeviceGroup.of(devices)
        self.shards = sharded(attention, ShardingStrategy.tensor_parallel(self.group.size), self.group)
        self.overlap_o_proj = bool(distributed_gemm_config and distributed_gemm_config.enable_matmul_allreduce)

    def __call__(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
                 batch: RaggedBatch) -> list[np.ndarray]:
        """One [T, hidden] a local device -> the same."""
        attended = self.attended(layer_idx, xs, caches, batch)
        projections = [shard.o_proj for shard in self.shards]
        if self.overlap_o_proj:
            return matmul_allreduce(projections, attended, self.group)
        return self.group.all_reduce([project(x) for project, x in zip(projections, attended, strict=True)])

    def attended(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
                 batch: RaggedBatch) -> list[np.ndarray]:
        """The input of each local shard's o_proj, whose results are partial sums over the group."""
        projected = [shard.projected(x) for shard, x in zip(self.shards, xs, strict=True)]
        sums = [None] * len(projected)
        if self.shards[0].norm_over_projection:
            sums = self.group.all_reduce([shard.square_sums(qkv)
                                          for shard, qkv in zip(self.shards, projected, strict=True)])
        return [shard.attended(layer_idx, qkv, cache, batch, total)
                for shard, qkv, cache, total in zip(self.shards, projected, caches, sums, strict=True)]
