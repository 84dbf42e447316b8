"""Errors: deadlines, peers that fail, errors that all ranks agree on, use after close."""

from __future__ import annotations

import re
import socket
import threading
import time
import traceback

import numpy as np
import pytest

from cutp.comm import Communicator, run_threads
from cutp.errors import (
    CapacityError,
    ClosedError,
    CommError,
    CommTimeoutError,
    ConfigError,
    PeerFailedError,
    PromptTooLongError,
    RequestError,
)


def errors_of(n, fn, timeout=20.0):
    """What each rank raised (or returned)."""
    def program(comm):
        try:
            return fn(comm)
        except BaseException as error:
            return error

    return run_threads(n, program, timeout=timeout)


def test_an_exception_wakes_all_ranks_and_comes_out():
    seen = {}

    def program(comm):
        if comm.rank == 2:
            raise ZeroDivisionError("the cause")
        began = time.monotonic()
        try:
            comm.all_reduce(np.ones(3))
        except PeerFailedError as error:
            seen[comm.rank] = (error, time.monotonic() - began)
            raise

    with pytest.raises(ZeroDivisionError, match="the cause") as caught:
        run_threads(4, program, timeout=30)
    assert any(f.name == "program" for f in traceback.extract_tb(caught.value.__traceback__))
    assert sorted(seen) == [0, 1, 3]
    for error, waited in seen.values():
        assert error.rank == 2 and "ZeroDivisionError: the cause" in str(error) and socket.gethostname() in str(error)
        assert waited < 10


def test_an_exception_wakes_ranks_that_wait_in_a_sub_communicator():
    def program(comm):
        half = comm.split(comm.rank % 2)
        if comm.rank == 0:
            time.sleep(0.2)  # until the others wait
            raise KeyError("gone")
        if comm.rank == 3:
            comm.barrier()
        half.barrier() if comm.rank == 2 else half.recv(1 - half.rank)

    began = time.monotonic()
    with pytest.raises(KeyError):
        run_threads(4, program, timeout=30)
    assert time.monotonic() - began < 10


