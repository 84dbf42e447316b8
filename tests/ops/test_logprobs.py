"""Log-probabilities on vocabulary shards against a float64 log-softmax of the whole row."""

import tracemalloc

import numpy as np
import pytest

from cutp.comm.communicator import Communicator
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError, CutpError, InvalidTokenError
from cutp.ops.logprobs import log_normalizer, target_logprobs, top_logprobs

pytestmark = pytest.mark.filterwarnings("error")

SHARDINGS = {"one": [0, 1], "two": [0, 0.3, 1], "three, one empty": [0, 0.5, 0.5, 1], "eight": np.linspace(0, 1, 9)}


def alone():
    return Communicator.single()


def on_shards(fn, x, sharding):
    """fn(shard, start, comm) on every rank of a sharding, given as borders from 0 to 1."""
    borders = [int(round(b * x.shape[1])) for b in sharding]

    def body(comm):
        lo, hi = borders[comm.rank], borders[comm.rank + 1]
        return fn(x[:, lo:hi], lo, comm)

    return run_threads(len(borders) - 1, body, timeout=20)


def random_logits(rng, n, v):
    x = rng.standard_normal((n, v)) * rng.choice([0.1, 3, 20], (n, 1)) + rng.choice([-1e4, 0, 300], (n, 1))
    x[::3] = np.round(x[::3])
    x[rng.random((n, v)) < 0.05] = -np.inf
    x[:, 0] = 1
    return x.astype(np.float32)


def log_softmax(x):
    x = x.astype(np.float64)
    top = x.max(axis=1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(axis=1, keepdims=True))


def reference_top(x, k):
    """ids and log-probabilities by a stable sort, padded with -1 and -inf."""
    ids = np.argsort(-x, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(log_softmax(x), ids, axis=1)
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(ids, missing, constant_values=-1), np.pad(values, missing, constant_values=-np.inf)


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize("v", [1, 7, 64, 3001])
def test_equal_float64_log_softmax(v, sharding):
    rng = np.random.default_rng(v)
    x = random_logits(rng, 40, v)
    targets = rng.integers(0, v, 40)
    targets[:20] = x[:20].argmax(axis=1)
    exact = log_softmax(x)

    results = on_shards(lambda part, start, comm: target_logprobs(part, start, targets, comm), x, sharding)
    for logprobs, is_greedy in results:
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, exact[np.arange(40), targets], rtol=2e-7, atol=1e-12)
        np.testing.assert_array_equal(is_greedy, targets == x.argmax(axis=1))
        np.testing.assert_array_equal(logprobs, results[0][0])

    results = on_shards(lambda part, _, comm: log_normalizer(part, comm), x, sharding)
    for row_max, log_sum_exp in results:
        np.testing.assert_array_equal(row_max, x.max(axis=1))
        assert log_sum_exp.dtype == np.float64
        top = x.max(axis=1).astype(np.float64)
        np.testing.assert_allclose(log_sum_exp, top + np.log(np.exp(x - top[:, None]).sum(axis=1)), rtol=1e-13)
        np.testing.assert_array_equal(log_sum_exp, results[0][1])


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize(("v", "k"), [(1, 1), (7, 3), (7, 20), (64, 64), (3001, 0), (3001, 1), (3001, 20), (3001, 900)])
def test_top_logprobs(v, k, sharding):
    x = random_logits(np.random.default_rng(v + k), 30, v)
    expected_ids, expected = reference_top(x, k)
    for ids, logprobs in on_shards(lambda part, start, comm: top_logprobs(part, start, k, comm), x, sharding):
        assert (ids.dtype, logprobs.dtype, ids.shape) == (np.int64, np.float32, (30, k))
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(logprobs, expected, rtol=2e-7, atol=1e-12)


def test_ties_by_rising_id():
    x = np.array([[1, 2, -0.0, 2, 0, 2, 0, -np.inf]], np.float32)
    for ids, logprobs in on_shards(lambda part, start, comm: top_logprobs(part, start, 9, comm), x, [0, 0.5, 0.75, 1]):
        assert ids.tolist() == [[1, 3, 5, 0, 2, 4, 6, 7, -1]]
        assert np.isneginf(logprobs[0, 7:]).all()
    assert target_logprobs(x, 0, [1], alone())[1].tolist() == [True]
    assert target_logprobs(x, 0, [3], alone())[1].tolist() == [False]


