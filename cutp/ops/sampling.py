"""Drawing the next token from logits whose vocabulary is sharded over ranks, without gathering the logits.

A token is drawn with the Gumbel-max trick: the argmax of score + Gumbel noise over the surviving tokens has
exactly their softmax distribution, and an argmax is found on shards by comparing one pair per rank. The noise
depends only on (seed, sample index, position, token id), and survivors are decided on integers (see
`sampling_thresholds`): given the same logits, the token is the same on every rank, for every number of ranks and
in every batch.

Source: Gumbel-max, e.g. Maddison, Tarlow, Minka, "A* sampling" (2014), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.errors import ConfigError, RequestError
from cutp.ops.philox import GUMBEL_MAX, GUMBEL_MIN, gumbel_from_bits, sampling_bits
from cutp.ops.sampling_keys import NO_PAIR, check_logits, pack_pairs, row_argmax, row_blocks, unpack_pairs
from cutp.ops.sampling_thresholds import thresholds


@dataclass
class SamplingRows:
    """How to sample each of B rows; every field has B elements.

    temperature: float32, 0 is greedy (nothing else counts then). top_k: int32, below 1 is off.
    top_p: float32 in [0, 1], 1 is off. min_p: float32 in [0, 1], 0 is off. seed: uint64.
    sample_index: which of several samples of one prompt, in [0, 2^32). position: int64, the place in the sequence
    of the token to draw, in [0, 2^32).
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    sample_index: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.temperature)

    def take(self, rows: np.ndarray) -> SamplingRows:
        """The settings of some rows; `rows` is an index array, a mask or a slice."""
        return SamplingRows(**{name: values[rows] for name, values in vars(self).items()})

    def checked(self) -> SamplingRows:
        """The same with the dtypes above. Raises RequestError naming the row of a value out of range."""
        rows = SamplingRows(
            temperature=np.asarray(self.temperature, np.float32),
            top_k=np.asarray(self.top_k, np.int32),
            top_p=np.asarray(self.top_p, np.float32),
            min_p=np.asarray(self.min_p, np.float32),
            seed=np.asarray(self.seed, np.uint64),
            sample_index=np.asarray(self.sample_index, np.int64),
            position=np.asarray(self.position, np.int64),
        )
        shapes = {name: values.shape for name, values in vars(rows).items()}
        if len(set(shapes.values())) != 1 or rows.temperature.ndim != 1:
            raise ConfigError(f"sampling settings must be one-dimensional and equally long: {shapes}")
        # Written so that a NaN is out of range.
        ok = {
            "temperature": (rows.temperature >= 0) & (rows.temperature < np.inf),
            "top_p": (rows.top_p >= 0) & (rows.top_p <= 1),
            "min_p": (rows.min_p >= 0) & (rows.min_p <= 1),
            "sample_index": rows.sample_index >> 32 == 0,
            "position": rows.position >> 32 == 0,
        }
        for name, good in ok.items():
            if not good.all():
                row = int(np.argmin(good))
                raise RequestError(f"row {row} of the batch: {name} {getattr(rows, name)[row]} is out of range")
        return rows


def sample(logits_local: np.ndarray, vocab_start: int, rows: SamplingRows, comm) -> np.ndarray:
    """Draw one token per row: int64 [B], equal on all ranks.

    logits_local: float32 [B, V_local], this rank's columns of the logits, from token id `vocab_start` on. Shards
    may have any sizes, also 0; together they are the vocabulary. rows: equal on all ranks. comm: has `all_gather`
    and `all_reduce` (of int64); one gather for greedy rows, a second for sampled ones, and the reductions of
    `thresholds` between them if some row uses top-k or top-p.

    Temperature 0 takes the greatest logit; ties go to the lowest id, here and in draws. Otherwise temperature,
    top-k, top-p and min-p apply in this order, tokens equal to a threshold stay, and the draw follows the softmax
    over the survivors. A logit of -inf is never chosen. If the maximum is +inf, only the tokens that have it are.
    Raises CutpError on all ranks if a row holds NaN or only -inf, RequestError for a setting out of range.
    """
    rows = _check(logits_local, rows)
    row_max, tokens = row_argmax(logits_local, vocab_start, comm)
    drawn = np.flatnonzero(rows.temperature > 0)
    if len(drawn):
        rows = rows.take(drawn)
        z = scores(logits_local, drawn, row_max[drawn], rows.temperature)
        least = thresholds(z, rows.top_k, rows.top_p, rows.min_p, comm)
        tokens[drawn] = draw(z, least, vocab_start, rows, comm)
    return tokens


