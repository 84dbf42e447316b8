"""What goes wrong with connected GPUs: who is told, how soon, and that nothing hangs."""

import threading

import numpy as np
import pytest

from cutp.comm import nccl_link
from cutp.errors import CommError, CommTimeoutError, DeviceError, PeerFailedError
from tests.comm.nccl_ranks import HANG, SOON, outcomes, sum_and_wait


def call_the_roll_together(comm, met):
    """After a deadline the ranks that reach the barrier `met` have all been there before one of them counts."""
    start = comm._transport.start

    def started(call, *args):
        exchange = start(call, *args)
        if call.endswith(", late"):
            met.wait(SOON)
        return exchange

    comm._transport.start = started


def test_deadline_on_the_gpu_names_the_missing_rank(cupy, monkeypatch):
    monkeypatch.setattr(nccl_link, "_ROLL_CALL_SECONDS", 0.2)
    waiting, over = threading.Barrier(2), threading.Barrier(3)

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 1:
            over.wait(2 * HANG)  # neither a call nor a failure
            return None
        comm._transport.timeout = 0.5
        call_the_roll_together(comm, waiting)
        try:
            return sum_and_wait(comm, cupy)
        finally:
            over.wait(HANG)
            assert comm._transport.timeout == 0.5

    got = outcomes(cupy, 3, body)
    assert got[1][0] is None
    for rank in (0, 2):
        error, seconds, gpu = got[rank]
        assert isinstance(error, CommError) and 0.5 < seconds < SOON
        assert gpu.log.count("abort") == 1 and "destroy" not in gpu.log
    late = [error for error, _, _ in got if isinstance(error, CommTimeoutError)]
    assert late
    for error in late:
        text = str(error)
        assert "all_reduce(float32[4]) did not end on GPU" in text and "within 0.5 s" in text, text
        assert "for rank 1 (host" in text and "and rank" not in text and "CUTP_COMM_TIMEOUT" in text, text


def test_deadline_with_all_ranks_there(cupy):
    waiting = threading.Barrier(2)

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        # A call that NCCL gets from no peer: the stand-in's ranks wait for each other's third call.
        link = comm._collectives._link
        if comm.rank == 0:
            link._comm._numbers = iter(range(100, 200))
        comm._transport.timeout = 0.5
        call_the_roll_together(comm, waiting)
        return sum_and_wait(comm, cupy)

    errors = [error for error, _, _ in outcomes(cupy, 2, body)]
    assert all(isinstance(error, CommError) for error in errors)
    assert any("all ranks wait: their calls do not match" in str(error) for error in errors), errors


@pytest.mark.parametrize("status", [3, 6])
def test_errors_of_nccl_itself(cupy, status):
    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        comm.barrier()
        if comm.rank == 0:
            gpu.comms[0].async_error = status
        errors = []
        while len(errors) < 2:
            try:
                sum_and_wait(comm, cupy)
            except CommError as error:
                errors.append(error)
        raise errors[-1]

    got = outcomes(cupy, 2, body)
    assert "NCCL failed on GPU 0 (Stand-in, GPU-0) of host" in str(got[0][0])
    assert f"NCCL_ERROR_{status}" in str(got[0][0])
    assert isinstance(got[1][0], PeerFailedError) and "NCCL failed on GPU 0" in str(got[1][0])
    assert all(seconds < SOON and gpu.log.count("abort") == 1 for _, seconds, gpu in got)


@pytest.mark.parametrize("stuck", [True, False])
def test_an_error_of_nccl_is_seen_while_waiting_and_after(cupy, stuck):
    seen = threading.Event()

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 1:
            assert seen.wait(SOON), "rank 0 saw nothing while this rank was there"
            return None
        if stuck:
            comm.all_reduce(cupy.upload(np.ones(4, np.float32)))
        gpu.comms[0].async_error = 6
        with pytest.raises(CommError, match="NCCL failed on GPU 0"):
            comm.wait()
        seen.set()
        assert gpu.comms[0].aborted, "before the communicator is closed"
        return "seen"

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == ["seen", None]