def test_failure_of_a_sub_communicator_leaves_the_others_usable():
    def program(comm):
        half = comm.split(comm.rank // 2)
        try:
            if comm.rank == 0:
                half.fail(ValueError("only here"))
            half.barrier()
        except CommError as error:
            outcome = error
        else:
            outcome = None
        comm.barrier()
        return outcome

    got = run_threads(4, program, timeout=20)
    assert "only here" in str(got[1]) and isinstance(got[1], PeerFailedError)
    assert isinstance(got[0], CommError) and got[2:] == [None, None]


def test_errors_of_split_ranks_name_the_world_rank():
    def program(comm):
        half = comm.split(comm.rank // 2)
        if comm.rank == 3:
            half.fail(ValueError("x"))
        else:
            half.barrier()

    got = errors_of(4, program)
    assert got[2].rank == 1 and "world rank 3" in str(got[2])


@pytest.mark.parametrize("call", ["all_reduce", "barrier", "recv"])
def test_deadline_names_operation_and_missing_rank(monkeypatch, call):
    monkeypatch.setenv("CUTP_COMM_TIMEOUT", "0.3")
    release = threading.Event()

    def program(comm):
        if comm.rank == 1:
            assert release.wait(20)
            comm.barrier()
        try:
            if call == "all_reduce":
                comm.all_reduce(np.ones((2, 3), np.float32))
            elif call == "recv":
                comm.recv(1)
            else:
                comm.barrier()
        except CommTimeoutError as error:
            with pytest.raises(CommTimeoutError):
                comm.barrier()
            return error
        finally:
            release.set()

    began = time.monotonic()
    got = errors_of(2, program, timeout=None)
    assert 0.25 < time.monotonic() - began < 10
    assert isinstance(got[0], CommTimeoutError) and got[0].rank == 0
    text = str(got[0])
    assert f"rank 1 (host {socket.gethostname()})" in text and "CUTP_COMM_TIMEOUT" in text
    assert 0.3 <= float(re.search(r" waited (\d+\.\d) s for rank 1 ", text)[1]) < 10
    assert {"all_reduce": "all_reduce(float32[2, 3])", "recv": "recv", "barrier": "barrier"}[call] in text
    # The late rank learns that the other one has given up, and on what.
    assert isinstance(got[1], PeerFailedError) and got[1].rank == 0 and "CommTimeoutError" in str(got[1])


def test_deadline_does_not_name_ranks_that_came():
    came = threading.Barrier(3)

    def program(comm):
        if comm.rank != 2:
            start = comm._transport.start
            # What all three have sent is there before one of them waits: else a slow one would be named as well.
            comm._transport.start = lambda *args: (start(*args), came.wait(10))[0]
            comm.barrier()

    got = errors_of(4, program, timeout=0.3)
    text = " ".join(str(e) for e in got)
    assert "for rank 2 (" in text and "rank 1 (host" not in text and "rank 3 (host" not in text


@pytest.mark.parametrize("n", [1, 2, 3])
def test_agree_without_error(n):
    def program(comm):
        with comm.host.agree("phase"):
            pass
        return comm.all_reduce(np.array(1))

    assert run_threads(n, program) == [n] * n


def test_agree_raises_the_lowest_ranks_error_everywhere():
    own = {}

    def program(comm):
        try:
            with comm.host.agree("loading"):
                if comm.rank in (1, 2):
                    own[comm.rank] = PromptTooLongError(f"too long on {comm.rank}", hint="shorten it")
                    raise own[comm.rank]
        except RequestError as error:
            # Nothing is broken: the ranks go on together.
            assert comm.all_reduce(np.array(1)) == 4
            return error

    got = run_threads(4, program, timeout=20)
    assert {str(e) for e in got} == {"rank 1: too long on 1 (shorten it)"}
    assert all(type(e) is PromptTooLongError and e.rank == 1 for e in got)
    assert got[1] is own[1] and got[2] is not own[2] and got[2].__cause__ is own[2]


@pytest.mark.parametrize("n", [1, 3])
def test_agree_on_the_same_error_names_no_rank(n):
    def program(comm):
        with comm.host.agree("checking"):
            raise ConfigError("tp=3 does not divide 8")

    assert all(isinstance(e, ConfigError) and e.rank is None for e in errors_of(n, program))


def test_another_exception_in_agree_is_raised_and_announced():
    def program(comm):
        with comm.host.agree("computing"):
            if comm.rank == 0:
                raise IndexError("a bug")
            if comm.rank == 1:
                raise CapacityError("an error for all")

    began = time.monotonic()
    got = errors_of(3, program)
    assert type(got[0]) is IndexError
    assert all(isinstance(e, PeerFailedError) and e.rank == 0 and "IndexError: a bug" in str(e) for e in got[1:])
    assert time.monotonic() - began < 10


def test_broken_communicator_in_agree_is_not_agreed_on():
    def program(comm):
        with comm.host.agree("talking"):
            if comm.rank == 0:
                comm.recv(1)

    got = errors_of(2, program, timeout=0.3)
    assert any(isinstance(e, CommTimeoutError) for e in got) and all(isinstance(e, CommError) for e in got)


def test_agree_in_different_phases_is_out_of_step():
    def program(comm):
        with comm.host.agree("prefill" if comm.rank else "decode"):
            pass

    with pytest.raises(CommError, match=r"agree\('decode'\).*agree\('prefill'\)|agree\('prefill'\).*agree\('decode'\)"):
        run_threads(2, program, timeout=20)


def test_close():
    comm = Communicator.single()
    part = comm.split(0)
    comm.close()
    comm.close()
    assert comm.closed and part.all_reduce(np.ones(1)) == 1
    for call in (
        lambda: comm.all_reduce(np.ones(1)), lambda: comm.all_gather(np.ones(1)), comm.barrier, lambda: comm.split(0),
        lambda: comm.host.broadcast_bytes(b""), lambda: comm.broadcast(np.ones(1)), lambda: comm.host.barrier(),
        lambda: comm.all_reduce_async(np.ones(1)), lambda: comm.reduce_scatter(np.ones(1)),
    ):
        with pytest.raises(ClosedError):
            call()


def test_leaving_the_with_block_by_an_exception_tells_the_peers():
    def program(comm):
        sub = comm.split(0)
        if comm.rank == 0:
            with pytest.raises(OSError), sub:
                raise OSError("disk full")
        else:
            sub.barrier()

    with pytest.raises(PeerFailedError, match="disk full"):
        run_threads(2, program, timeout=20)


def test_with_block_and_an_agreed_error():
    def program(comm):
        sub = comm.split(0)
        try:
            with sub, sub.host.agree("x"):
                if comm.rank == 1:
                    raise ConfigError("bad")
        except ConfigError:
            pass
        assert sub.closed
        comm.barrier()
        return "alive"

    assert run_threads(3, program, timeout=20) == ["alive"] * 3


def test_fail_on_one_rank_changes_nothing():
    comm = Communicator.single()
    comm.fail(KeyboardInterrupt())
    comm.barrier()


def test_abort_without_mpi_is_an_exit():
    with pytest.raises(SystemExit) as caught:
        Communicator.single().abort(7)
    assert caught.value.code == 7


def test_run_threads_results_arguments_and_restored_blas():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = [p["num_threads"] for p in threadpoolctl.threadpool_info()]
    assert run_threads(3, lambda comm, a, b: (comm.rank, comm.local_rank, comm.local_size, a + b), 1, 2) == [
        (r, r, 3, 3) for r in range(3)
    ]
    assert [p["num_threads"] for p in threadpoolctl.threadpool_info()] == before
    with pytest.raises(ConfigError):
        run_threads(0, print)


def test_run_threads_does_not_wait_for_a_rank_that_never_looks_up():
    stop = threading.Event()

    def program(comm):
        if comm.rank == 0:
            stop.wait(30)
        else:
            raise ValueError("early")

    began = time.monotonic()
    with pytest.raises(ValueError, match="early"):
        run_threads(2, program, timeout=0.5)
    stop.set()
    assert time.monotonic() - began < 10
