"""The rows of a decode batch from one step to the next, so that a step that follows another needs nothing of the host.
"""

from __future__ import annotations

import numpy as np


def advance_rows(lengths: np.ndarray, in_use: np.ndarray, lookup_table: np.ndarray, page_size: int
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row in use gets one token more: `lengths`, int64 [B], the tokens of each row's request, is changed.

    in_use: bool [B]; lookup_table: int32 [B, P], the pages of each request. Returns (positions int64 [B], slots int64
    [B], kv_lengths int32 [B]) of the new tokens: their positions, their places in the cache as in
    `cutp.ops.kv_write.kv_write`, and the tokens that they see, themselves included. A row that is not in use has
    position 0, slot -1 and length 0.
    """
    lengths += in_use
    positions = np.where(in_use, lengths - 1, 0)
    page, offset = np.divmod(positions, page_size)
    slots = lookup_table[np.arange(len(lengths)), page].astype(np.int64) * page_size + offset
    return positions, np.where(in_use, slots, -1), np.where(in_use, lengths, 0).astype(np.int32)


def publish_tokens(tokens: np.ndarray, turn: np.ndarray, published: np.ndarray) -> None:
    """published[turn] = tokens, and the other turn comes next.

    tokens: int64 [B]; turn: int32 [1], 0 or 1; published: int64 [2, R] with R >= B, the rest stays as it is.
    """
    published[turn[0], : len(tokens)] = tokens
    turn[0] = 1 - turn[0]