@pytest.mark.parametrize("waiting", [True, False])
def test_a_failure_of_a_peer_aborts_at_once(cupy, waiting):
    begun = threading.Event()  # by rank 0: else it could hear of the failure before it does what is tested
    query = cupy.cuda.runtime.eventQuery

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 1:
            assert begun.wait(SOON)
            comm.fail(ValueError("no more"))
            return None
        me = threading.get_ident()
        if waiting:
            comm._collectives._link._streams[gpu.calls[-1]].do(lambda: cupy.released.wait(HANG))
            cupy.cuda.runtime.eventQuery = lambda event: (
                begun.set() if threading.get_ident() == me else None, query(event))[1]
        with pytest.raises(PeerFailedError):
            if waiting:
                comm.wait()
            while not waiting:
                comm.all_reduce(cupy.upload(np.ones(4, np.float32)))
                begun.set()
        assert gpu.comms[0].aborted
        return "aborted"

    assert outcomes(cupy, 2, body)[0][0] == "aborted"


def test_an_operation_in_progress_is_no_error(cupy):
    def body(comm, gpu):
        comm.connect_gpus()
        gpu.comms[0].async_error = 7
        return cupy.download(sum_and_wait(comm, cupy)).tolist()

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == [[2.0] * 4] * 2


def test_a_refused_call(cupy):
    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        gpu.refuse = "call" if comm.rank == 1 else None
        return sum_and_wait(comm, cupy)

    got = outcomes(cupy, 2, body)
    assert "all_reduce(float32[4]) was refused by NCCL on GPU 1" in str(got[1][0]) and "NCCL_ERROR_5" in str(got[1][0])
    assert isinstance(got[0][0], PeerFailedError) and got[0][1] < SOON
    assert all("abort" in gpu.log for _, _, gpu in got)


def test_a_peer_that_raises_frees_those_that_wait_for_its_gpu(cupy):
    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 1:
            raise ZeroDivisionError("a bug in rank 1")
        return sum_and_wait(comm, cupy)

    got = outcomes(cupy, 3, body)
    for rank in (0, 2):
        error, seconds, gpu = got[rank]
        assert isinstance(error, PeerFailedError) and "a bug in rank 1" in str(error) and seconds < SOON
        assert gpu.log[-1] == "abort" or "abort" in gpu.log
    assert "abort" in got[1][2].log and "destroy" not in got[1][2].log


def test_an_abort_that_hangs_holds_nobody_up(cupy, monkeypatch):
    monkeypatch.setattr(nccl_link, "_ABORT_SECONDS", 0.3)

    def prepare(gpu):
        gpu.hangs = {"abort"}

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 1:
            raise ZeroDivisionError
        return sum_and_wait(comm, cupy)

    for error, seconds, _ in outcomes(cupy, 2, body, prepare):
        assert isinstance(error, (PeerFailedError, ZeroDivisionError)) and seconds < SOON


def test_a_broken_kernel(cupy):
    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        list(gpu.streams.values())[0].error = 700
        with pytest.raises(DeviceError, match=r"a kernel or copy on GPU \d .* failed: cudaError 700"):
            comm.wait()
        return "raised"

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == ["raised"] * 2


def test_ranks_out_of_step_are_told(cupy):
    def body(comm, gpu):
        return sum_and_wait(comm, cupy, shape=4 + comm.rank)

    for error, seconds, _ in outcomes(cupy, 2, body):
        assert isinstance(error, CommError) and seconds < SOON
        assert "all_reduce(float32[4]) on GPUs" in str(error) and "all_reduce(float32[5]) on GPUs" in str(error)


def test_a_call_is_checked_once(cupy):
    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        before = comm._transport._sequence
        for _ in range(3):
            sum_and_wait(comm, cupy)
        same = comm._transport._sequence - before
        comm.all_reduce_async(cupy.upload(np.ones(4, np.float32))).wait()
        sum_and_wait(comm, cupy, shape=5)
        return same, comm._transport._sequence - before

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == [(0, 1)] * 2


def test_waiting_for_an_event_only(cupy):
    def body(comm, gpu):
        comm.connect_gpus()
        total = comm.all_reduce(cupy.upload(np.ones(4, np.float32)))
        event = cupy.cuda.Event(disable_timing=True)
        event.record(cupy.cuda.get_current_stream())
        if comm.rank == 0:
            comm.all_reduce(cupy.upload(np.ones(4, np.float32)))  # which the other rank does not join yet
        comm.wait(event)
        seen = total.view(np.ndarray).tolist()
        comm.barrier()
        if comm.rank == 1:
            comm.all_reduce(cupy.upload(np.ones(4, np.float32)))
        comm.wait()
        return seen

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == [[2.0] * 4] * 2


def test_waiting_for_a_gpu_that_has_no_peers_yet(cupy):
    def body(comm, gpu):
        if comm.rank == 0:
            comm.wait()  # not collective
        return len(gpu.comms)

    assert [result for result, _, _ in outcomes(cupy, 2, body)] == [0, 0]


