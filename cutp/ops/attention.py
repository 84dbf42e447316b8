"""Causal attention of a ragged batch over the paged key-value cache."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import as_float32, rounded

# Scores of one block of queries are held at once: this many float32 values (64 MB) bounds the memory of a long
# prompt whatever its length.
_MAX_SCORES = 1 << 24


def paged_attention(q: np.ndarray, pages: np.ndarray, lookup_table: np.ndarray, input_row_offsets: np.ndarray,
                    cache_lengths: np.ndarray, scale: float, *, window: int | None = None,
                    softcap: float | None = None, sinks: np.ndarray | None = None,
                    out: np.ndarray | None = None) -> np.ndarray:
    """softmax(scale * q k^T) v for every token over its own request's keys up to and including itself.

    q: [T, H, D], request b's new tokens in rows input_row_offsets[b] .. input_row_offsets[b+1];
    pages: [P, 2, H_kv, S, D], which hold the keys and values of the new tokens too;
    lookup_table: int [B, max pages], page numbers of each request in order;
    cache_lengths: int [B], tokens in the cache *before* this batch. Head h reads key-value head h // (H / H_kv).

    window: a token sees itself and the window - 1 tokens before it. softcap: cap * tanh(score / cap), before
    masking. sinks: float32 [H], one extra logit a head that takes part in the softmax and carries no value.
    Returns [T, H, D] in the dtype of `q`. Scores and sums are float32; the probabilities are rounded to that
    dtype before they meet the values, as in flash attention.
    """
    if out is None:
        out = np.empty_like(q)
    n_kv_heads, page_size, head_dim = pages.shape[2:]
    for b, cached in enumerate(cache_lengths):
        start, stop = input_row_offsets[b], input_row_offsets[b + 1]
        if start == stop:
            continue
        length = int(cached + stop - start)
        table = lookup_table[b, : -(-length // page_size)]
        # [n, 2, H_kv, S, D] -> [2, H_kv, n * S, D]
        kv = pages[table].transpose(1, 2, 0, 3, 4).reshape(2, n_kv_heads, -1, head_dim)[:, :, :length]
        causal_attention(q[start:stop], as_float32(kv[0]), as_float32(kv[1]), scale, window=window, softcap=softcap,
                         sinks=sinks, out=out[start:stop])
    return out


def causal_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, *, window: int | None = None,
                     softcap: float | None = None, sinks: np.ndarray | None = None, out: np.ndarray) -> None:
    """Attention of one request whose keys and values lie side by side, into `out` [n, H, D_v].

    q: [n, H, D], the last n tokens of the request; keys: float32 [H_kv, L, D]; values: float32 [H_kv, L, D_v], of all
    its L tokens. The rest is as in `paged_attention`.
    """
    n, n_heads, _ = q.shape
    length = keys.shape[1]
    block = max(1, _MAX_SCORES // (n_heads * length))
    for first in range(0, n, block):
        last = min(first + block, n)
        positions = np.arange(length - n + first, length - n + last)
        out[first:last] = _attend(q[first:last], keys, values, positions, scale, window, softcap, sinks)


def _attend(q, keys, values, positions, scale, window, softcap, sinks) -> np.ndarray:
    """One block of queries q [n, H, D] at `positions` [n] against keys [H_kv, L, D] and values of one request."""
    n, n_heads, head_dim = q.shape
    n_kv_heads = len(keys)
    begin = 0 if window is None else max(0, int(positions[0]) - window + 1)
    end = int(positions[-1]) + 1
    keys, values = keys[:, begin:end], values[:, begin:end]
    # [n, H_kv, G, D] -> [H_kv, G * n, D]: the G query heads of a key-value head share one matrix product.
    grouped = as_float32(q).reshape(n, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    group = grouped.shape[1]
    scores = (grouped.reshape(n_kv_heads, group * n, head_dim) @ keys.transpose(0, 2, 1)) * np.float32(scale)
    scores = scores.reshape(n_kv_heads, group, n, end - begin)
    if softcap is not None:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    distance = positions[:, None] - np.arange(begin, end)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores[..., hidden] = -np.inf
    peak = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = as_float32(sinks).reshape(n_kv_heads, group, 1, 1)
        peak = np.maximum(peak, sink)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float32)
    if sinks is not None:
        total = total + np.exp(sink - peak)
    weights = rounded(weights, q.dtype).reshape(n_kv_heads, group * n, end - begin)
    y = (weights @ values).reshape(n_kv_heads, group, n, -1) / total
    return y.transpose(2, 0, 1, 3).reshape(n, n_heads, -1)
