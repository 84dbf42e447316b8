"""sampling_logits.cu and sampling_records.cu against their specification in NumPy: tokens bit for bit."""


import numpy as np
import pytest

from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError
from cutp.ops import sampling_cuda
from cutp.ops.philox import GUMBEL_MAX, GUMBEL_MIN, gumbel_from_bits
from cutp.ops.sampling import sample
from cutp.ops.sampling_cuda import SamplingArrays, passes_needed
from cutp.ops.sampling_keys import NO_PAIR, pack_pairs, unpack_pairs
from cutp.ops.sampling_thresholds import integer_masses
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import DTYPES, emulated_only, gpu_only, in_every_order
from tests.ops.logits_batch import f32, on_shards, random_logits
from tests.ops.sampling_runs import (
    assert_sampled,
    expected_sample,
    first_histogram,
    kernel_gumbel,
    new_buffers,
    noise_of,
    random_settings,
    run_sample,
    sampling_arguments,
    settings,
)

# Sampling


@pytest.mark.parametrize("v", [1, 2, 5, 66, 1000, 2503])
def test_sample_equals_the_reference(device, v):
    rng = np.random.default_rng(v)
    n = 24 if v < 1000 else 10
    x, rows = random_logits(v, n, v), random_settings(rng, n)
    assert_sampled(run_sample(device, x, rows), expected_sample(x, rows))


def test_tokens_are_those_of_numpy(device):
    """Its logarithms differ in the last bits: only a token nearly as good may be chosen instead."""
    rng = np.random.default_rng(5)
    x, rows = random_logits(5, 30, 90), random_settings(rng, 30)
    tokens, expected = run_sample(device, x, rows).tokens, sample(x, 0, rows, Communicator.single())
    for i in np.flatnonzero(tokens != expected):
        z = (x[i] - x[i].max()) / rows.temperature[i] + noise_of(rows.take([i]), np.arange(90))[0]
        assert abs(z[tokens[i]] - z[expected[i]]) < 1e-4
    assert (tokens == expected).mean() > 0.9


@pytest.mark.parametrize("borders", [[0, 101, 203], [0, 3, 3, 150, 203], [0, 0, 203]], ids=str)
def test_tokens_do_not_depend_on_the_sharding(device, borders):
    rng = np.random.default_rng(len(borders))
    x, rows = random_logits(6, 12, 203), random_settings(rng, 12)
    expected = expected_sample(x, rows)
    for got in on_shards(lambda part, start, comm: run_sample(device, part, rows, start, comm=comm), x, borders):
        assert_sampled(got, expected)


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_tokens_do_not_depend_on_the_blocks_of_a_row(device, blocks):
    x, rows = random_logits(7, 4, 1100), random_settings(np.random.default_rng(9), 4)
    rows.temperature[:] = [0, 1, 0.7, 1]
    assert_sampled(run_sample(device, x, rows, blocks=blocks), expected_sample(x, rows))


def test_row_does_not_depend_on_its_batch(device):
    x, rows = random_logits(8, 9, 301), random_settings(np.random.default_rng(8), 9)
    batch = run_sample(device, x, rows)
    for i in range(0, 9, 2):
        one = run_sample(device, x[i : i + 1], rows.take([i]), passes=5)
        for name in ("tokens", "least", "row_max"):
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(batch, name)[i])


def test_buffers_serve_again_and_positions_advance(device):
    rng = np.random.default_rng(10)
    buffers = new_buffers(device, 8, 130)
    for step in range(3):
        x, rows = random_logits(step, 8, 130), random_settings(rng, 8)
        assert_sampled(run_sample(device, x, rows, buffers=buffers, passes=5), expected_sample(x, rows))


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(min_p=0.2), dict(top_k=3), dict(top_p=0.7),
                                 dict(top_k=9, top_p=0.7)], ids=str)
