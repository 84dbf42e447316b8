"""Log-probabilities from logits whose vocabulary is sharded over ranks, without gathering the logits.

log p(i) = x_i - max - log(sum_j exp(x_j - max)). The exponentials and their sum are float64, and the ranks' sums are
added in rank order, so every rank has the same bits. Work goes through blocks of rows: besides the logits, memory
is a few megabytes plus the results. Shards may have any sizes, also 0.

A row whose maximum is +inf has all its mass, in equal shares, on the tokens with that logit. All functions raise
CutpError, on all ranks alike, if a row holds a NaN or no logit above -inf.
"""

from __future__ import annotations

import numpy as np

from cutp.errors import ConfigError, InvalidTokenError
from cutp.ops.sampling_keys import NO_PAIR, check_logits, pack_pairs, row_argmax, row_blocks, unpack_pairs


def log_normalizer(logits_local: np.ndarray, comm) -> tuple[np.ndarray, np.ndarray]:
    """Each row's greatest logit (float32 [R]) and log(sum(exp(logits))) over all shards (float64 [R]).

    logits_local: float32 [R, V_local].
    """
    check_logits(logits_local)
    row_max, _ = row_argmax(logits_local, 0, comm)
    local_sum = _sum_of_exponentials(logits_local, row_max)
    return row_max, row_max + np.log(_add_in_rank_order(comm.all_gather(local_sum[None], axis=0)))


def target_logprobs(
    logits_local: np.ndarray, vocab_start: int, targets: np.ndarray, comm
) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of one given token per row, and whether it is the row's greedy choice.

    logits_local: float32 [R, V_local], the columns from token id `vocab_start` on. targets: integers [R], equal on
    all ranks. Returns (float32 [R], bool [R]), equal on all ranks; among equal logits the lowest id is greedy.
    Raises InvalidTokenError, on all ranks alike, if a target is in nobody's shard.
    """
    check_logits(logits_local)
    targets = np.asarray(targets, np.int64)
    if targets.shape != logits_local.shape[:1]:
        raise ConfigError(f"targets of shape {targets.shape} for {len(logits_local)} rows of logits")
    row_max, greedy = row_argmax(logits_local, vocab_start, comm)

    # Per row: the sum of exponentials, the target's score, and whether the target is in this shard.
    mine = np.zeros((3, len(targets)))
    mine[0] = _sum_of_exponentials(logits_local, row_max)
    rows = np.flatnonzero((targets >= vocab_start) & (targets < vocab_start + logits_local.shape[1]))
    mine[1, rows] = _relative(logits_local[rows, targets[rows] - vocab_start], row_max[rows])
    mine[2, rows] = 1
    total = _add_in_rank_order(comm.all_gather(mine[None], axis=0))
    if not total[2].all():
        row = int(np.argmin(total[2]))
        raise InvalidTokenError(f"row {row}: token id {targets[row]} is not in the vocabulary")
    return (total[1] - np.log(total[0])).astype(np.float32), targets == greedy


def top_logprobs(logits_local: np.ndarray, vocab_start: int, k: int, comm) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable tokens of each row: (ids int64 [R, k], logprobs float32 [R, k]), equal on all ranks.

    logits_local: float32 [R, V_local], the columns from token id `vocab_start` on. Sorted by falling
    log-probability, equal logits by rising id. k may exceed a shard; places beyond the whole vocabulary hold id -1
    and -inf.
    """
    check_logits(logits_local)
    if k < 0:
        raise ConfigError(f"cannot return the {k} most probable tokens")
    row_max, _ = row_argmax(logits_local, vocab_start, comm)
    n_rows, n_local = logits_local.shape
    best = np.full((n_rows, k), NO_PAIR)
    kept = min(k, n_local)
    ids = np.arange(vocab_start, vocab_start + n_local)
    for block in row_blocks(n_rows, n_local) if kept else ():
        pairs = pack_pairs(logits_local[block], ids)
        pairs.partition(n_local - kept, axis=1)
        best[block, :kept] = pairs[:, n_local - kept :]

    total = _add_in_rank_order(comm.all_gather(_sum_of_exponentials(logits_local, row_max)[None], axis=0))
    pairs = np.concatenate(list(comm.all_gather(best[None], axis=0)), axis=1)  # [R, ranks * k]
    pairs = np.sort(pairs, axis=1)[:, ::-1][:, :k]
    values, ids = unpack_pairs(pairs)
    nothing = pairs == NO_PAIR
    values = np.where(nothing, -np.inf, values).astype(np.float32)
    logprobs = _relative(values, row_max[:, None]) - np.log(total)[:, None]
    return np.where(nothing, -1, ids), logprobs.astype(np.float32)


def _relative(logits: np.ndarray, row_max: np.ndarray) -> np.ndarray:
    """logits - row_max in float64, 0 where both are +inf."""
    with np.errstate(invalid="ignore"):
        z = np.subtract(logits, row_max, dtype=np.float64)
    if np.isinf(row_max).any():
        z[np.isnan(z)] = 0
    return z


def _sum_of_exponentials(logits_local: np.ndarray, row_max: np.ndarray) -> np.ndarray:
    """This rank's sum of exp(logit - row maximum): float64 [R]."""
    sums = np.zeros(len(logits_local))
    for block in row_blocks(*logits_local.shape):
        z = _relative(logits_local[block], row_max[block, None])
        sums[block] = np.exp(z, out=z).sum(axis=1)
    return sums


def _add_in_rank_order(parts: np.ndarray) -> np.ndarray:
    """parts[0] + parts[1] + ..., one rank after the other: the same rounding wherever it is computed."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total
