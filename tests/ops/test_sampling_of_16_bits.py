"""Logits of 16 bits in sampling_logits.cu: tokens, thresholds and pairs are those of the same values in float32."""

import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import sampling_cuda
from cutp.ops.sampling_cuda import SamplingArrays
from cutp.ops.sampling_keys import NAN_PAIR, NO_PAIR, pack_pairs
from tests.ops.kernel_results import bfloat16, emulated_only, float16, float32, gpu_only, read_only
from tests.ops.logits_batch import on_shards, random_logits
from tests.ops.sampling_runs import (
    assert_sampled,
    expected_sample,
    first_histogram,
    new_buffers,
    noise_of,
    random_settings,
    run_sample,
    sampling_arguments,
    settings,
)

# The logits of 16-byte accesses: rows of a length that is no multiple begin anywhere.
GROUP = 8

both = pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)


def logits_of(dtype, seed, n, v):
    return random_logits(seed, n, v).astype(dtype)


def assert_as_float32(device, x, rows, vocab_start=0, **options):
    """The results are the specification's of the values in float32, and those of the kernels for float32."""
    wide = x.astype(float32)
    expected = expected_sample(wide, rows)
    assert_sampled(run_sample(device, x, rows, vocab_start, **options), expected)
    assert_sampled(run_sample(device, wide, rows, vocab_start, **options), expected)


@both
@pytest.mark.parametrize("v", [1, 2, 5, 7, GROUP, 9, 13, 66, 1001, 2503])
def test_sample(device, dtype, v):
    rng = np.random.default_rng(v)
    n = 24 if v < 1000 else 9
    assert_as_float32(device, logits_of(dtype, v, n, v), random_settings(rng, n))


@both
@pytest.mark.parametrize("borders", [[0, 101, 203], [0, 3, 3, 150, 203], [0, 0, 203], [0, 68, 136, 203]], ids=str)
def test_shards(device, dtype, borders):
    rng = np.random.default_rng(len(borders))
    x, rows = logits_of(dtype, 6, 12, 203), random_settings(rng, 12)
    expected = expected_sample(x.astype(float32), rows)
    for got in on_shards(lambda part, start, comm: run_sample(device, part, rows, start, comm=comm), x, borders):
        assert_sampled(got, expected)


@both
@pytest.mark.parametrize(("blocks", "v"), [(1, 1100), (2, 1100), (7, 1100), (1, 9005)])
def test_blocks_of_a_row(device, dtype, blocks, v):
    """Also with more logits than the threads of one block load before they work on them."""
    x, rows = logits_of(dtype, 7, 4, v), random_settings(np.random.default_rng(9), 4)
    rows.temperature[:], rows.top_k[:], rows.top_p[:] = [0, 1, 0.7, 1], [0, 0, 40, 90], [1, 1, 1, 0.9]
    assert_as_float32(device, x, rows, blocks=blocks)


@both
def test_many_ties(device, dtype):
    """All with the same value, or two values: the lowest id wins, and a threshold keeps all that are equal to it."""
    rng = np.random.default_rng(3)
    x = rng.choice(np.array([1.5, -0.0, 0.0, -2.25]), (8, 77)).astype(dtype)
    x[0] = x[0, 0]
    x[1] = np.where(np.arange(77) % 2, 0.0, -0.0)
    rows = settings(8, temperature=[0, 0, 0, 1, 1, 1, 0.5, 1], top_k=[0, 0, 0, 1, 3, 0, 20, 77],
                    top_p=[1, 1, 1, 1, 0.9, 0.3, 1, 0.999], position=np.arange(8))
    assert_as_float32(device, x, rows)
    assert expected_sample(x.astype(float32), rows).tokens[:2].tolist() == [0, 0]


@both
def test_infinities_and_the_ends_of_the_dtype(device, dtype):
    greatest, least = {bfloat16: (3.3895e38, 9.2e-41), float16: (65504, 6e-8)}[dtype]
    x = np.zeros((6, 11), float32)
    x[0, [2, 5]] = np.inf
    x[1] = [-np.inf] * 4 + [0, -60, *[-np.inf] * 5]
    x[2, :3] = [-greatest, greatest, -np.inf]
    x[3, 4] = least
    x[4, 7], x[5, 0] = 99, -least
    rows = settings(6, temperature=[1, 1, 1, 1e-30, 1e-30, 1], top_k=[0, 4, 2, 3, 0, 1], top_p=[.9, .99, 1, .5, .9, .3],
                    position=np.arange(6))
    with np.errstate(over="ignore"):
        assert_as_float32(device, x.astype(dtype), rows)


@both
@pytest.mark.parametrize("v", [64, 67])
@pytest.mark.parametrize("offset", range(GROUP + 1))
def test_rows_that_begin_anywhere_in_memory(device, dtype, v, offset):
    """What lies before, between and behind the rows that are sampled is NaN, and not of them."""
    rows = random_settings(np.random.default_rng(14), 5)
    rows.temperature[0] = 0
    x = logits_of(dtype, 14, 5, v)
    expected = expected_sample(x.astype(float32), rows)
    x[1::2] = np.nan
    rows.temperature[1::2] = 0
    arrays, buffers = SamplingArrays.of(rows, device.array), new_buffers(device, 5, v)
    arrays.temperature = device.array(np.where(np.arange(5) % 2, -1, rows.temperature).astype(float32))
    flat = np.concatenate([np.full(offset, np.nan, dtype), x.ravel(), np.full(GROUP, np.nan, dtype)])
    logits, tokens = device.array(flat)[offset : offset + x.size].reshape(x.shape), device.poisoned(5, np.int64)
    sampling_cuda.sample(logits, 0, arrays, buffers, lambda a: a[None], tokens=tokens)
    np.testing.assert_array_equal(device.numpy(tokens)[::2], expected.tokens[::2])
    assert (device.numpy(tokens)[1::2] == -1).all() and (device.numpy(buffers.status) == 0).all()


