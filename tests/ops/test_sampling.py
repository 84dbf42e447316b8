"""Sampling: exact survivor sets, equal tokens on every sharding, distributions, batch independence, odd inputs."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cutp.comm.communicator import Communicator
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError, CutpError, RequestError
from cutp.ops import sampling_thresholds
from cutp.ops.sampling import SamplingRows, draw, sample, scores, survivors
from cutp.ops.sampling_keys import ordered_keys, values_of_keys
from cutp.ops.sampling_thresholds import integer_masses, share_of, thresholds

pytestmark = pytest.mark.filterwarnings("error")


class Counting:
    """A communicator that notes the names of the collectives that went through it."""

    def __init__(self, comm):
        self.comm, self.calls = comm, []

    def all_gather(self, x, axis=0):
        self.calls.append("all_gather")
        return self.comm.all_gather(x, axis=axis)

    def all_reduce(self, x):
        self.calls.append("all_reduce")
        return self.comm.all_reduce(x)


def alone():
    return Communicator.single()


def settings(n, **changed):
    fields = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=17, sample_index=0, position=0)
    dtypes = dict(top_k=np.int32, seed=np.uint64, sample_index=np.int64, position=np.int64)
    fields.update(changed)
    return SamplingRows(
        **{k: np.broadcast_to(np.asarray(v, dtypes.get(k, np.float32)), n).copy() for k, v in fields.items()}
    )


def random_settings(rng, n):
    return settings(
        n,
        temperature=rng.choice([0, 0.3, 0.7, 1, 1.5], n),
        top_k=rng.choice([0, -1, 1, 2, 7, 40, 10**9], n),
        top_p=rng.choice([1, 0, 1e-6, 0.2, 0.5, 0.9, 0.95, 0.999], n),
        min_p=rng.choice([0, 0, 0.01, 0.1, 0.5, 1], n),
        seed=rng.integers(0, 2**64, n, dtype=np.uint64),
        sample_index=rng.integers(0, 4, n),
        position=rng.integers(0, 5000, n),
    )


def random_logits(rng, n, v):
    x = rng.standard_normal((n, v)) * rng.choice([0.3, 2, 6], (n, 1)) + rng.choice([-50, 0, 50], (n, 1))
    tied = rng.random(n) < 0.4
    x[tied] = np.round(x[tied] * 2) / 2
    x[rng.random((n, v)) < 0.02] = -np.inf
    x[:, -1] = 0
    return x.astype(np.float32)


def shards_of(v, size, rng):
    """Uneven borders of `size` shards; with more than two shards one of them is empty."""
    borders = np.sort(rng.integers(0, v + 1, size - 1))
    if size > 2:
        borders[size // 2] = borders[size // 2 - 1]
    return np.concatenate([[0], borders, [v]])


def sharded(fn, x, rows, borders):
    """The results of fn on each rank's shard."""

    def body(comm):
        lo, hi = borders[comm.rank], borders[comm.rank + 1]
        return fn(np.ascontiguousarray(x[:, lo:hi]), int(lo), rows, comm)

    return run_threads(len(borders) - 1, body, timeout=20)


# Survivors


def reference_scores(x, temperature):
    with np.errstate(over="ignore"):
        return (x - x.max()) / np.float32(temperature)


def keep_float64(x, temperature, top_k, top_p, min_p):
    """The surviving tokens of one row, by sorting, with probabilities in float64."""
    z = reference_scores(x, temperature).astype(np.float64)
    keep = z > -np.inf
    if top_k > 0:
        keep &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p < 1:
        mass = np.where(keep, np.exp(z), 0)
        order = np.argsort(-z, kind="stable")
        cumulative = np.cumsum(mass[order])
        needed = np.searchsorted(cumulative, top_p * cumulative[-1])  # the first prefix with enough mass
        keep &= z >= z[order[min(needed, len(z) - 1)]]
    return keep & (np.exp(z) >= min_p)


