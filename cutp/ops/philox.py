"""Counter-based random numbers: Philox4x32-10, and the Gumbel noise that sampling adds to logits.

A counter-based generator has no state: a number is a pure function of a key and a counter, so a draw can be made
to depend on nothing but what names it. Here that is (seed, sample index, position, token id), which is why a
sampled token does not change with the batch around it, the slot it sits in, or the way the vocabulary is sharded.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), and the Random123
library, whose published known answers the tests check.
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_INCREMENTS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
ROUNDS = 10

# Counters per block: the working arrays of one block fit into a core's cache.
BLOCK = 1 << 13

# `gumbel_from_bits` lies in [GUMBEL_MIN, GUMBEL_MAX] because 32 random bits have a smallest and a largest value.
# The bounds are a little wider than the exact ones so that they hold for any implementation of logf.
GUMBEL_MIN = -2.9
GUMBEL_MAX = 22.9


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: 128 random bits for each 128-bit counter under its 64-bit key.

    counter: uint32 [..., 4]. key: uint32 [..., 2]; the leading dimensions broadcast. Returns uint32 [..., 4].
    Word 0 is the least significant one, as in Random123 and cuRAND.
    """
    counter, key = np.asarray(counter, np.uint32), np.asarray(key, np.uint32)
    shape = np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])
    counter = np.broadcast_to(counter, (*shape, 4)).reshape(-1, 4)
    key = np.broadcast_to(key, (*shape, 2)).reshape(-1, 2)
    out = np.empty((len(counter), 4), np.uint32)
    for start in range(0, len(counter), BLOCK):
        block = slice(start, start + BLOCK)
        out[block] = _ten_rounds(counter[block], key[block])
    return out.reshape(*shape, 4)


def _ten_rounds(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    low_word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    # uint64 copies: a product of two words then keeps both halves, and no step needs a conversion.
    c0, c1, c2, c3 = counter.T.astype(np.uint64)
    k0, k1 = np.ascontiguousarray(key.T)
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> half) ^ c1 ^ k0, (p0 >> half) ^ c3 ^ k1
        c1, c3 = p1 & low_word, p0 & low_word
        k0, k1 = k0 + KEY_INCREMENTS[0], k1 + KEY_INCREMENTS[1]  # uint32: wraps, as it should
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def sampling_bits(seed: np.ndarray, sample_index: np.ndarray, position: np.ndarray, block: np.ndarray) -> np.ndarray:
    """The random words of token ids 4 * block .. 4 * block + 3: one Philox call serves four ids.

    All arguments have n elements (seed uint64, the others integers in [0, 2^32)). Returns uint32 [n, 4].
    The key is the seed, the counter (block, position, sample index, 0).
    """
    counter = np.zeros((len(block), 4), np.uint32)
    counter[:, 0], counter[:, 1], counter[:, 2] = block, position, sample_index
    key = np.empty((len(block), 2), np.uint32)
    key[:, 0], key[:, 1] = seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)
    return philox4x32(counter, key)


def gumbel_from_bits(bits: np.ndarray) -> np.ndarray:
    """A standard Gumbel variable from each random word: uint32 [...] -> float32 [...], all steps in float32.

    u = (bits + 1/2) * 2^-32, below 1; E = -log(1 - u) is exponential; -log(E) is Gumbel. The noise that wins an
    argmax is large, that is u near 0: written with log1p the result is accurate exactly there, down to 2^-33.
    """
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)  # the largest words round up to 1, where log1p(-u) is infinite
    np.negative(u, out=u)
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)


def gumbel_noise(
    seed: np.ndarray, sample_index: np.ndarray, position: np.ndarray, token_id: np.ndarray
) -> np.ndarray:
    """The Gumbel noise of token `token_id` at `position` of a sequence: float32 [n].

    All arguments have n elements: seed uint64; sample_index, position and token_id integers in [0, 2^32).
    A token id's word is lane token_id % 4 of the Philox block token_id // 4.
    """
    seed, token_id = np.asarray(seed, np.uint64), np.asarray(token_id, np.int64)
    bits = sampling_bits(seed, np.asarray(sample_index), np.asarray(position), token_id >> 2)
    return gumbel_from_bits(bits[np.arange(len(token_id)), token_id & 3])
