"""Exact top-k, top-p and min-p on vocabulary shards: the score from which on a row's tokens survive.

All three filters keep the tokens at or above some score, so together they are one threshold per row. It is found
without sorting and without gathering logits, by a radix select: scores become 32-bit keys, a histogram over the
first 11 bits says in which bin the threshold lies, one over the next 11 bits of that bin's tokens refines it, and
one over the last 10 bits gives the score itself. Histograms hold counts (for top-k) and probability masses (for
top-p), masses as integers in units of 2^-40 of the most probable token's. Integers add up to the same sum in any
order, so the threshold is identical for every way of sharding the vocabulary.

Order and meaning as in Hugging Face's logits processors (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper):
top-p counts the mass of the tokens that top-k left. One difference: tokens with equal scores stay or go together.
"""

from __future__ import annotations

import math

import numpy as np

from cutp.ops.sampling_keys import ordered_keys, row_blocks, values_of_keys

# (shift, bits) of the three digits of a key, the most significant first.
DIGITS = ((21, 11), (10, 11), (0, 10))

# Rows per exchange: bounds the histograms, 32 KiB a row.
ROWS_AT_ONCE = 256

COUNT, MASS = 0, 1

LOG2_E = np.float32(1.4426950408889634)
LOWEST = np.finfo(np.float32).min

# 2^f for |f| <= 1/2 is the sum of these times f^6 .. f^0: ln(2)^k / k!, within 2e-7 of it.
EXP2_SERIES = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(6, -1, -1))

# Scores below this one have mass 0; limits the exponents that _split_masses builds.
NO_MASS = np.float32(-44)


def thresholds(z: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, comm) -> np.ndarray:
    """The least score that survives in each row: float32 [B], equal on all ranks; never -inf.

    z: float32 [B, V_local], scores relative to the row's maximum over all shards (so 0 is the greatest anywhere).
    top_k: integers [B], below 1 means off. top_p: float32 [B], 1 or more means off. min_p: float32 [B], 0 means off.
    Ranks communicate only if some row uses top-k or top-p.
    """
    with np.errstate(divide="ignore"):
        least = np.log(min_p.astype(np.float64)).astype(np.float32)  # p >= min_p * p_max, as a score
    least = np.maximum(least, LOWEST)  # a token of probability zero never survives
    searched = np.flatnonzero((top_k > 0) | (top_p < 1))
    for start in range(0, len(searched), ROWS_AT_ONCE):
        rows = searched[start : start + ROWS_AT_ONCE]
        least[rows] = np.maximum(least[rows], _search(z, rows, top_k[rows], top_p[rows], comm))
    return least


def integer_masses(z: np.ndarray) -> np.ndarray:
    """floor(exp(z) * 2^40) as int64 for scores z <= 0, float32 [...], with exp(z) as defined by `_split_masses`."""
    high, low = _split_masses(z)
    return (high.astype(np.int64) << 20) + low.astype(np.int64)


