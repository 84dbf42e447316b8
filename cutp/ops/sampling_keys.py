"""Floats as integers that sort alike, and the exchange that finds a row's best token across vocabulary shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cutp.errors import ConfigError, CutpError

# Elements of a [rows, vocab] array worked on at once: keeps temporaries within a few megabytes.
BLOCK_ELEMENTS = 1 << 18

# Of a packed pair. Above the key of +inf and below no pair of a number, respectively.
NAN_PAIR = np.uint64(0xFFFFFFFFFFFFFFFF)
NO_PAIR = np.uint64(0)

LOW_WORD = np.uint64(0xFFFFFFFF)
SIGN = np.uint32(0x80000000)


def row_blocks(n_rows: int, row_length: int) -> Iterator[slice]:
    """Slices that cover n_rows rows, each with about BLOCK_ELEMENTS elements and at least one row."""
    step = max(1, BLOCK_ELEMENTS // max(1, row_length))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def ordered_keys(x: np.ndarray) -> np.ndarray:
    """uint32 keys with the order of the float32 values x [...] (no NaN); -0 and +0 get the same key.

    Positive numbers get their sign bit set, negative ones all their bits inverted.
    """
    bits = (x + np.float32(0)).view(np.int32)  # -0 + 0 is +0
    flip = (bits >> 31).view(np.uint32) | SIGN
    return bits.view(np.uint32) ^ flip


def values_of_keys(keys: np.ndarray) -> np.ndarray:
    """The float32 values whose `ordered_keys` are the uint32 `keys`."""
    flip = np.where(keys & SIGN, SIGN, np.uint32(0xFFFFFFFF))
    return (keys ^ flip).view(np.float32)


def pack_pairs(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(value, id) as one uint64: a greater value is greater, and among equal values a lower id is greater.

    values: float32 [...] without NaN. ids: int64 [...] in [0, 2^32).
    """
    return (ordered_keys(values).astype(np.uint64) << np.uint64(32)) | (LOW_WORD - ids.astype(np.uint64))


def unpack_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (values float32, ids int64) that `pack_pairs` put together."""
    values = values_of_keys((pairs >> np.uint64(32)).astype(np.uint32))
    return values, (LOW_WORD - (pairs & LOW_WORD)).astype(np.int64)


def check_logits(logits_local: np.ndarray) -> None:
    """ConfigError unless the logits are float32 [rows, local vocabulary]."""
    if logits_local.ndim != 2 or logits_local.dtype != np.float32:
        raise ConfigError(f"logits must be float32 [rows, vocab], not {logits_local.dtype} {logits_local.shape}")


def row_argmax(logits_local: np.ndarray, vocab_start: int, comm) -> tuple[np.ndarray, np.ndarray]:
    """Each row's greatest logit over all shards and the lowest token id that has it: (float32 [B], int64 [B]).

    logits_local: float32 [B, V_local], the columns from id `vocab_start` on; V_local may be 0. One all-gather of
    8 bytes a row; the result is equal on all ranks. +inf is a number like any other here.
    Raises CutpError, on all ranks alike, if a row holds a NaN or no logit above -inf.
    """
    n_rows, n_local = logits_local.shape
    if n_local:
        column = logits_local.argmax(axis=1)  # the first NaN, if there is one
        best = np.take_along_axis(logits_local, column[:, None], axis=1)[:, 0]
        missing = np.isnan(best)
        pairs = np.where(missing, NAN_PAIR, pack_pairs(np.where(missing, 0, best), column + vocab_start))
    else:
        pairs = np.full(n_rows, NO_PAIR)
    pairs = comm.all_gather(pairs[None], axis=0).max(axis=0, initial=NO_PAIR)
    _refuse(pairs == NAN_PAIR, "the logits contain NaN")
    row_max, ids = unpack_pairs(pairs)
    # The pair of no shard at all unpacks to a NaN, so that this refuses an empty vocabulary too.
    _refuse(~(row_max > -np.inf), "no token has a logit above -inf")
    return row_max, ids


def _refuse(bad_rows: np.ndarray, reason: str) -> None:
    if bad_rows.any():
        rows = np.flatnonzero(bad_rows)
        listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise CutpError(
            f"row{'s' * (len(rows) > 1)} {listed} of the batch: {reason}",
            hint="the model computed no usable scores: check the checkpoint's weights and its dtype",
        )
