"""One forward pass's input: the new tokens of several requests, concatenated without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from cutp.errors import ConfigError
from cutp.nn.rotary_embedding import RotaryEmbedding
from cutp.ops.attention import paged_attention
from cutp.ops.dispatch import rotary_kv_write
from cutp.ops.rotary import rotary_table


@dataclass(frozen=True)
class RaggedBatch:
    """The new tokens of B requests, T in all, and where their keys and values go.

    tokens: int [T]. input_row_offsets: int [B + 1], request b's tokens are rows offsets[b] .. offsets[b + 1].
    cache_lengths: int [B], tokens each request has in the cache already. lookup_table: int [B, pages], the pages of
    each request in order. page_size: tokens a page. rope_lengths: int [B], the number of tokens each request may
    reach, which decides its rotary table where that depends on the length; it must not change during a request.
    """

    tokens: np.ndarray
    input_row_offsets: np.ndarray
    cache_lengths: np.ndarray
    lookup_table: np.ndarray
    page_size: int
    rope_lengths: np.ndarray
    _rotary: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], page_size: int, cache_lengths: Sequence[int] | None = None,
           max_total: int | None = None) -> RaggedBatch:
        """A batch of new tokens, a list a request, with pages dealt out in order.

        For models run by hand: request b owns pages b * n .. (b + 1) * n - 1, where n pages hold `max_total` tokens
        (default: the longest request). Calls with the same `max_total` and growing `cache_lengths` (tokens each request
        has in the cache) continue the same requests. Raises ConfigError for another number of `cache_lengths` than
        requests, for `cache_lengths` without a `max_total`, and for a request longer than that.
        """
        lengths = np.array([len(request) for request in tokens], np.int64)
        cached = np.zeros_like(lengths) if cache_lengths is None else np.asarray(cache_lengths, np.int64)
        if cached.shape != lengths.shape or (cached < 0).any():
            raise ConfigError(f"cache_lengths must hold a number >= 0 for each of the {len(lengths)} requests, "
                              f"not {cached.tolist()}")
        if cached.any() and max_total is None:
            raise ConfigError("cache_lengths without max_total: the pages of a request would move as it grows",
                              hint="give the same max_total in every call")
        longest = int((lengths + cached).max(initial=0))
        total = longest if max_total is None else max_total
        if longest > total:
            raise ConfigError(f"a request of {longest} tokens does not fit into max_total={total}")
        pages = -(-total // page_size)
        return cls(
            tokens=np.array([token for request in tokens for token in request], np.int64),
            input_row_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            cache_lengths=cached,
            lookup_table=np.arange(len(lengths) * pages).reshape(len(lengths), pages),
            page_size=page_size,
            rope_lengths=np.full(len(lengths), total),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """New tokens of each request, [B]."""
        return np.diff(self.input_row_offsets)

    @cached_property
    def request_of_token(self) -> np.ndarray:
        """The request each token belongs to, [T]."""
        return np.repeat(np.arange(len(self.cache_lengths)), self.lengths)

    @cached_property
    def positions(self) -> np.ndarray:
        """Position of each token in its request, [T]."""
        first_rows = np.repeat(self.input_row_offsets[:-1], self.lengths)
        return np.arange(len(self.tokens)) - first_rows + np.repeat(self.cache_lengths, self.lengths)

    @cached_property
    def slots(self) -> np.ndarray:
        """Cache slot of each token, [T]: page * page_size + offset in the page."""
        page, offset = np.divmod(self.positions, self.page_size)
        return self.lookup_table[self.request_of_token, page] * self.page_size + offset

    def attention(self, q: np.ndarray, pages: np.ndarray, scale: float, *, window: int | None = None,
                  softcap: float | None = None, sinks: np.ndarray | None = None) -> np.ndarray:
        """`cutp.ops.attention.paged_attention` of queries [T, H, D] over the pages of this batch's requests."""
        return paged_attention(q, pages, self.lookup_table, self.input_row_offsets, self.cache_lengths, scale,
                               window=window, softcap=softcap, sinks=sinks)

    def rotary_attention(self, qkv: np.ndarray, n_heads: int, cos: np.ndarray | None, sin: np.ndarray | None,
                         pages: np.ndarray, scale: float, *, interleaved: bool = False, **options) -> np.ndarray:
        """Writes the new keys and values of a projection, as `cutp.ops.dispatch.rotary_kv_write`, and then `attention`
        of its queries, with the same `options`."""
        q = rotary_kv_write(qkv, n_heads, cos, sin, self.slots, pages, interleaved=interleaved)
        return self.attention(q, pages, scale, **options)

    def rotary(self, rope: RotaryEmbedding, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of every token for `rope`, [T, rotary_dim / 2] each; computed once a pass."""
        key = (rope, dtype)
        if key not in self._rotary:
            self._rotary[key] = self._rotary_table(rope, dtype)
        return self._rotary[key]

    def _rotary_table(self, rope: RotaryEmbedding, dtype: np.dtype):
        if not rope.length_dependent:
            common = rope.frequencies(0)
            return rotary_table(self.positions, common.inv_freq, common.attention_scaling, dtype)
        each = [rope.frequencies(int(length)) for length in self.rope_lengths]
        inv_freq = np.stack([frequencies.inv_freq for frequencies in each])[self.request_of_token]
        scaling = np.array([frequencies.attention_scaling for frequencies in each], np.float32)
        return rotary_table(self.positions, inv_freq, scaling[self.request_of_token], dtype)