def _split_masses(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integer masses' upper and lower 20 bits, as float32.

    exp(z) is 2^n times 2^f by a series, with n + f = z * log2(e): float32 multiplications and additions in a fixed
    order, so that every machine has the same masses. sampling_logits.cu does the same. All other steps are exact.
    """
    f = np.maximum(z, NO_MASS)
    f *= LOG2_E
    n = np.rint(f)
    f -= n
    power = np.full_like(f, EXP2_SERIES[0])
    for coefficient in EXP2_SERIES[1:]:
        power *= f
        power += coefficient
    n += 127 + 20  # the exponent bits of 2^(n + 20)
    power *= (n.astype(np.int32) << 23).view(np.float32)
    high = np.floor(power)
    power -= high
    power *= np.float32(2**20)
    return high, np.floor(power, out=power)


def _search(z: np.ndarray, rows: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, comm) -> np.ndarray:
    """The threshold of top-k and top-p in `rows` of z: float32 [len(rows)]."""
    with_mass = bool((top_p < 1).any())
    first = comm.all_reduce(_histogram(z, rows, 0, None, with_mass))
    key = np.zeros(len(rows), np.uint32)
    total = first.sum(axis=2)  # [1 or 2, rows]: of all tokens, later of those that top-k left

    limited = np.flatnonzero(top_k > 0)
    if len(limited):
        count = np.minimum(top_k[limited], total[COUNT, limited])
        key[limited], total[:, limited] = _select(z, rows[limited], first[:, limited], COUNT, count, comm)

    limited = np.flatnonzero(top_p < 1)
    if len(limited):
        # Tokens that top-k removed lie below its threshold and so count in no mass from the top down to there, where
        # the whole mass is reached: the threshold of top-p is never below that of top-k.
        mass = share_of(top_p[limited], total[MASS, limited])
        key[limited], _ = _select(z, rows[limited], first[:, limited], MASS, mass, comm)
    return values_of_keys(key)


def share_of(top_p: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """ceil(top_p * mass), at least 1, in integers only: top_p is read as a multiple of 2^-32, rounded up."""
    share = np.ceil(np.maximum(top_p, 0).astype(np.float64) * 2.0**32).astype(np.uint64)
    mass, half = mass.astype(np.uint64), np.uint64(32)
    low = share * (mass & np.uint64(0xFFFFFFFF)) + np.uint64(0xFFFFFFFF)  # the carry rounds up
    return np.maximum(share * (mass >> half) + (low >> half), np.uint64(1)).astype(np.int64)


def _select(z, rows, histogram, measure: int, target: np.ndarray, comm) -> tuple[np.ndarray, np.ndarray]:
    """The greatest key such that the tokens at or above it have `target` of a measure (COUNT or MASS).

    rows: int64 [R], the rows of z. histogram: int64 [1 or 2, R, 2^11], the first digit's, summed over ranks.
    target: [R], from 1 to the row's total. Returns (uint32 [R], int64 [1 or 2, R]: the measures at or above it).
    """
    each = np.arange(len(rows))
    prefix = np.zeros(len(rows), np.uint32)
    above = np.zeros(histogram.shape[:2], np.int64)
    for level, (_, bits) in enumerate(DIGITS):
        if level:
            histogram = comm.all_reduce(_histogram(z, rows, level, prefix, len(histogram) == 2))
        from_top = above[..., None] + histogram[..., ::-1].cumsum(axis=2)
        place = (from_top[measure] >= target[:, None]).argmax(axis=1)  # the first bin from the top that reaches it
        digit = (1 << bits) - 1 - place
        reached = from_top[:, each, place]
        above = reached - histogram[:, each, digit]
        prefix = (prefix << np.uint32(bits)) | digit.astype(np.uint32)
    return prefix, reached


def _histogram(z, rows, level: int, prefix: np.ndarray | None, with_mass: bool) -> np.ndarray:
    """This rank's tokens by one digit of their keys: int64 [1 + with_mass, len(rows), 2^bits].

    Only tokens whose higher digits equal the row's `prefix` (uint32 [len(rows)]) count; None: all tokens.
    """
    shift, bits = DIGITS[level]
    out = np.empty((1 + with_mass, len(rows), 1 << bits), np.int64)
    for block in row_blocks(len(rows), z.shape[1]):
        values = z[rows[block]]
        keys = ordered_keys(values)
        n_rows = len(keys)
        if prefix is None:
            row_base = np.arange(n_rows)[:, None] << bits
        else:
            row, column = np.nonzero(keys >> np.uint32(shift + bits) == prefix[block, None])
            values, keys, row_base = values[row, column], keys[row, column], row << bits
        digits = (keys >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
        bins, n_bins = (row_base + digits).ravel(), n_rows << bits
        out[COUNT, block] = np.bincount(bins, minlength=n_bins).reshape(n_rows, -1)
        if with_mass:
            # bincount adds in float64. Each half of a mass is below 2^20, so sums over 2^33 tokens are still exact.
            high, low = (np.bincount(bins, half.ravel(), n_bins).astype(np.int64) for half in _split_masses(values))
            out[MASS, block] = ((high << 20) + low).reshape(n_rows, -1)
    return out