def survivors(logits_local: np.ndarray, vocab_start: int, rows: SamplingRows, comm) -> np.ndarray:
    """Which of this rank's tokens `sample` may choose: bool [B, V_local]. In a greedy row only its token is."""
    rows = _check(logits_local, rows)
    row_max, tokens = row_argmax(logits_local, vocab_start, comm)
    mask = np.arange(vocab_start, vocab_start + logits_local.shape[1]) == tokens[:, None]
    drawn = np.flatnonzero(rows.temperature > 0)
    if len(drawn):
        rows = rows.take(drawn)
        z = scores(logits_local, drawn, row_max[drawn], rows.temperature)
        mask[drawn] = z >= thresholds(z, rows.top_k, rows.top_p, rows.min_p, comm)[:, None]
    return mask


def scores(logits_local: np.ndarray, rows: np.ndarray, row_max: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """(logit - row maximum) / temperature of some rows: float32 [len(rows), V_local], from -inf to 0.

    logits_local: float32 [B, V_local]. rows: int64 [R]. row_max, temperature: float32 [R].
    The maximum is subtracted first, so that a tiny temperature sends scores to -inf and none to NaN.
    """
    z = logits_local[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        z -= row_max[:, None]
        infinite = np.flatnonzero(np.isinf(row_max))
        if len(infinite):
            z[infinite] = np.where(np.isnan(z[infinite]), np.float32(0), z[infinite])  # inf - inf
        z /= temperature[:, None]
    return z


def draw(z: np.ndarray, least: np.ndarray, vocab_start: int, rows: SamplingRows, comm) -> np.ndarray:
    """The tokens with the greatest score + Gumbel noise among those of score `least` or more: int64 [B].

    z: float32 [B, V_local] as from `scores`. least: float32 [B] as from `thresholds`. One all-gather.
    """
    # Somewhere a token has score 0 and at least the least noise: one that is further down cannot win.
    least = np.maximum(least, np.float32(GUMBEL_MIN - GUMBEL_MAX))
    pairs = np.full(len(z), NO_PAIR)
    for block in row_blocks(*z.shape):
        row, column = np.nonzero(z[block] >= least[block, None])
        if len(row):
            total = z[block][row, column] + _noise(rows.take(block), row, column + vocab_start)
            first = np.flatnonzero(np.diff(row, prepend=-1))  # where each row's candidates begin
            pairs[block][row[first]] = np.maximum.reduceat(pack_pairs(total, column + vocab_start), first)
    return unpack_pairs(comm.all_gather(pairs[None], axis=0).max(axis=0, initial=NO_PAIR))[1]


def _noise(rows: SamplingRows, row: np.ndarray, token_id: np.ndarray) -> np.ndarray:
    """`gumbel_noise` of token ids in rows, float32 [n], with one Philox call for neighbours that share it.

    row, token_id: int64 [n], in ascending order of (row, token id).
    """
    block = token_id >> 2
    new = (np.diff(block, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0)
    call = np.cumsum(new) - 1
    row, block = row[new], block[new]
    bits = sampling_bits(rows.seed[row], rows.sample_index[row], rows.position[row], block)
    return gumbel_from_bits(bits[call, token_id & 3])


def _check(logits_local: np.ndarray, rows: SamplingRows) -> SamplingRows:
    check_logits(logits_local)
    rows = rows.checked()
    if len(rows) != len(logits_local):
        raise ConfigError(f"{len(rows)} rows of sampling settings for {len(logits_local)} rows of logits")
    return rows
