"""Every collective on one rank and on threads, against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cutp.comm import Communicator, run_threads
from cutp.comm.collectives import WHOLE_ARRAY_BYTES, sum_in_rank_order
from cutp.errors import CommError, ConfigError, CutpError
from tests.comm import collective_cases as cases

SIZES = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda c: c.__name__)
def test_threads_against_numpy(n, case):
    digests = run_threads(n, lambda comm: list(case(comm)), timeout=60)
    if case in (cases.all_reduce_cases, cases.all_gather_cases, cases.all_reduce_async_cases):
        assert all(d == digests[0] for d in digests), "ranks disagree"


def test_single_equals_one_thread():
    with Communicator.single() as comm:
        assert cases.run_all(comm) == run_threads(1, cases.run_all)[0]


def test_order_of_summation_is_rank_order():
    # Only ((r0 + r1) + r2) gives 1: the other orders lose it in 1e8 or cancel differently.
    parts = [np.float32(1e8), np.float32(-1e8), np.float32(1)]
    for n in (1, WHOLE_ARRAY_BYTES):
        got = run_threads(3, lambda comm, n=n: comm.all_reduce(np.full(n, parts[comm.rank])))
        assert all((g == 1).all() for g in got)
    reversed_parts = parts[::-1]
    assert (run_threads(3, lambda comm: comm.all_reduce(reversed_parts[comm.rank]))[0]) == 0


def test_bfloat16_is_rounded_once():
    # 1 + 2**-8 + 2**-8 is 1 + 2**-7 exactly in float32; rounding after each addition would give 1.
    parts = [ml_dtypes.bfloat16(1), ml_dtypes.bfloat16(2**-8), ml_dtypes.bfloat16(2**-8)]
    for n in (1, WHOLE_ARRAY_BYTES):
        for got in run_threads(3, lambda comm, n=n: comm.all_reduce(np.full(n, parts[comm.rank]))):
            assert got.dtype == ml_dtypes.bfloat16 and (got.astype(np.float32) == 1 + 2**-7).all()


def test_whole_and_sliced_give_the_same_bits(monkeypatch):
    shape = (33, 101)
    run = lambda comm: comm.all_reduce(cases.values("f4", shape, comm.rank)).tobytes()  # noqa: E731
    whole = run_threads(4, run)
    monkeypatch.setattr("cutp.comm.collectives.WHOLE_ARRAY_BYTES", 0)
    assert run_threads(4, run) == whole


def test_overflow_and_nan_do_not_warn():
    big = np.array([np.finfo(np.float32).max, np.inf, np.nan], np.float32)

    def program(comm):
        with np.errstate(all="raise"):
            return comm.all_reduce(big if comm.rank else big * np.array([1, -1, 1], np.float32))

    got = run_threads(2, program)[0]
    assert got[0] == np.inf and np.isnan(got[1:]).all()


def test_sum_does_not_touch_its_parts():
    parts = [np.arange(3.0), np.arange(3.0)]
    sum_in_rank_order(parts)
    assert (parts[0] == np.arange(3.0)).all()


def test_results_are_private_to_their_rank():
    def program(comm):
        x = comm.broadcast(np.zeros(4) if comm.rank == 0 else None)
        x += comm.rank
        y = comm.all_reduce(np.ones(4))
        y += comm.rank
        comm.barrier()
        return x[0], y[0]

    assert run_threads(3, program) == [(0, 3), (1, 4), (2, 5)]


@pytest.mark.parametrize("call", [
    lambda c: c.all_reduce(np.array([True])),
    lambda c: c.all_reduce(np.ones(2, np.complex64)),
    lambda c: c.all_reduce(np.array(["a"], object)),
    lambda c: c.all_reduce(np.ones(2), out=np.ones(3)),
    lambda c: c.all_reduce(np.ones(2), out=np.ones(2, np.float32)),
    lambda c: c.all_gather(np.float32(1)),
    lambda c: c.all_gather(np.ones(2), axis=1),
    lambda c: c.reduce_scatter(np.ones((2, 2)), axis=-3),
    lambda c: c.broadcast(np.ones(2), root=1),
    lambda c: c.send(np.ones(2), 0),
    lambda c: c.recv(-1),
    lambda c: c.split(-2),
    lambda c: c.split("red"),
    lambda c: c.host.broadcast_bytes("text"),
    lambda c: c.host.all_gather_bytes(None),
])
def test_arguments_that_cannot_work(call):
    comm = Communicator.single()
    with pytest.raises(ConfigError):
        call(comm)
    assert comm.all_reduce(np.ones(1)) == 1


@pytest.mark.parametrize(("one", "other"), [
    (lambda c: c.all_reduce(np.ones(3)), lambda c: c.barrier()),
    (lambda c: c.all_reduce(np.ones(3)), lambda c: c.all_reduce(np.ones(4))),
    (lambda c: c.all_reduce(np.ones((2, 4))), lambda c: c.all_reduce(np.ones((4, 2)))),
    (lambda c: c.all_reduce(np.ones(3)), lambda c: c.all_reduce(np.ones(3, np.float32))),
    (lambda c: c.all_reduce(np.ones(100_000)), lambda c: c.all_reduce(np.ones(100_001))),
    (lambda c: c.all_gather(np.ones((3, 2))), lambda c: c.all_gather(np.ones((3, 3)))),
    (lambda c: c.reduce_scatter(np.ones(3)), lambda c: c.broadcast(np.ones(3), root=1)),
    (lambda c: c.recv(1), lambda c: c.host.send_bytes(b"x", 0)),
])
def test_ranks_out_of_step(one, other):
    """An error that names both calls, on at least one rank, and at once; nobody hangs."""
    def rank_main(comm):
        (one if comm.rank == 0 else other)(comm)
        comm.barrier()  # a rank whose own call could finish finds out here

    with pytest.raises(CutpError) as caught:
        run_threads(2, rank_main, timeout=20)
    assert isinstance(caught.value, CommError) and "this rank called" in str(caught.value)
    assert caught.value.hint
