"""Gather of token embeddings from one rank's slice of the vocabulary."""

from __future__ import annotations

import numpy as np

from cutp.ops.rounding import store


def embedding(tokens: np.ndarray, table: np.ndarray, vocab_start: int, dtype: np.dtype,
              out: np.ndarray | None = None) -> np.ndarray:
    """Rows of `table` for the tokens this rank owns, zero rows for the others.

    tokens: int [T]; table: [V_local, d], the rows vocab_start .. vocab_start + V_local - 1 of the whole table.
    Returns [T, d] of `dtype`. Exactly one rank has a token's row, so the sum over ranks is exact.
    """
    local = tokens - vocab_start
    owned = (local >= 0) & (local < len(table))
    rows = np.zeros((len(tokens), table.shape[1]), table.dtype)
    rows[owned] = table[local[owned]]
    return store(rows, dtype, out)
