"""Philox against the published known answers and a scalar implementation; the Gumbel noise against its distribution."""

import numpy as np
import pytest

from cutp.ops.philox import BLOCK, GUMBEL_MAX, GUMBEL_MIN, gumbel_from_bits, gumbel_noise, philox4x32, sampling_bits

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def philox_scalar(counter, key):
    """Algorithm of the paper, section 4.3, on Python integers."""
    c, k = [int(v) for v in counter], [int(v) for v in key]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_many_counters_equal_the_scalar_algorithm():
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (3 * BLOCK // 2, 4), dtype=np.uint32)  # crosses a block border
    key = rng.integers(0, 2**32, (len(counter), 2), dtype=np.uint32)
    got = philox4x32(counter, key)
    assert got.dtype == np.uint32
    for i in [0, 1, BLOCK - 1, BLOCK, len(counter) - 1, *rng.integers(0, len(counter), 200)]:
        assert got[i].tolist() == philox_scalar(counter[i], key[i])


def test_leading_dimensions_broadcast():
    counter = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    got = philox4x32(counter, np.array([7, 9], np.uint32))
    assert got.shape == (2, 3, 4)
    assert got[1, 2].tolist() == philox_scalar(counter[1, 2], [7, 9])
    assert philox4x32(np.zeros((0, 4)), np.zeros(2)).shape == (0, 4)


def test_where_the_arguments_go():
    seed = np.array([2**64 - 2], np.uint64)
    got = sampling_bits(seed, np.array([5]), np.array([2**32 - 1]), np.array([31]))
    assert got[0].tolist() == philox_scalar([31, 2**32 - 1, 5, 0], [2**32 - 2, 2**32 - 1])


def test_noise_is_the_lane_of_the_token():
    ids, low, high = np.array([0, 1, 2, 3, 4, 5, 1023, 128255]), 0x9ABCDEF0, 0xFEDCBA98
    n = len(ids)
    noise = gumbel_noise(np.full(n, high << 32 | low, np.uint64), np.full(n, 2), np.arange(n), ids)
    bits = [philox_scalar([i // 4, position, 2, 0], [low, high])[i % 4] for position, i in enumerate(ids)]
    np.testing.assert_array_equal(noise, gumbel_from_bits(np.array(bits, np.uint32)))


def test_every_argument_counts():
    base = dict(seed=0, sample_index=0, position=0, token_id=0)
    noises = {
        float(gumbel_noise(**{name: np.array([value]) for name, value in {**base, **change}.items()})[0])
        for change in [{}, {"seed": 1}, {"seed": 2**32}, {"seed": 2**64 - 1}, {"sample_index": 1}, {"position": 1},
                       {"token_id": 1}, {"token_id": 4}]
    }
    assert len(noises) == 8


def test_bounds_hold_for_the_extreme_words():
    noise = gumbel_from_bits(np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint32))
    assert noise.dtype == np.float32
    assert np.isfinite(noise).all()
    assert 22 < noise[0] < GUMBEL_MAX
    assert -2.8 > noise[-1] > GUMBEL_MIN


def test_winning_tail_is_accurate():
    bits = np.unique(np.geomspace(1, 2**31, 5000).astype(np.uint32))
    exact = -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) * 2.0**-32))
    np.testing.assert_allclose(gumbel_from_bits(bits), exact, rtol=1e-6, atol=1e-6)


def test_noise_does_not_depend_on_the_place_in_an_array():
    bits = philox4x32(np.arange(4000, dtype=np.uint32).reshape(-1, 4), np.array([1, 2])).ravel()
    whole = gumbel_from_bits(bits)
    for start in [*range(40), 901]:
        for length in (1, 3, 8, 17):
            part = gumbel_from_bits(bits[start : start + length])
            np.testing.assert_array_equal(part, whole[start : start + length])


def test_noise_has_the_gumbel_distribution():
    n = 1_000_000
    noise = gumbel_noise(np.full(n, 3, np.uint64), np.zeros(n, int), np.arange(n) // 1000, np.arange(n) % 1000)
    cdf = np.exp(-np.exp(-np.sort(noise.astype(np.float64))))
    distance = np.abs(cdf - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov, one chance in a thousand
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / np.sqrt(n)
