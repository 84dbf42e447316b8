"""Multi-head latent attention on a GPU: what its layers have in common, its workspace, and how a batch attends.

Every token attends in the absorbed form, as if it were a request of its own: the latents of a request are read once for
all heads, by tensor cores, whether it has one new token or many.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cutp.array.scratch import Memory
from cutp.errors import ConfigError
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.ops.latent_cuda import latent_attention
from cutp.ops.latent_decode_cuda import (
    CHANNELS,
    VALUE_DIM,
    blocks_per_multiprocessor,
    latent_decode_attention,
    latent_decode_plan,
    latent_decode_workspace,
)

_PARTIALS_BYTES = 512 << 20  # of the results of parts of requests


@dataclass(frozen=True)
class LatentShape:
    """What the attention layers of a model have in common on this rank."""

    n_heads: int
    channels: int
    value_dim: int
    ropes: tuple[RotaryEmbedding, ...]

    @classmethod
    def of(cls, layers: Iterable[Any], params: KVCacheParams) -> LatentShape:
        """From layers of `MultiHeadLatentAttention`; ConfigError where they differ in more than their positions."""
        layers = list(layers)
        shapes = {(layer.n_heads, params.head_dim, layer.kv_lora_rank) for layer in layers}
        if len(shapes) != 1:
            raise ConfigError(f"the attention layers have {len(shapes)} different shapes; on a GPU they need one")
        return cls(*shapes.pop(), tuple(dict.fromkeys(layer.rope for layer in layers)))

    def workspace(self, memory: Memory, batch: int, max_pages: int, page_size: int, multiprocessors: int,
                  dtype: np.dtype, batch_invariant: bool = False) -> LatentWorkspace:
        """For up to `batch` requests of up to `max_pages` pages each. `batch_invariant` ones are divided no otherwise:
        a request's parts always are those of its own length."""
        return LatentWorkspace(memory, self, batch, max_pages * page_size, multiprocessors, dtype)


class LatentWorkspace:
    """Static buffers, where the kernel for the usual sizes is used, and the launches of attention.

    That kernel takes 16-bit latents of 576 channels, 512 of them values; another, slower one takes all others.
    """

    def __init__(self, memory: Memory, shape: LatentShape, batch: int, max_length: int, multiprocessors: int,
                 dtype: np.dtype):
        self.n_heads = shape.n_heads
        self.fast = dtype.itemsize == 2 and (shape.channels, shape.value_dim) == (CHANNELS, VALUE_DIM)
        if self.fast:
            # Requests are as many a launch as there is room for partial results.
            one = latent_decode_workspace(1, max_length, shape.n_heads)
            self.rows = min(batch, max(1, _PARTIALS_BYTES // (4 * one.partials[0])))
            sizes = latent_decode_workspace(self.rows, max_length, shape.n_heads)
            self.plans = [memory.empty(sizes.plan, np.int32) for _ in range(0, batch, self.rows)]
            self.prompt_plan = memory.empty(sizes.plan, np.int32)
            self.partials = memory.empty(sizes.partials, np.float32)
            self.blocks = multiprocessors * blocks_per_multiprocessor(shape.n_heads)

    def prepare(self, kv_lengths: Any) -> None:
        """Lists the work of requests with one new token each, once for all layers."""
        if self.fast:
            for rows, plan in self._launches(kv_lengths):
                latent_decode_plan(kv_lengths[rows], self.n_heads, plan=plan, pdl=True)

    def attend_decode(self, q: Any, pages: Any, lookup_table: Any, kv_lengths: Any, scale: float, out: Any) -> None:
        """The rows of requests with one new token each."""
        if not self.fast:
            latent_attention(q, pages, lookup_table, kv_lengths, scale, out=out, pdl=True)
            return
        for rows, plan in self._launches(kv_lengths):
            latent_decode_attention(q[rows], pages, lookup_table[rows], kv_lengths[rows], plan, scale,
                                    partials=self.partials, blocks=self.blocks, out=out[rows], pdl=True)

    def attend_prompts(self, q: Any, pages: Any, lookup_table: Any, lengths: Any, table_rows: Any, scale: float,
                       out: Any) -> None:
        """Tokens of prompts, each with the number of tokens it sees, and the row of `lookup_table` of its request."""
        if not self.fast:
            latent_attention(q, pages, lookup_table, lengths, scale, table_rows=table_rows, out=out, pdl=True)
            return
        # As many tokens a time as the buffers have room for.
        longest = lookup_table.shape[1] * pages.shape[3]
        items = latent_decode_workspace(1, longest, self.n_heads, whole=True).plan[0] - 1
        step = max(1, (self.prompt_plan.shape[0] - 1) // items)
        for first in range(0, q.shape[0], step):
            rows = slice(first, first + step)
            latent_decode_plan(lengths[rows], self.n_heads, whole=True, plan=self.prompt_plan, pdl=True)
            latent_decode_attention(q[rows], pages, lookup_table, lengths[rows], self.prompt_plan, scale,
                                    table_rows=table_rows[rows], whole=True, partials=self.partials,
                                    blocks=self.blocks, out=out[rows], pdl=True)

    def _launches(self, kv_lengths: Any) -> list[tuple[slice, Any]]:
        """Rows, and the plan they have."""
        firsts = range(0, kv_lengths.shape[0], self.rows)
        return [(slice(first, first + self.rows), plan) for first, plan in zip(firsts, self.plans, strict=False)]