def test_passes_are_those_needed(device, how):
    rows = settings(3, position=np.arange(3), **how)
    needed = passes_needed(rows)
    assert needed == {"top_k": 3, "top_p": 3}.get(list(how)[-1], 0) + 2 * (len(how) == 2)
    x = random_logits(11, 3, 40)
    for passes in {needed, 5}:
        assert_sampled(run_sample(device, x, rows, passes=passes), expected_sample(x, rows))
    if needed > 0:
        assert (run_sample(device, x, rows, passes={3: 0, 5: 3}[needed]).tokens == -1).all()


def test_under_programmatic_launch(device):
    x, rows = random_logits(12, 6, 50), random_settings(np.random.default_rng(12), 6)
    assert_sampled(run_sample(device, x, rows, pdl=True), expected_sample(x, rows))


def test_greedy_batches(device):
    x = np.array([[1, 3, 3, 0, 3], [-0.0, 0.0, -1, 0.0, -0.0], [-5, -5, -5, -5, -5], [0, 0, np.nan, 9, 0]], f32)
    rows = settings(4, temperature=0.0)
    arrays = SamplingArrays.of(rows, device.array)
    arrays.temperature = device.array(np.array([0, 0, 0, -1], f32))
    buffers, tokens = new_buffers(device, 4, 5), device.poisoned(4, np.int64)
    sampling_cuda.greedy(device.array(x), 1000, arrays, buffers, lambda a: a[None], tokens=tokens)
    assert device.numpy(tokens).tolist() == [1001, 1000, 1000, -1]
    assert device.numpy(buffers.pairs).tolist()[-1] == NO_PAIR


def test_rows_that_are_not_in_use(device):
    x, rows = random_logits(13, 6, 70), random_settings(np.random.default_rng(13), 6)
    rows.temperature[:] = [1, 0, 0.5, 1, 0, 0.3]
    rows.top_k[[2, 3]] = 5
    expected = expected_sample(x, rows)
    arrays = SamplingArrays.of(rows, device.array)
    off = [1, 3]
    x[off] = np.nan
    temperature = rows.temperature.copy()
    temperature[off] = -1
    arrays.temperature = device.array(temperature)
    got = run_sample(device, x, rows, arrays=arrays, passes=5)
    assert (got.tokens[off] == -1).all() and (got.status == 0).all()
    used = [0, 2, 4, 5]
    np.testing.assert_array_equal(got.tokens[used], expected.tokens[used])
    np.testing.assert_array_equal(got.least[used], expected.least[used])