@both
@pytest.mark.parametrize("v", [40, 43])
def test_greedy_pairs(device, dtype, v):
    x = logits_of(dtype, 15, 6, v)
    x[3, v - 1] = np.nan
    x[4] = -np.inf
    temperature = np.array([0, 0, 1, 0, 0, -1], float32)
    b = new_buffers(device, 6, v)
    sampling_cuda.row_argmax(*read_only(device, x), 1000, device.array(temperature), parts=b.parts, tickets=b.tickets,
                             pairs=b.pairs, pdl=True)
    expected = pack_pairs(x.astype(float32), np.arange(1000, 1000 + v)).max(axis=1)
    expected[3] = NAN_PAIR
    np.testing.assert_array_equal(device.numpy(b.pairs), np.where(temperature < 0, NO_PAIR, expected))


@both
@pytest.mark.parametrize("vocab_start", [0, 1, 2, 3])
@pytest.mark.parametrize("v", [GROUP, 16, 43])
def test_draws_of_a_shard_that_begins_within_four_tokens(device, dtype, vocab_start, v):
    """Every column is drawn from, the first and the last too: each is the best one of some row."""
    rows, ids = settings(v, position=np.arange(v)), np.arange(vocab_start, vocab_start + v)
    x = np.where(np.eye(v, dtype=bool), 0, -20).astype(dtype)
    b = new_buffers(device, v, v)
    row_max, least = device.array(np.zeros(v, float32)), device.array(np.full(v, -100, float32))
    sampling_cuda.draw(*read_only(device, x), vocab_start, SamplingArrays.of(rows, device.array), row_max, least,
                       parts=b.parts, tickets=b.tickets, pairs=b.pairs)
    pairs = pack_pairs(x.astype(float32) + noise_of(rows, ids), ids)
    assert len(np.unique(pairs.argmax(axis=1))) > 0.9 * v
    np.testing.assert_array_equal(device.numpy(b.pairs), pairs.max(axis=1))


@both
def test_histograms_count_every_token_once(device, dtype):
    """Counts and masses of the digits are those of the values in float32."""
    x = np.random.default_rng(16).uniform(-28, 0, (5, 1203)).astype(dtype)
    x[:, 7] = 0
    rows = settings(5, top_p=0.5)
    got = first_histogram(device, x, rows)
    np.testing.assert_array_equal(got, first_histogram(device, x.astype(float32), rows))
    assert (got[:, 0].sum(axis=1) == 1203).all()


@both
def test_no_rows_and_no_columns(device, dtype):
    assert run_sample(device, np.zeros((0, 5), dtype), settings(0), passes=5).tokens.shape == (0,)
    got = run_sample(device, np.zeros((2, 0), dtype), settings(2, top_p=0.5), passes=5)
    assert got.status.tolist() == [2, 2] and got.tokens.tolist() == [-1, -1]


@emulated_only
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float64])
def test_other_dtypes_are_refused(device, dtype):
    with pytest.raises(ConfigError, match="row_argmax: logits has dtype .*; it needs bfloat16, float16, float32"):
        sampling_cuda.sample(**{**sampling_arguments(), "logits": np.zeros((2, 6), dtype)})


@pytest.mark.parametrize(("dtype", "define"), [(bfloat16, "BF16"), (float16, "F16"), (float32, "F32")], ids=str)
def test_the_variant_is_that_of_the_logits(dtype, define):
    """And only the kernels that walk along them have variants."""

    class Seen(dict):
        def launch(self, source, name, grid, block, args, shared_bytes, defines, pdl):
            self[name] = source, defines

    with use_backend(Seen()) as seen:
        sampling_cuda.sample(**{**sampling_arguments(), "logits": np.zeros((2, 6), dtype)})
    along, records = ("sampling_logits.cu", (f"DTYPE={define}",)), ("sampling_records.cu", ())
    assert seen == {"row_argmax": along, "count_digits": along, "draw": along, "combine_argmax": records,
                    "find_digits": records, "combine_draw": records}


# On a GPU also in the sizes of real models


@both
@gpu_only
@pytest.mark.parametrize(("n", "v", "size"), [(1, 128256, 1), (32, 128256, 1), (7, 151937, 3), (64, 49155, 1),
                                              (3, 2**18, 1)])
def test_sample_of_large_vocabularies(device, dtype, n, v, size):
    rng = np.random.default_rng(v + n)
    x, rows = logits_of(dtype, v, n, v), random_settings(rng, n)
    expected = expected_sample(x.astype(float32), rows)
    borders = np.linspace(0, v, size + 1).astype(int)
    for got in on_shards(lambda part, start, comm: run_sample(device, part, rows, start, comm=comm), x, borders):
        assert_sampled(got, expected)