def keep_integer(x, temperature, top_k, top_p, min_p):
    """The same by sorting Python integers: no rounding after the masses themselves."""
    z = reference_scores(x, temperature)
    keep = z > -np.inf
    if top_k > 0:
        keep &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p < 1:
        masses = [int(q) if ok else 0 for q, ok in zip(integer_masses(z), keep, strict=True)]
        wanted, reached = Fraction(float(np.float32(top_p))) * sum(masses), 0
        for i in np.argsort(-z, kind="stable"):
            reached += masses[i]
            if reached >= wanted and reached > 0:
                break
        keep &= z >= z[i]
    with np.errstate(divide="ignore"):
        return keep & (z >= np.float32(np.log(np.float64(np.float32(min_p)))))


def test_survivors_equal_a_sort_based_reference():
    rng = np.random.default_rng(1)
    for v in (1, 2, 5, 33, 257, 2000):
        x, rows = random_logits(rng, 60, v), random_settings(rng, 60)
        rows.top_p = np.where(rows.top_p == np.float32(1e-6), np.float32(0.0625), rows.top_p)
        got = survivors(x, 0, rows, alone())
        for i in np.flatnonzero(rows.temperature > 0):
            expected = keep_integer(x[i], rows.temperature[i], rows.top_k[i], rows.top_p[i], rows.min_p[i])
            np.testing.assert_array_equal(got[i], expected, err_msg=f"row {i} of {v} tokens: {rows.take([i])}")


def test_survivors_equal_float64_up_to_its_rounding():
    rng = np.random.default_rng(2)
    exact = total = 0
    for v in (3, 50, 1000, 5000):
        x, rows = random_logits(rng, 60, v), random_settings(rng, 60)
        got = survivors(x, 0, rows, alone())
        for i in np.flatnonzero(rows.temperature > 0):
            t, k, p, m = rows.temperature[i], rows.top_k[i], float(rows.top_p[i]), float(rows.min_p[i])
            slack = 4e-6  # float32 exponentials
            fewer = keep_float64(x[i], t, k, p * (1 - slack) if p < 1 else 1, min(m * (1 + slack), 1))
            more = keep_float64(x[i], t, k, min(p * (1 + slack), 1 - 1e-12) if p < 1 else 1, m * (1 - slack))
            assert (fewer <= got[i]).all(), rows.take([i])
            assert (got[i] <= more).all(), rows.take([i])
            exact += (fewer == more).all()
            total += 1
    assert exact > 0.9 * total  # for nearly all rows the two bounds coincide


def test_survivors_of_a_large_vocabulary():
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((4, 128256)) * 3).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = 0  # every token has the same mass: 2^40 * 128256 does not fit into a float64's 53 bits
    rows = settings(4, top_k=[1000, 0, 0, 0], top_p=[0.9, 0.95, 0.5, 0.999])
    got = survivors(x, 0, rows, alone())
    for i in range(4):
        np.testing.assert_array_equal(got[i], keep_integer(x[i], 1.0, rows.top_k[i], rows.top_p[i], 0.0))
    assert got[2].all()


def test_known_survivors():
    x = np.log(np.array([[0.4, 0.3, 0.2, 0.05, 0.05]], np.float32))

    def kept(**how):
        return np.flatnonzero(survivors(x, 0, settings(1, **how), alone())[0]).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=4) == [0, 1, 2, 3, 4]  # ties at the threshold stay
    assert kept(top_k=100) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.35) == [0]
    assert kept(top_p=0.41) == [0, 1]
    assert kept(top_p=0.0) == [0]
    assert kept(top_k=2, top_p=0.6) == [0, 1]  # 0.4 / 0.7 is below 0.6: top-p counts what top-k left
    assert kept(top_k=2, top_p=0.55) == [0]
    assert kept(min_p=0.4) == [0, 1, 2]
    assert kept(min_p=0.6) == [0, 1]
    assert kept(min_p=1.0) == [0]
    assert kept(temperature=0.0) == [0]
    assert kept(temperature=0.0, top_k=3) == [0]


def test_masses_are_close_to_exponentials():
    z = -np.concatenate([[0], np.geomspace(1e-6, 200, 3000), [np.inf]]).astype(np.float32)
    exact = np.exp(z.astype(np.float64)) * 2.0**40
    masses = integer_masses(z)
    assert masses.dtype == np.int64
    assert masses[0] == 2**40
    assert masses[-1] == 0
    assert (np.abs(masses - exact) <= 1 + 4e-6 * exact).all()


