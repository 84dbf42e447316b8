"""logprobs.cu against its specification in NumPy: token ids exactly, log-probabilities but for the last bits."""

from types import SimpleNamespace

import numpy as np
import pytest

from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError
from cutp.ops import logprobs as logprobs_reference
from cutp.ops import logprobs_cuda
from cutp.ops.logprobs_cuda import TOP_WORD
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import emulated_only, gpu_only, in_every_order, read_only
from tests.ops.logits_batch import f32, gather_over, on_shards, random_logits


def run_logprobs(device, x, targets, n_top, vocab_start=0, *, comm=None, wanted=None, **options):
    batch, columns = x.shape
    wanted = np.zeros(batch, np.int32) if wanted is None else wanted
    words = TOP_WORD + n_top
    out = dict(logprobs=device.poisoned(batch, f32), is_greedy=device.array(np.zeros(batch, bool)),
               top_ids=device.poisoned((batch, n_top), np.int64), top_logprobs=device.poisoned((batch, n_top), f32))
    tickets = device.array(np.zeros(batch, np.uint32))
    logprobs_cuda.logprobs(
        *read_only(device, x), vocab_start, *read_only(device, wanted, np.asarray(targets, np.int64)),
        gather_over(comm, device),
        parts=device.poisoned((batch, logprobs_cuda.slices_per_row(columns), words), np.uint64), tickets=tickets,
        records=device.poisoned((batch, words), np.uint64), **out, **options)
    assert not device.numpy(tickets).any()
    return SimpleNamespace(**{name: device.numpy(array) for name, array in out.items()})


