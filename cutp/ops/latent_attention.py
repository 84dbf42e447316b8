"""Causal attention of a ragged batch over the paged latent cache (multi-head latent attention, MLA).

DeepSeek-V2 (2024, arXiv:2405.04434, section 2.1): a token's keys and values of all heads are made from one latent
vector c of R channels, by the matrix W of `kv_b_proj`, and from one rotated key of D_r channels that the heads share.
The cache holds C = R + D_r values a token. There are two ways to read it:

- expanded: make keys [W_k c, rotated key] and values W_v c of the whole context, then attend head by head.
- absorbed: score = (W_k^T q) . c + q_r . rotated key, and latents are mixed before W_v is applied. All heads read the
  same C values: multi-query attention over the latents, between two small products per query.
"""

from __future__ import annotations

import numpy as np

from cutp.ops.attention import causal_attention
from cutp.ops.rounding import as_float32, rounded

# Keys and values of one block of heads are expanded at once: this many float32 values (64 MB) bounds the memory.
_MAX_EXPANDED = 1 << 24


def latent_attention(q: np.ndarray, pages: np.ndarray, lookup_table: np.ndarray, input_row_offsets: np.ndarray,
                     cache_lengths: np.ndarray, scale: float, value_dim: int, *,
                     out: np.ndarray | None = None) -> np.ndarray:
    """The absorbed form: every head's keys are the latents, its values their first `value_dim` channels.

    q: [T, H, C], absorbed queries W_k^T q next to the rotated ones; pages: [P, 1, 1, S, C], which hold the latents of
    the new tokens too; lookup_table, input_row_offsets, cache_lengths: as in `cutp.ops.attention.paged_attention`.
    Returns [T, H, value_dim] in the dtype of `q`, still to be multiplied by W_v. Scores and sums are float32; the
    probabilities are rounded to that dtype before they meet the values.
    """
    if out is None:
        out = np.empty((*q.shape[:2], value_dim), q.dtype)
    for rows, latents in _requests(pages, lookup_table, input_row_offsets, cache_lengths):
        causal_attention(q[rows], latents[None], latents[None, :, :value_dim], scale, out=out[rows])
    return out


def expanded_latent_attention(q: np.ndarray, kv_b: np.ndarray, pages: np.ndarray, lookup_table: np.ndarray,
                              input_row_offsets: np.ndarray, cache_lengths: np.ndarray, scale: float, *,
                              out: np.ndarray | None = None) -> np.ndarray:
    """The expanded form: keys and values of the whole context are made first, then heads attend on their own.

    q: [T, H, D_n + D_r], rotated in its last D_r channels; kv_b: [H, D_n + D_v, R], of each head the rows that make
    the key's first D_n channels and then those of the value. The other arguments are as in `latent_attention`.
    Returns [T, H, D_v] in the dtype of `q`. Keys and values are rounded to that dtype, as a projection's results are.
    """
    n_heads, rows_per_head, rank = kv_b.shape
    rope_dim = pages.shape[-1] - rank
    nope_dim = q.shape[2] - rope_dim
    if out is None:
        out = np.empty((*q.shape[:2], rows_per_head - nope_dim), q.dtype)
    for rows, latents in _requests(pages, lookup_table, input_row_offsets, cache_lengths):
        length = len(latents)
        block = max(1, _MAX_EXPANDED // (length * (rows_per_head + rope_dim)))
        for first in range(0, n_heads, block):
            heads = slice(first, first + block)
            kv = latents[:, :rank] @ as_float32(kv_b[heads]).reshape(-1, rank).T
            kv = rounded(kv, q.dtype).reshape(length, -1, rows_per_head).transpose(1, 0, 2)
            rope_keys = np.broadcast_to(latents[:, rank:], (len(kv), length, rope_dim))
            keys = np.concatenate([kv[..., :nope_dim], rope_keys], axis=-1)
            causal_attention(q[rows, heads], keys, kv[..., nope_dim:], scale, out=out[rows, heads])
    return out


def _requests(pages, lookup_table, input_row_offsets, cache_lengths):
    """For every request with new tokens: its rows, and the latents of all its tokens, float32 [L, C]."""
    page_size, channels = pages.shape[3:]
    for b, cached in enumerate(cache_lengths):
        start, stop = int(input_row_offsets[b]), int(input_row_offsets[b + 1])
        if start == stop:
            continue
        length = int(cached) + stop - start
        table = lookup_table[b, : -(-length // page_size)]
        yield slice(start, stop), as_float32(pages[table].reshape(-1, channels)[:length])