def test_share_of_a_mass_is_exact():
    rng = np.random.default_rng(12)
    p = np.concatenate([[0, 2.0**-32, 1e-30, np.nextafter(np.float32(1), np.float32(0))], rng.random(500)])
    p = p.astype(np.float32)
    mass = np.concatenate([[2**40, 2**40, 2**40, 2**58 - 1], rng.integers(2**40, 2**58, 500)])
    for one_p, one_mass, share in zip(p, mass, share_of(p, mass), strict=True):
        multiple = Fraction(math.ceil(Fraction(float(one_p)) * 2**32), 2**32)
        assert share == max(1, math.ceil(multiple * int(one_mass)))


def test_keys_keep_the_order():
    x = np.array([-np.inf, -3e38, -1, -1e-45, 0, 1e-45, 1, 3e38, np.inf], np.float32)
    keys = ordered_keys(x)
    assert keys.dtype == np.uint32
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(values_of_keys(keys), x)
    assert ordered_keys(np.array([-0.0], np.float32)) == ordered_keys(np.array([0.0], np.float32))


# Sharding and batches


@pytest.mark.parametrize("size", [2, 3, 8])
def test_tokens_and_survivors_do_not_depend_on_the_sharding(size):
    rng = np.random.default_rng(size)
    for v in (1, 5, 64, 1500):
        x, rows = random_logits(rng, 50, v), random_settings(rng, 50)
        expected, mask = sample(x, 0, rows, alone()), survivors(x, 0, rows, alone())
        assert expected.dtype == np.int64
        borders = shards_of(v, size, rng)
        for tokens in sharded(sample, x, rows, borders):
            np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(np.concatenate(sharded(survivors, x, rows, borders), axis=1), mask)


def test_large_vocabulary_on_eight_ranks():
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((4, 128256)) * 2).astype(np.float32)
    rows = settings(4, top_k=[0, 50, 0, 500], top_p=[1, 1, 0.9, 0.8], min_p=[0, 0, 0.001, 0], seed=2**64 - 1)
    expected = sample(x, 0, rows, alone())
    for tokens in sharded(sample, x, rows, shards_of(128256, 8, rng)):
        np.testing.assert_array_equal(tokens, expected)


def test_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    x, rows = random_logits(rng, 64, 700), random_settings(rng, 64)
    tokens, mask = sample(x, 0, rows, alone()), survivors(x, 0, rows, alone())
    for i in range(64):
        assert sample(x[i : i + 1], 0, rows.take([i]), alone())[0] == tokens[i]
        np.testing.assert_array_equal(survivors(x[i : i + 1], 0, rows.take([i]), alone())[0], mask[i])
    order = rng.permutation(64)
    np.testing.assert_array_equal(sample(x[order], 0, rows.take(order), alone()), tokens[order])


def test_many_rows_are_searched_in_parts(monkeypatch):
    rng = np.random.default_rng(6)
    x, rows = random_logits(rng, 50, 90), random_settings(rng, 50)
    expected = sample(x, 0, rows, alone())
    monkeypatch.setattr(sampling_thresholds, "ROWS_AT_ONCE", 7)
    for tokens in sharded(sample, x, rows, np.array([0, 40, 90])):
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    ("how", "gathers", "reductions"),
    [
        (dict(temperature=0.0, top_p=0.5), 1, 0),
        (dict(), 2, 0),
        (dict(min_p=0.1), 2, 0),
        (dict(top_k=5), 2, 3),
        (dict(top_p=0.9), 2, 3),
        (dict(top_k=5, top_p=0.9), 2, 5),
    ],
)
def test_collectives_are_only_those_needed(how, gathers, reductions):
    x = random_logits(np.random.default_rng(7), 3, 40)

    def calls(logits, start, rows, comm):
        comm = Counting(comm)
        sample(logits, start, rows, comm)
        return comm.calls

    for names in sharded(calls, x, settings(3, **how), np.array([0, 11, 11, 40])):
        assert (names.count("all_gather"), names.count("all_reduce")) == (gathers, reductions)


