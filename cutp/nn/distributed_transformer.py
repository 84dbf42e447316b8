"""The decoder-only transformer over a tensor-parallel group, and its block.

Lists hold one entry for every device of the group that lives in this process: one under MPI, N when one process
holds N shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.kv_cache.paged import PagedKVCache
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.embedding import VocabParallelEmbedding
from cutp.nn.linear import ColumnParallelLinear
from cutp.nn.module import Module, ShardableModule, Shards, sharded
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.return_logits import ReturnLogits, logit_rows
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.nn.sharding import ShardingStrategy

T = TypeVar("T")


class ShardableCallable(Protocol):
    """A layer that can be sharded and called: what a block takes as its norm or its feed-forward layer."""

    sharding_strategy: ShardingStrategy | None

    def shard(self, devices) -> Sequence[ShardableCallable]: ...

    def __call__(self, x: np.ndarray) -> np.ndarray: ...


def take(it: Iterator[T], n: int) -> list[T]:
    """The next `n` items of `it`, fewer if it ends."""
    return list(islice(it, n))


def distribute_value(v: Any, devices) -> list[Any]:
    """`v` once for every local device of `devices`. Copies nothing where the devices share memory."""
    return [v for _ in DeviceGroup.of(devices).local_ranks]


def forward_sharded_layers(layers: Sequence[Callable[[np.ndarray], np.ndarray]],
                           xs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[layer_i(x_i)], without communication. AssertionError with both counts when they differ."""
    if len(layers) != len(xs):
        raise AssertionError(f"{len(layers)} sharded layers were given {len(xs)} inputs")
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


class DistributedTransformerBlock(Module):
    """h = x + attention(norm(x)); h + mlp(norm(h)): pre-norm, two all-reduces.

    attention: a parallel attention layer, whose result is already summed over the group. mlp: sharded here by
    tensor_parallel; its partial sums are all-reduced here. attention_norm, mlp_norm: replicated here.
    """

    def __init__(self, attention: Module, mlp: ShardableModule, attention_norm: ShardableModule,
                 mlp_norm: ShardableModule, devices):
        self.group = DeviceGroup.of(devices)
        size = self.group.size
        self.self_attn = attention
        self.mlp: Shards = sharded(mlp, ShardingStrategy.tensor_parallel(size), self.group)
        self.input_layernorm: Shards = sharded(attention_norm, ShardingStrategy.replicate(size), self.group)
        self.post_attention_layernorm: Shards = sharded(mlp_norm, ShardingStrategy.replicate(size), self.group)

    def __call__(self, layer_idx: int, xs: Sequence[np.ndarray], caches: Sequence[PagedKVCache],
                 batch: RaggedBatch) -> list[np.ndarray]:
        """One residual stream [T, dim] a local device -> the same, after this block."""
        attended = self.self_attn(layer_idx, forward_sharded_layers(self.input_layernorm, xs), caches, batch)
        hs = [x + a for x, a in zip(xs, attended, strict=True)]
        partial = forward_sharded_layers(self.mlp, forward_sharded_layers(self.post_attention_layernorm, hs))
        return [h + m for h, m in zip(hs, self.group.all_reduce(partial), strict=True)]


class DistributedTransformer(Module):
    """Embedding, blocks, final norm and output head of a decoder-only model over a tensor-parallel group.

    dim: width of the residual stream. n_heads: query heads of the whole model. layers: the blocks. norm: the final
    norm, replicated here. output: the head, divided by vocabulary. embedding: divided by vocabulary. kv_params: the
    cache this model needs. devices: the group. rope: the rotary embedding of the attention layers (layers may hold
    others). return_logits: which rows `__call__` returns. logits_scaling: the logits are divided by it.
    """

    def __init__(self, dim: int, n_heads: int, layers: Iterable[DistributedTransformerBlock], norm: ShardableModule,
                 output: ColumnParallelLinear, embedding: VocabParallelEmbedding, kv_params: KVCacheParams, devices,
                 rope: RotaryEmbedding | None, return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
                 logits_scaling: float = 1.0):
        self.group = DeviceGroup.of(devices)
        self.dim, self.n_heads = dim, n_heads
        self.embed_tokens = embedding
        self.layers = list(layers)
        self.norm: Shards = sharded(norm, ShardingStrategy.replicate(self.group.size), self.group)
        self.lm_head = output
        self.kv_params = kv_params
        self.rope = rope
        self.return_logits = return_logits
        self.logits_scaling = logits_scaling

    @property
    def vocab_size(self) -> int:
        return self.embed_tokens.vocab_size

    def __call__(self, batch: RaggedBatch, caches: Sequence[PagedKVCache], return_n_logits: int = 1) -> tuple:
        """Logits of the rows that `return_logits` names, float32, equal on every device.

        LAST_TOKEN: (last [B, V],). VARIABLE: (last [B, V], the last n of each request [B * n, V], offsets
        0, n, 2n, ... int64 [B + 1]). ALL: (last [B, V], [T, V], input_row_offsets). Norm and head run once, on the
        rows that are needed.
        """
        mode = self.return_logits
        rows = logit_rows(mode, batch.input_row_offsets, return_n_logits)
        local = self.local_logits(self.hidden_states(batch, caches), rows)
        logits = self.group.all_gather(local, axis=-1)[0]
        if mode is ReturnLogits.LAST_TOKEN:
            return (logits,)
        if mode is ReturnLogits.VARIABLE:
            offsets = np.arange(len(batch.lengths) + 1, dtype=np.int64) * return_n_logits
        else:
            offsets = batch.input_row_offsets
        return logits[offsets[1:] - 1], logits, offsets

    def hidden_states(self, batch: RaggedBatch, caches: Sequence[PagedKVCache]) -> list[np.ndarray]:
        """The residual stream after the last block, before the final norm: one [T, dim] a local device."""
        hs = self.embed_tokens(batch.tokens)
        for layer_idx, layer in enumerate(self.layers):
            hs = layer(layer_idx, hs, caches, batch)
        return hs

    def local_logits(self, hs: Sequence[np.ndarray], rows: np.ndarray) -> list[np.ndarray]:
        """Each local device's slice of the logits of `rows`, float32 [R, V_local], scaled, not gathered."""
        normed = forward_sharded_layers(self.norm, [h[rows] for h in hs])
        logits = [part.astype(np.float32, copy=False) for part in self.lm_head.local(normed)]
        if self.logits_scaling != 1.0:
            logits = [part / np.float32(self.logits_scaling) for part in logits]
        return logits