def test_draws_without_filters(device):
    x = (np.random.default_rng(27).standard_normal((12, 700)) * 2).astype(f32)
    rows = settings(12, position=np.arange(12))
    expected = expected_sample(x, rows)
    z = np.take_along_axis(x - x.max(axis=1, keepdims=True), expected.tokens[:, None], axis=1)
    assert (z < -2).sum() > 4  # unlikely tokens are among those drawn
    assert_sampled(run_sample(device, x, rows), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_rows_are_told(device, dtype, temperature):
    x = np.zeros((5, 21), dtype)
    x[1, 7] = np.nan
    x[2] = -np.inf
    x[3, :4] = np.inf
    x[3, 5] = -np.nan
    rows = settings(5, temperature=temperature, top_p=[1, 0.9, 0.9, 0.9, 1], top_k=[0, 3, 0, 0, 0])
    for got in on_shards(lambda part, start, comm: run_sample(device, part, rows, start, comm=comm), x, [0, 4, 4, 21]):
        assert got.status.tolist() == [0, 1, 2, 1, 0]
        assert got.tokens[1:4].tolist() == [-1, -1, -1]
        assert (got.tokens[[0, 4]] >= 0).all()


def test_infinities_and_extreme_temperatures(device):
    x = np.zeros((8, 9), f32)
    x[0, [2, 5]] = np.inf
    x[1] = [-np.inf] * 4 + [0, -60, -np.inf, -np.inf, -np.inf]
    x[2, :3] = [-3e38, 3e38, -np.inf]
    x[3, 4] = 1e-45
    x[4, 7], x[5, 7], x[6, 0], x[7, 0] = 99, 99, -0.0, -1e-45
    rows = settings(8, temperature=[1, 1, 1, 1e-45, 1e-30, 1e30, 1, 3e38], top_k=[0, 4, 2, 3, 0, 0, 1, 0],
                    top_p=[0.9, 0.99, 1, 0.5, 0.9, 0.5, 0.3, 0.999], position=np.arange(8))
    with np.errstate(over="ignore"):
        expected = expected_sample(x, rows)
    assert_sampled(run_sample(device, x, rows), expected)


def test_rows_that_begin_anywhere_in_memory(device):
    x, rows = random_logits(14, 3, 64), random_settings(np.random.default_rng(14), 3)
    expected = expected_sample(x, rows)
    arrays, buffers = SamplingArrays.of(rows, device.array), new_buffers(device, 3, 64)
    for offset in (1, 2, 3):
        flat = device.array(np.concatenate([np.full(offset, np.nan, f32), x.ravel()]))
        tokens = device.poisoned(3, np.int64)
        sampling_cuda.sample(flat[offset:].reshape(3, 64), 0, arrays, buffers, lambda a: a[None], tokens=tokens)
        np.testing.assert_array_equal(device.numpy(tokens), expected.tokens)


def test_no_rows_and_no_columns(device):
    assert run_sample(device, np.zeros((0, 5), f32), settings(0), passes=5).tokens.shape == (0,)
    got = run_sample(device, np.zeros((2, 0), f32), settings(2, top_p=0.5), passes=5)
    assert got.status.tolist() == [2, 2] and got.tokens.tolist() == [-1, -1]


@needs_compiler
def test_the_token_does_not_depend_on_the_order_of_threads():
    from tests.ops.conftest import EmulatedArrays

    x, rows = random_logits(15, 4, 1203), random_settings(np.random.default_rng(16), 4)
    rows.temperature[:], rows.top_k[:], rows.top_p[:] = [1, 0.7, 1, 0], [0, 40, 30, 0], [0.9, 1, 0.8, 1]

    def run():
        got = run_sample(EmulatedArrays(), x, rows)
        return got.least, got.tokens.astype(f32)

    least, tokens = in_every_order(run)
    expected = expected_sample(x, rows)
    np.testing.assert_array_equal(least, expected.least)
    np.testing.assert_array_equal(tokens, expected.tokens)


# What sampling is made of


def test_masses_are_those_of_numpy(device):
    """Every token in a bin of its own."""
    rng = np.random.default_rng(17)
    size = np.concatenate([2.0**e * (1 + np.arange(4) / 4) for e in range(-24, 5)])
    x = np.zeros((12, len(size) + 1), f32)
    x[:, 1:] = -(size * (1 + 0.1 * rng.random((12, len(size)))))
    x[1, 1:] = -(2.0 ** np.linspace(-126, 120, len(size)))
    counts, masses = first_histogram(device, x, settings(12, top_p=0.5)).transpose(1, 0, 2)
    for row, mass in enumerate(masses):
        expected = integer_masses(x[row])
        if row != 1:
            assert (counts[row] <= 1).all()
            np.testing.assert_array_equal(np.sort(mass[mass > 0]), np.sort(expected[expected > 0]))
        assert mass.sum() == expected.sum() and counts[row].sum() == x.shape[1]


def test_sums_of_many_masses_are_those_of_numpy(device):
    x = np.random.default_rng(28).uniform(-28, 0, (6, 1500)).astype(f32)
    x[:, 7] = 0
    masses = first_histogram(device, x, settings(6, top_p=0.5))[:, 1]
    np.testing.assert_array_equal(masses.sum(axis=1), integer_masses(x).sum(axis=1))


def scores_of_mass(total):
    """Scores of one bin whose masses, all odd and even integers below 2^24, add up to `total`: equal ones and two."""
    z = np.linspace(-11.9, -11.1, 100_001).astype(f32)
    masses = integer_masses(z)
    n = int((total - 2 * masses[0]) // masses[-1])
    others, first, second = np.intersect1d(masses, total - n * masses[-1] - masses, return_indices=True)
    assert len(others)
    found = [z[first[0]], z[second[0]], *[z[-1]] * n]
    assert integer_masses(np.array(found)).sum() == total
    return found


@pytest.mark.parametrize("total", [2**32 - 1, 2**32, 2**32 + 1, 2**33 + 5])
def test_masses_around_the_overflow_of_32_bits(device, total):
    same_bin = scores_of_mass(total)
    x = np.array([[0, *same_bin, 0]], f32)
    counts, masses = first_histogram(device, x, settings(1, top_p=0.5))[0]
    assert sorted(counts[counts > 0]) == sorted([2, len(same_bin)])
    assert sorted(masses[masses > 0]) == [total, 2 << 40]


def test_shares_of_top_p_are_rounded_up(device):
    """0.75 of the mass is half a unit more than the first token has: another one must survive."""
    second = f32(-1.0991582)
    rest = 1466015503702 - 2**40 - int(integer_masses(np.array([second]))[0])
    x = np.array([[0, second, *scores_of_mass(rest)]], f32)
    rows = settings(1, top_p=0.75)
    got, expected = run_sample(device, x, rows), expected_sample(x, rows)
    assert got.least[0] == expected.least[0] == second


def test_tokens_far_below_the_maximum_are_drawn(device):
    """Down to where no noise can make up for it. The best token is in another rank's shard here."""
    n, v = 40, 100
    x = np.random.default_rng(29).uniform(-28, np.linspace(-25.3, -21, n)[:, None], (n, v)).astype(f32)
    rows = settings(n, position=np.arange(n))
    b = new_buffers(device, n, v)
    row_max, least = device.array(np.zeros(n, f32)), device.array(np.full(n, -100, f32))
    sampling_cuda.draw(device.array(x), 3, SamplingArrays.of(rows, device.array), row_max, least, parts=b.parts,
                       tickets=b.tickets, pairs=b.pairs)
    ids = np.arange(3, 3 + v)
    pairs = np.where(x >= f32(GUMBEL_MIN - GUMBEL_MAX), pack_pairs(x + noise_of(rows, ids), ids), NO_PAIR)
    np.testing.assert_array_equal(device.numpy(b.pairs), pairs.max(axis=1))


def test_histograms_of_rows_that_need_none_are_left_alone(device):
    rows = settings(5, temperature=[0, 1, 1, 1, 1], top_k=[3, 0, 4, 0, 0], top_p=[0.5, 1, 1, 0.5, 1], min_p=0.1)
    before = np.iinfo(np.int64).max - np.iinfo(np.int64).max - 1  # greatest uint64
    h = first_histogram(device, random_logits(18, 5, 30), rows)
    assert (h[[0, 1, 4]] == before).all()
    assert h[2, 0].sum() == h[3, 0].sum() == 30
    assert (h[2, 1] == 0).all() and h[3, 1].sum() > 2**40  # without top-p no masses


@pytest.mark.parametrize("vocab_start", [0, 1, 7, 2**32 - 5])
def test_noise_is_that_of_the_specification(device, vocab_start):
    """The pair drawn from a single token holds its noise."""
    rng = np.random.default_rng(19)
    n = 64
    rows = random_settings(rng, n)
    rows.temperature[:] = 1
    arrays = SamplingArrays.of(rows, device.array)
    b = new_buffers(device, n, 1)
    row_max, least = device.array(np.zeros(n, f32)), device.array(np.full(n, -1, f32))
    sampling_cuda.draw(device.array(np.zeros((n, 1), f32)), vocab_start, arrays, row_max, least, parts=b.parts,
                       tickets=b.tickets, pairs=b.pairs)
    noise, ids = unpack_pairs(device.numpy(b.pairs))
    assert (ids == vocab_start).all()
    np.testing.assert_array_equal(noise, noise_of(rows, [vocab_start])[:, 0] + f32(0))


def test_noise_is_close_to_numpy():
    rng = np.random.default_rng(20)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:8] = [0, 1, 2, 2**24, 2**31, 2**32 - 2**9, 2**32 - 129, 2**32 - 1]
    noise, expected = kernel_gumbel(bits), gumbel_from_bits(bits)
    np.testing.assert_allclose(noise, expected, rtol=1e-6, atol=1e-6)
    assert noise.min() >= GUMBEL_MIN and noise.max() <= GUMBEL_MAX


# On a GPU also in the sizes of real models


@gpu_only
@pytest.mark.parametrize(("n", "v", "size"), [(1, 128256, 1), (32, 128256, 1), (7, 151937, 3), (256, 32000, 1),
                                              (3, 2**18, 1)])
def test_sample_of_large_vocabularies(device, n, v, size):
    rng = np.random.default_rng(v + n)
    x, rows = random_logits(v, n, v), random_settings(rng, n)
    expected = expected_sample(x, rows)
    borders = np.linspace(0, v, size + 1).astype(int)
    for got in on_shards(lambda part, start, comm: run_sample(device, part, rows, start, comm=comm), x, borders):
        assert_sampled(got, expected)


@gpu_only
def test_noise_bits_on_the_gpu(device):
    n = 60_000
    rows = settings(n, position=np.arange(n), seed=3)
    zeros, pairs = device.array(np.zeros((n, 1), f32)), device.poisoned(n, np.uint64)
    sampling_cuda.draw(zeros, 5, SamplingArrays.of(rows, device.array), zeros.ravel(), zeros.ravel(),
                       parts=device.poisoned((n, 1), np.uint64), tickets=device.array(np.zeros(n, np.uint32)),
                       pairs=pairs)
    np.testing.assert_array_equal(unpack_pairs(device.numpy(pairs))[0], noise_of(rows, [5])[:, 0] + f32(0))


# Arguments that do not fit


@emulated_only
@pytest.mark.parametrize(("change", "message"), [
    (dict(logits=np.zeros((2, 12), f32)[:, ::2]), "logits of shape .* is not contiguous"),
    (dict(logits=np.zeros((2, 6))), "logits has dtype float64"),
    (dict(logits=np.zeros(6, f32)), r"logits has shape \(6,\); it needs \[B, V_local\]"),
    (dict(logits=np.zeros((1, 2**18 + 1), f32)), "at most 65535 rows of 262144 columns"),
    (dict(vocab_start=-1), "vocab_start is -1"),
    (dict(vocab_start=2**32 - 5), "vocab_start is 4294967291"),
    (dict(tokens=np.zeros(2, np.int32)), "tokens has dtype int32"),
    (dict(gather=lambda x: x), "pairs has shape"),
    (dict(gather=lambda x: x[None][:0]), "needs one rank or more"),
    (dict(passes=4), "passes is 4"),
])
def test_arguments_of_sample_that_do_not_fit(device, change, message):
    with pytest.raises(ConfigError, match=message):
        sampling_cuda.sample(**{**sampling_arguments(), **change})


@emulated_only
@pytest.mark.parametrize(("field", "value", "message"), [
    ("parts", np.zeros((2, 0), np.uint64), "each row needs a block"),
    ("tickets", np.zeros(2, np.int64), "tickets has dtype int64"),
    ("pairs", np.zeros(3, np.uint64), "pairs has shape"),
    ("row_max", np.zeros(2), "row_max has dtype float64"),
    ("status", np.zeros(2, np.int64), "status has dtype"),
    ("search", np.zeros((2, 4), np.uint64), "search has shape"),
    ("least", np.zeros(1, f32), "least has shape"),
    ("histograms", (np.zeros((2, 2, 1024), np.uint64),) * 3, "histogram has shape"),
])
def test_buffers_that_do_not_fit(device, field, value, message):
    arguments = sampling_arguments()
    setattr(arguments["buffers"], field, value)
    with pytest.raises(ConfigError, match=message):
        sampling_cuda.sample(**arguments)


@emulated_only
@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "min_score", "seed", "sample_index", "position"])
def test_rows_that_do_not_fit(device, field):
    arguments = sampling_arguments()
    setattr(arguments["rows"], field, np.zeros(2, np.int16))
    with pytest.raises(ConfigError, match=f"{field} has dtype int16"):
        sampling_cuda.sample(**arguments)
