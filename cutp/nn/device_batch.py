"""One forward pass's input on a GPU: what `RaggedBatch` is to NumPy, as arrays that kernels read.

Requests that add one token come first and go through the decode kernel, all others through the prefill kernel.
Everything a layer asks for is made by `prepare`, outside of the layers' frames of scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cutp.array.scratch import Memory, scratch
from cutp.errors import ConfigError
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.device_latent import LatentShape, LatentWorkspace
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.ops.decode_attention_cuda import (
    BLOCKS_PER_MULTIPROCESSOR,
    decode_attention,
    decode_plan,
    decode_workspace,
    rotary_decode_attention,
    turns_heads,
)
from cutp.ops.dispatch import rotary_kv_write
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from cutp.ops.rotary_cuda import rotary_table


@dataclass(frozen=True)
class AttentionShape:
    """What the attention layers of a model have in common on this rank, and the windows they use."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    ropes: tuple[RotaryEmbedding, ...]

    @classmethod
    def of(cls, layers: Iterable[Any], params: KVCacheParams) -> AttentionShape:
        """From attention layers, with heads as long as those of the cache; ConfigError where they differ in more than
        their windows and positions."""
        layers = list(layers)
        shapes = {(layer.n_heads, layer.n_kv_heads, params.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise ConfigError(f"the attention layers have {len(shapes)} different shapes; on a GPU they need one")
        ropes = dict.fromkeys(layer.rope for layer in layers if layer.rope is not None)
        return cls(*shapes.pop(), tuple(dict.fromkeys(layer.window for layer in layers)), tuple(ropes))

    def workspace(self, memory: Memory, batch: int, max_pages: int, page_size: int, multiprocessors: int,
                  dtype: np.dtype, batch_invariant: bool = False) -> DecodeWorkspace:
        """For up to `batch` requests of up to `max_pages` pages each."""
        return DecodeWorkspace(memory, self, batch, max_pages, page_size, multiprocessors * BLOCKS_PER_MULTIPROCESSOR,
                               dtype, batch_invariant)


def attention_shape(layers: Iterable[Any], params: KVCacheParams) -> AttentionShape | LatentShape:
    """What the attention layers of a model with such a cache have in common."""
    return (LatentShape if params.latent else AttentionShape).of(layers, params)


class DecodeWorkspace:
    """Static buffers of decode attention for up to `batch` requests of up to `max_pages` pages each.

    dtype: of queries, keys and values. batch_invariant: requests are divided by their own lengths alone, so that their
    bits do not depend on the others.
    """

    def __init__(self, memory: Memory, shape: AttentionShape, batch: int, max_pages: int, page_size: int, blocks: int,
                 dtype: np.dtype, batch_invariant: bool = False):
        sizes = decode_workspace(batch, max_pages * page_size, shape.n_heads, shape.n_kv_heads, shape.head_dim)
        self.plans = {window: memory.empty(sizes.plan, np.int32) for window in shape.windows}
        self.partials = memory.empty(sizes.partials, np.float32)
        self.counters = memory.empty(sizes.counters, np.uint32)
        self.counters[...] = 0
        self.blocks = blocks
        self.n_kv_heads = shape.n_kv_heads
        self.dtype = dtype
        self.batch_invariant = batch_invariant

    def prepare(self, kv_lengths: Any) -> None:
        """Lists the work of requests with one new token each, for every window."""
        for window, plan in self.plans.items():
            decode_plan(kv_lengths, self.n_kv_heads, window=window, together=not self.batch_invariant, plan=plan,
                        pdl=True)


@dataclass
class DeviceBatch:
    """B requests with T new tokens in all; arrays on the device but for `decode_count` and `rope_lengths`.

    tokens, positions, slots: int64 [T]; a padding row has slot -1. lookup_table: int32 [B, P]. decode_count: requests
    at the beginning that have one token each. kv_lengths: int32 [decode_count], their tokens with the new one (0 for a
    padding row). input_row_offsets: int32 [B + 1], cache_lengths: int32 [B] and work_list: of `prefill_work_list` for
    the requests from decode_count on; None where there are none. Where some are, row_lengths, int32 [T], has the number
    of tokens that each token sees, and request_of_token, int64 [T], its request. rope_lengths: as in `RaggedBatch`, on
    the host, and request_of_token, where rotary tables depend on them.
    """

    tokens: Any
    positions: Any
    slots: Any
    lookup_table: Any
    page_size: int
    shape: AttentionShape | LatentShape
    workspace: DecodeWorkspace | LatentWorkspace
    decode_count: int
    kv_lengths: Any
    input_row_offsets: Any = None
    cache_lengths: Any = None
    work_list: Any = None
    rope_lengths: np.ndarray | None = None
    request_of_token: Any = None
    row_lengths: Any = None
    _tables: dict = field(default_factory=dict, repr=False)

    def prepare(self, frequencies: RotaryTables, dtype: np.dtype) -> None:
        """Starts what all layers need: the cosines of every rotary embedding, and decode attention's list of work."""
        for rope in self.shape.ropes:
            self._tables[rope] = frequencies.table(rope, self, dtype)
        if self.decode_count:
            self.workspace.prepare(self.kv_lengths)

    def rotary(self, rope: RotaryEmbedding, dtype: np.dtype) -> tuple[Any, Any]:
        """cos and sin of every token for `rope`, float32 [T, rotary_dim / 2] each."""
        return self._tables[rope]

    def attention(self, q: Any, pages: Any, scale: float, *, window: int | None = None, softcap: float | None = None,
                  sinks: Any = None) -> Any:
        """Attention of queries [T, H, D] over the pages of this batch's requests, [T, H, D]."""
        out = scratch().empty(q.shape, q.dtype)
        count = self.decode_count
        if count:
            work = self.workspace
            decode_attention(q[:count], pages, self.lookup_table[:count], self.kv_lengths, work.plans[window], scale,
                             softcap=softcap, sinks=sinks, partials=work.partials, counters=work.counters,
                             blocks=work.blocks, out=out[:count], pdl=True)
        if self.work_list is not None:
            prefill_attention(q, pages, self.lookup_table, self.input_row_offsets, self.cache_lengths, self.work_list,
                              scale, window=window, softcap=softcap, sinks=sinks, out=out, pdl=True)
        return out

    def rotary_attention(self, qkv: Any, n_heads: int, cos: Any, sin: Any, pages: Any, scale: float, *,
                         interleaved: bool = False, **options: Any) -> Any:
        """Writes the new keys and values of a projection, as `cutp.ops.dispatch.rotary_kv_write`, and then `attention`
        of its queries, with the same `options`. In one kernel where there is one, with the same bits."""
        n_kv_heads, _, head_dim = pages.shape[2:]
        only_decodes = self.decode_count == qkv.shape[0]
        if (only_decodes and cos is not None and qkv.shape[1] == (n_heads + 2 * n_kv_heads) * head_dim
                and turns_heads(head_dim, 2 * cos.shape[1], n_heads, n_kv_heads, qkv.dtype, interleaved=interleaved)):
            return self._rotary_decode(qkv, n_heads, cos, sin, pages, scale, **options)
        q = rotary_kv_write(qkv, n_heads, cos, sin, self.slots, pages, interleaved=interleaved)
        return self.attention(q, pages, scale, **options)

    def _rotary_decode(self, qkv: Any, n_heads: int, cos: Any, sin: Any, pages: Any, scale: float, *,
                       window: int | None = None, softcap: float | None = None, sinks: Any = None) -> Any:
        out = scratch().empty((qkv.shape[0], n_heads, pages.shape[4]), qkv.dtype)
        work = self.workspace
        rotary_decode_attention(qkv, cos, sin, pages, self.lookup_table, self.kv_lengths, work.plans[window], scale,
                                softcap=softcap, sinks=sinks, partials=work.partials, counters=work.counters,
                                blocks=work.blocks, out=out, pdl=True)
        return out

    def latent_attention(self, q: Any, pages: Any, scale: float, value_dim: int) -> Any:
        """`cutp.ops.latent_attention.latent_attention` of queries [T, H, C] over this batch's requests."""
        out = scratch().empty((*q.shape[:2], value_dim), q.dtype)
        count = self.decode_count
        if count:
            self.workspace.attend_decode(q[:count], pages, self.lookup_table[:count], self.kv_lengths, scale,
                                         out[:count])
        if self.row_lengths is not None:
            self.workspace.attend_prompts(q[count:], pages, self.lookup_table, self.row_lengths[count:],
                                          self.request_of_token[count:], scale, out[count:])
        return out


class RotaryTables:
    """Frequencies of rotary embeddings on the device, and the tables of batches."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._common: dict[RotaryEmbedding, tuple[Any, float]] = {}

    def table(self, rope: RotaryEmbedding, batch: DeviceBatch, dtype: np.dtype) -> tuple[Any, Any]:
        """cos and sin of the batch's positions, in scratch memory."""
        rows = (batch.positions.shape[0], rope.rotary_dim // 2)
        cos, sin = scratch().empty(rows, np.float32), scratch().empty(rows, np.float32)
        if not rope.length_dependent:
            if rope not in self._common:
                common = rope.frequencies(0)
                self._common[rope] = self._uploaded(common.inv_freq, empty=self._memory.empty), common.attention_scaling
            inv_freq, scaling = self._common[rope]
            rotary_table(batch.positions, inv_freq, scaling, dtype, cos_out=cos, sin_out=sin, pdl=True)
            return cos, sin
        each = [rope.frequencies(int(length)) for length in batch.rope_lengths]
        inv_freq = self._uploaded(np.stack([one.inv_freq for one in each]))
        scaling = self._uploaded(np.array([one.attention_scaling for one in each], np.float32))
        rotary_table(batch.positions, inv_freq, scaling, dtype, request_of_token=batch.request_of_token, cos_out=cos,
                     sin_out=sin, pdl=True)
        return cos, sin

    def _uploaded(self, host: np.ndarray, empty=None) -> Any:
        target = (empty or scratch().empty)(host.shape, host.dtype)
        self._memory.upload(target, np.ascontiguousarray(host))
        return target


def upload_batch(memory: Memory, shape: AttentionShape | LatentShape, workspace: DecodeWorkspace | LatentWorkspace,
                 tokens: Sequence[int], lengths: np.ndarray, cached: np.ndarray, lookup_table: np.ndarray,
                 page_size: int, rope_lengths: np.ndarray, decode_count: int | None = None) -> DeviceBatch:
    """A batch of new tokens, with requests of one token first; arrays in scratch memory.

    tokens: the new tokens of all requests. lengths, cached: int [B], new tokens and tokens in the cache. lookup_table:
    int32 [B, P], any width. decode_count: how many of those requests go through the decode kernel; by default all.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    request = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(offsets[-1]) - offsets[request] + cached[request]
    page, offset = np.divmod(positions, page_size)
    slots = lookup_table[request, page].astype(np.int64) * page_size + offset
    many = np.flatnonzero(lengths > 1)
    count = int(many[0]) if len(many) else len(lengths)
    if decode_count is not None:
        count = min(count, decode_count)

    def up(values: np.ndarray, dtype: Any) -> Any:
        host = np.ascontiguousarray(values, dtype)
        target = scratch().empty(host.shape, dtype)
        memory.upload(target, host)
        return target

    batch = DeviceBatch(
        tokens=up(np.asarray(tokens), np.int64), positions=up(positions, np.int64), slots=up(slots, np.int64),
        lookup_table=up(lookup_table, np.int32), page_size=page_size, shape=shape, workspace=workspace,
        decode_count=count, kv_lengths=up(cached[:count] + 1, np.int32), rope_lengths=np.asarray(rope_lengths),
        request_of_token=up(request, np.int64),
    )
    if count < len(lengths) and isinstance(shape, LatentShape):
        batch.row_lengths = up(positions + 1, np.int32)
    elif count < len(lengths):
        group = shape.n_heads // shape.n_kv_heads
        work = prefill_work_list(np.where(np.arange(len(lengths)) < count, 0, lengths), cached, group,
                                 head_dim=shape.head_dim, dtype=workspace.dtype, row_offsets=offsets[:-1])
        batch.input_row_offsets, batch.cache_lengths = up(offsets, np.int32), up(cached, np.int32)
        batch.work_list = up(work, np.int32)
    return batch