def test_a_sure_token_has_logprob_zero():
    x = np.full((1, 50), -200, np.float32)
    x[0, 9] = 0
    assert target_logprobs(x, 0, [9], alone())[0] == 0
    assert target_logprobs(x, 0, [8], alone())[0] == -200


def test_infinities():
    x = np.array([[np.inf, 0, np.inf, -np.inf], [-np.inf, 0, -np.inf, -np.inf]], np.float32)
    half = np.float32(np.log(0.5))
    for sharding in SHARDINGS.values():
        got = [
            on_shards(lambda part, start, comm, t=t: target_logprobs(part, start, [t, t], comm)[0], x, sharding)[-1]
            for t in range(4)
        ]
        assert np.array(got).T.tolist() == [[half, -np.inf, half, -np.inf], [-np.inf, 0, -np.inf, -np.inf]]
        ids, logprobs = on_shards(lambda part, start, comm: top_logprobs(part, start, 3, comm), x, sharding)[0]
        assert ids.tolist() == [[0, 2, 1], [1, 0, 2]]
        assert logprobs.tolist() == [[half, half, -np.inf], [0, -np.inf, -np.inf]]
    row_max, log_sum_exp = log_normalizer(x, alone())
    assert row_max.tolist() == log_sum_exp.tolist() == [np.inf, 0]


CALLS = {
    "log_normalizer": lambda part, start, comm: log_normalizer(part, comm),
    "target_logprobs": lambda part, start, comm: target_logprobs(part, start, [0, 0, 0], comm),
    "top_logprobs": lambda part, start, comm: top_logprobs(part, start, 2, comm),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN"), (-np.inf, "above -inf")])
def test_unusable_row_is_refused_on_every_rank(call, value, reason):
    x = np.zeros((3, 9), np.float32)
    x[1] = value

    def error_of(*args):
        with pytest.raises(CutpError, match=reason) as info:
            call(*args)
        return str(info.value)

    errors = set(on_shards(error_of, x, SHARDINGS["three, one empty"]))
    assert len(errors) == 1
    assert "row 1 " in errors.pop()


@pytest.mark.parametrize("target", [-1, 9, 2**40])
def test_target_outside_the_vocabulary_is_refused_on_every_rank(target):
    def error_of(part, start, comm):
        with pytest.raises(InvalidTokenError, match=f"row 2: token id {target} ") as info:
            target_logprobs(part, start, [0, 8, target, 3], comm)
        return str(info.value)

    assert len(set(on_shards(error_of, np.zeros((4, 9), np.float32), SHARDINGS["eight"]))) == 1


def test_wrong_arguments_are_refused():
    x = np.zeros((2, 5), np.float32)
    with pytest.raises(ConfigError, match="float64"):
        log_normalizer(x.astype(np.float64), alone())
    with pytest.raises(ConfigError, match="shape"):
        target_logprobs(x, 0, [1, 2, 3], alone())
    with pytest.raises(ConfigError, match="-1"):
        top_logprobs(x, 0, -1, alone())


def test_no_rows():
    x = np.zeros((0, 5), np.float32)
    assert [a.shape for a in target_logprobs(x, 0, [], alone())] == [(0,), (0,)]
    assert [a.shape for a in top_logprobs(x, 0, 2, alone())] == [(0, 2), (0, 2)]


def test_row_has_the_same_bits_in_every_batch():
    x = random_logits(np.random.default_rng(0), 30, 5001)
    targets = np.arange(30) * 7
    logprobs, _ = target_logprobs(x, 0, targets, alone())
    ids, top = top_logprobs(x, 0, 5, alone())
    _, log_sum_exp = log_normalizer(x, alone())
    for i in range(30):
        row = x[i : i + 1]
        assert target_logprobs(row, 0, targets[i : i + 1], alone())[0][0] == logprobs[i]
        assert log_normalizer(row, alone())[1][0] == log_sum_exp[i]
        np.testing.assert_array_equal(top_logprobs(row, 0, 5, alone())[1][0], top[i])


def test_temporaries_are_smaller_than_the_logits():
    x = np.zeros((256, 40_000), np.float32)  # 41 MB
    for call in (
        lambda: log_normalizer(x, alone()),
        lambda: target_logprobs(x, 0, np.zeros(256, int), alone()),
        lambda: top_logprobs(x, 0, 20, alone()),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6