def assert_logprobs(got, x, targets, n_top):
    alone = Communicator.single()
    logprobs, is_greedy = logprobs_reference.target_logprobs(x, 0, targets, alone)
    ids, top = logprobs_reference.top_logprobs(x, 0, n_top, alone)
    np.testing.assert_allclose(got.logprobs, logprobs, rtol=3e-7, atol=6e-7)
    np.testing.assert_array_equal(got.is_greedy, is_greedy)
    np.testing.assert_array_equal(got.top_ids, ids)
    np.testing.assert_allclose(got.top_logprobs, top, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize(("n", "v", "n_top"), [(3, 1, 1), (4, 7, 20), (5, 66, 5), (3, 1500, 20), (2, 2000, 0),
                                               (2, 8192, 3), (3, 9001, 20)])
def test_logprobs_equal_the_reference(device, n, v, n_top):
    x = random_logits(v, n, v)
    targets = np.random.default_rng(v).integers(0, v, n)
    targets[0] = x[0].argmax()
    assert_logprobs(run_logprobs(device, x, targets, n_top), x, targets, n_top)


@pytest.mark.parametrize("borders", [[0, 101, 203], [0, 3, 3, 150, 203], [0, 0, 203]], ids=str)
def test_logprobs_on_shards(device, borders):
    x = random_logits(22, 6, 203)
    targets = np.array([0, 202, 2, 3, 150, 149])
    for got in on_shards(lambda part, start, comm: run_logprobs(device, part, targets, 8, start, comm=comm), x,
                         borders):
        assert_logprobs(got, x, targets, 8)


def test_many_candidates_for_few_places(device):
    """All the greatest logits belong to one thread, ties among them."""
    x = random_logits(23, 2, 8192) / 100
    place = np.concatenate([np.arange(4) + 1024 * i for i in range(8)])
    x[0, place] = 10 + (np.arange(32) // 3)
    x[1, place] = 10
    targets = np.array([place[5], place[31]])
    assert_logprobs(run_logprobs(device, x, targets, 20), x, targets, 20)


def test_logprobs_of_infinities(device):
    x = np.array([[np.inf, 0, np.inf, -np.inf], [-np.inf, 0, -np.inf, -np.inf]], f32)
    for target in range(4):
        for borders in ([0, 4], [0, 1, 4]):
            for got in on_shards(lambda part, start, comm, t=target: run_logprobs(device, part, [t, t], 3, start,
                                                                                  comm=comm), x, borders):
                assert_logprobs(got, x, np.array([target] * 2), 3)


def test_logprobs_of_unusable_rows_and_rows_not_wanted(device):
    x = random_logits(24, 6, 40)
    x[1, 3], x[2], x[4] = np.nan, -np.inf, np.nan
    targets = np.array([5, 5, 5, 5, 5, 40])
    got = run_logprobs(device, x, targets, 4, wanted=np.array([0, 3, 0, 20, -1, 0], np.int32))
    assert np.isnan(got.logprobs[[1, 2, 4, 5]]).all() and not got.is_greedy[[1, 2, 4]].any()
    assert (got.top_ids[4] == np.iinfo(np.int64).max).all() and np.isnan(got.top_logprobs[4]).all()
    fine = [0, 3]
    assert_logprobs(SimpleNamespace(**{k: v[fine] for k, v in vars(got).items()}), x[fine], targets[fine], 4)


def test_logprobs_of_a_row_do_not_depend_on_its_batch(device):
    x, targets = random_logits(25, 4, 8501), np.arange(4) * 7
    batch = run_logprobs(device, x, targets, 6, pdl=True)
    for i in range(4):
        one = run_logprobs(device, x[i : i + 1], targets[i : i + 1], 6)
        for name, values in vars(one).items():
            np.testing.assert_array_equal(values[0], getattr(batch, name)[i])


@needs_compiler
def test_logprobs_do_not_depend_on_the_order_of_threads():
    from tests.ops.conftest import EmulatedArrays

    x, targets = random_logits(26, 1, 8300), np.array([17])

    def run():
        got = run_logprobs(EmulatedArrays(), x, targets, 20)
        return got.logprobs, got.top_logprobs, got.top_ids.astype(f32)

    logprobs, top, ids = in_every_order(run)
    expected_ids, expected = logprobs_reference.top_logprobs(x, 0, 20, Communicator.single())
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(top, expected, rtol=3e-7, atol=6e-7)


@gpu_only
@pytest.mark.parametrize(("n", "v"), [(1, 128256), (64, 151937), (2, 2**18)])
def test_logprobs_of_large_vocabularies(device, n, v):
    x = random_logits(v, n, v)
    targets = np.random.default_rng(n).integers(0, v, n)
    assert_logprobs(run_logprobs(device, x, targets, 20), x, targets, 20)


@emulated_only
@pytest.mark.parametrize(("change", "message"), [
    (dict(records=np.zeros((2, 2), np.uint64)), "room for -1 top tokens"),
    (dict(records=np.zeros((2, 24), np.uint64)), "room for 21 top tokens"),
    (dict(parts=np.zeros((2, 2, 5), np.uint64)), "parts has shape"),
    (dict(wanted=np.zeros(2, bool)), "wanted has dtype bool"),
    (dict(targets=np.zeros(2, np.int32)), "targets has dtype int32"),
    (dict(is_greedy=np.zeros(2, np.int8)), "is_greedy has dtype int8"),
    (dict(top_ids=np.zeros((2, 3), np.int64)), "top_ids has shape"),
    (dict(logprobs=np.zeros(2)), "logprobs has dtype float64"),
])
def test_arguments_of_logprobs_that_do_not_fit(device, change, message):
    given = {"logits": np.zeros((2, 6), f32), "vocab_start": 0, "wanted": np.zeros(2, np.int32),
             "targets": np.zeros(2, np.int64), "gather": lambda x: x[None], "parts": np.zeros((2, 1, 5), np.uint64),
             "tickets": np.zeros(2, np.uint32), "records": np.zeros((2, 5), np.uint64), "logprobs": np.zeros(2, f32),
             "is_greedy": np.zeros(2, bool), "top_ids": np.zeros((2, 2), np.int64),
             "top_logprobs": np.zeros((2, 2), f32)}
    with pytest.raises(ConfigError, match=message):
        logprobs_cuda.logprobs(**{**given, **change})