def test_inputs_are_left_alone():
    rng = np.random.default_rng(8)
    x, rows = random_logits(rng, 20, 100), random_settings(rng, 20)
    x[3, 5] = np.inf
    before = x.copy()
    sample(x, 0, rows, alone())
    np.testing.assert_array_equal(x, before)
    assert sample(x[:0], 0, rows.take(slice(0, 0)), alone()).shape == (0,)


# Distributions


def assert_distribution(tokens, probabilities):
    """Chi-square test; the statistic is made normal by Wilson and Hilferty's cube root."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities[probabilities > 0] * len(tokens)
    assert expected.min() > 5
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert deviation < 3.5, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


N_DRAWS = 250_000


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
def test_plain_draws_follow_the_softmax(varied):
    x = (np.random.default_rng(9).standard_normal(30) * 1.5).astype(np.float32)
    rows = settings(N_DRAWS, temperature=1.3, **{varied: np.arange(N_DRAWS)})
    tokens = sample(np.tile(x, (N_DRAWS, 1)), 0, rows, alone())
    assert_distribution(tokens, softmax(x / np.float32(1.3)))


@pytest.mark.parametrize(
    "how",
    [dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1), dict(top_k=20, top_p=0.9, min_p=0.05, temperature=0.8)],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_filtered_draws_follow_the_softmax_of_the_survivors(how):
    x = (np.random.default_rng(10).standard_normal(40) * 1.5).astype(np.float32)
    t = how.get("temperature", 1.0)
    keep = keep_float64(x, t, how.get("top_k", 0), how.get("top_p", 1), how.get("min_p", 0))
    assert 1 < keep.sum() < 30
    expected = softmax(np.where(keep, x / np.float32(t), -np.inf))

    one = settings(1, **how)
    z = scores(x[None], np.array([0]), x[None].max(axis=1), one.temperature)
    least = thresholds(z, one.top_k, one.top_p, one.min_p, alone())
    rows = settings(N_DRAWS, **how, position=np.arange(N_DRAWS))
    tokens = draw(np.repeat(z, N_DRAWS, axis=0), np.repeat(least, N_DRAWS), 0, rows, alone())
    assert_distribution(tokens, expected)

    n = 10_000  # and the whole function agrees
    np.testing.assert_array_equal(sample(np.tile(x, (n, 1)), 0, rows.take(slice(0, n)), alone()), tokens[:n])


def test_neighbouring_positions_seeds_and_samples_are_independent():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    for varied in ("position", "seed", "sample_index"):
        rows = settings(N_DRAWS, **{varied: np.arange(N_DRAWS)})
        tokens = sample(np.tile(np.log(p).astype(np.float32), (N_DRAWS, 1)), 0, rows, alone())
        assert_distribution(tokens[:-1:2] * 4 + tokens[1::2], np.outer(p, p).ravel())


def test_seed_sample_index_and_position_give_other_draws():
    x = np.zeros((64, 1000), np.float32)

    def tokens(**how):
        return sample(x, 0, settings(64, **{"position": np.arange(64), **how}), alone())

    first = tokens()
    np.testing.assert_array_equal(first, tokens())
    for other in (dict(seed=18), dict(seed=17 + 2**32), dict(sample_index=1), dict(position=np.arange(64) + 64)):
        assert (first == tokens(**other)).mean() < 0.1


def test_largest_seed():
    rows = settings(2, seed=np.array([2**64 - 1, 2**63], np.uint64))
    tokens = sample(np.zeros((2, 5000), np.float32), 0, rows, alone())
    assert tokens[0] != tokens[1]


# Odd inputs


def test_greedy_takes_the_lowest_of_equal_ids():
    x = np.array([[1, 3, 3, 0, 3], [-0.0, 0.0, -1, 0.0, -0.0], [-5, -5, -5, -5, -5]], np.float32)
    rows = settings(3, temperature=0.0, top_k=1, top_p=0.1)
    assert sample(x, 0, rows, alone()).tolist() == [1, 0, 0]
    for tokens in sharded(sample, x, rows, np.array([0, 0, 2, 5])):
        assert tokens.tolist() == [1, 0, 0]
    assert sample(x, 1000, rows, alone()).tolist() == [1001, 1000, 1000]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_tiny_temperature_is_greedy(temperature):
    x = random_logits(np.random.default_rng(11), 30, 200)
    x[:, 7] = 99
    x[5, :3] = [-3e38, 3e38, -np.inf]
    expected = x.argmax(axis=1)
    for how in (dict(), dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)):
        tokens = sample(x, 0, settings(30, temperature=temperature, **how), alone())
        np.testing.assert_array_equal(tokens, expected)


def test_huge_temperature_is_uniform_over_what_is_allowed():
    n = 100_000
    x = np.tile(np.array([-np.inf, 5, 0, -1e3, -np.inf, 1e3], np.float32), (n, 1))
    tokens = sample(x, 0, settings(n, temperature=1e30, position=np.arange(n)), alone())
    assert_distribution(tokens, np.array([0, 1, 1, 1, 0, 1]) / 4)


@pytest.mark.parametrize("how", [dict(), dict(top_k=4), dict(top_p=0.99), dict(min_p=1e-30), dict(temperature=0.0)])
def test_minus_infinity_is_never_chosen(how):
    x = np.full((40, 9), -np.inf, np.float32)
    x[:, [3, 8]] = [0, -60]
    rows = settings(40, position=np.arange(40), **how)
    mask = survivors(x, 0, rows, alone())
    assert not mask[:, [0, 1, 2, 4, 5, 6, 7]].any()
    assert mask[:, 3].all()
    for tokens in sharded(sample, x, rows, np.array([0, 2, 2, 6, 9])):
        assert np.isin(tokens, [3, 8]).all()


@pytest.mark.parametrize("how", [dict(), dict(top_k=3), dict(top_p=0.9), dict(min_p=0.5)])
def test_plus_infinity_takes_all_the_mass(how):
    n = 30_000
    x = np.tile(np.array([0, np.inf, 3e38, -np.inf, np.inf, -3e38], np.float32), (n, 1))
    tokens = sample(x, 0, settings(n, position=np.arange(n), **how), alone())
    assert_distribution(tokens, np.array([0, 1, 0, 0, 1, 0]) / 2)
    assert sample(x[:1], 0, settings(1, temperature=0.0), alone())[0] == 1


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN"), (-np.inf, "above -inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_row_is_refused_on_every_rank(value, reason, temperature):
    x = np.zeros((4, 12), np.float32)
    x[2] = value
    if np.isnan(value):
        x[2] = [np.inf] * 5 + [np.nan] + [0] * 6  # only one of three ranks sees it
    rows = settings(4, temperature=temperature, top_p=0.9)

    def error_of(*args):
        with pytest.raises(CutpError) as info:
            sample(*args)
        return info.value

    errors = sharded(error_of, x, rows, np.array([0, 4, 4, 12]))
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert "row 2 " in str(error)
        assert reason in str(error)


def test_empty_vocabulary_is_refused():
    with pytest.raises(CutpError, match="rows 0, 1 of the batch"):
        sample(np.zeros((2, 0), np.float32), 0, settings(2), alone())


@pytest.mark.parametrize(
    "wrong",
    [dict(temperature=-1), dict(temperature=np.nan), dict(temperature=np.inf), dict(top_p=1.5), dict(top_p=np.nan),
     dict(min_p=-0.1), dict(min_p=2), dict(position=-1), dict(position=2**32), dict(sample_index=2**32)],
)
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    rows = settings(3, **{name: [getattr(settings(1), name)[0], value, getattr(settings(1), name)[0]]})
    with pytest.raises(RequestError, match=f"row 1 .*{name}"):
        sample(np.zeros((3, 4), np.float32), 0, rows, alone())


def test_wrong_shapes_are_refused():
    with pytest.raises(ConfigError, match="2 rows of sampling settings for 3 rows"):
        sample(np.zeros((3, 4), np.float32), 0, settings(2), alone())
    with pytest.raises(ConfigError, match="float64"):
        sample(np.zeros((3, 4)), 0, settings(3), alone())
    rows = settings(3)
    rows.seed = rows.seed[:2]
    with pytest.raises(ConfigError, match="equally long"):
        sample(np.zeros((3, 4), np.float32), 0, rows, alone())
