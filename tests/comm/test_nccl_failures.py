"""What goes wrong with GPUs: who is told, how soon, and that nothing hangs. On the stand-in for CuPy and NCCL."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from cutp import run_threads
from cutp.array.graph import Stream, capture
from cutp.comm import nccl_link
from cutp.errors import (
    ClosedError,
    CommError,
    CommTimeoutError,
    ConfigError,
    DeviceError,
    DeviceMappingError,
    PeerFailedError,
)
from tests.comm.fake_nccl import fake_cupy

ROOT = Path(__file__).resolve().parents[2]
# A rank that hears of a failure, or comes to a deadline of half a second, is done within SOON, also on a machine that
# is busy for a while. What is not told, or has no deadline, comes to HANG, or never ends.
SOON, HANG = 10, 30


@pytest.fixture
def cupy(monkeypatch):
    monkeypatch.setattr(nccl_link, "_WARM_UP_SIZES", (2, 16))
    # What ends, ends at once, however busy the machine is; tests of what does not end set these themselves.
    monkeypatch.setattr(nccl_link, "_ABORT_SECONDS", HANG)
    monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", HANG)
    monkeypatch.setattr(nccl_link, "_links", weakref.WeakSet())  # none of another test's
    with fake_cupy(monkeypatch) as cupy:
        yield cupy


def outcomes(cupy, n, body, prepare=lambda gpu: None):
    """For each rank what body(comm, gpu) returned or raised, the seconds it took, and the rank's GPU."""
    got = [None] * n

    def on_rank(comm):
        with cupy.gpu(comm.rank) as gpu, comm:
            prepare(gpu)
            comm.barrier()
            began = time.monotonic()
            try:
                result = body(comm, gpu)
            except Exception as error:
                result = error
            got[comm.rank] = result, time.monotonic() - began, gpu
            if isinstance(result, Exception):
                raise result

    try:
        run_threads(n, on_rank, timeout=HANG)
    except Exception as error:
        assert any(error is result for result, _, _ in got), error
    return got


def sum_and_wait(comm, cupy, shape=4):
    total = comm.all_reduce(cupy.upload(np.ones(shape, np.float32)))
    comm.wait()
    return total


def on_first_exchange(cupy, act):
    """act(NCCL communicator) is called in the thread in which its rank begins the first exchange."""
    create = cupy.cuda.nccl.NcclCommunicator

    def created(*args):
        made = create(*args)
        made.allReduce = lambda *call: (act(made), type(made).allReduce(made, *call))
        return made

    cupy.cuda.nccl.NcclCommunicator = created


def call_the_roll_together(comm, met):
    """After a deadline the ranks that reach the barrier `met` have all been there before one of them counts."""
    start = comm._transport.start

    def started(call, *args):
        exchange = start(call, *args)
        if call.endswith(", late"):
            met.wait(SOON)
        return exchange

    comm._transport.start = started


def test_joining_names_the_missing_library(cupy):
    def prepare(gpu):
        gpu.missing = DeviceError("a GPU needs CuPy, which is not installed") if gpu.index == 1 else None

    for error, seconds, _ in outcomes(cupy, 3, lambda comm, gpu: comm.connect_gpus(), prepare):
        assert type(error) is DeviceError and error.rank == 1 and "not installed" in str(error) and seconds < SOON


def test_nccl_missing(cupy):
    cupy.cuda.nccl.available = False
    for error, _, _ in outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus()):
        assert isinstance(error, DeviceError) and "finds no NCCL" in str(error)


def test_two_ranks_on_one_gpu(cupy):
    def prepare(gpu):
        gpu.card = "GPU-same" if gpu.index else "GPU-0"

    for error, _, _ in outcomes(cupy, 3, lambda comm, gpu: comm.connect_gpus(), prepare):
        assert isinstance(error, DeviceMappingError)
        assert "rank 1 (host " in str(error) and "and rank 2 (host " in str(error) and "GPU-same" in str(error)
        assert "CUTP_SHARE_GPU=1" in error.hint


def test_ranks_that_may_share_a_gpu_seem_to_be_on_different_hosts(cupy, monkeypatch):
    monkeypatch.setenv("CUTP_SHARE_GPU", "1")
    monkeypatch.setenv("NCCL_HOSTID", "")  # so that what is set here ends with the test
    monkeypatch.delenv("NCCL_HOSTID")

    def share(gpu):
        gpu.card = "GPU-same"

    for result, _, _ in outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus()):
        assert result is None and "NCCL_HOSTID" not in os.environ
    for result, _, _ in outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus(), share):
        assert result is None
    assert os.environ["NCCL_HOSTID"].endswith((", rank 0", ", rank 1"))  # threads have one environment


def test_different_versions_of_nccl(cupy):
    def prepare(gpu):
        gpu.nccl_version = 23203 - (gpu.index == 2)

    for error, _, _ in outcomes(cupy, 3, lambda comm, gpu: comm.connect_gpus(), prepare):
        assert isinstance(error, ConfigError) and "23203" in str(error) and "23202" in str(error)


def test_no_id(cupy):
    def no_id():
        raise cupy.cuda.nccl.NcclError(2)

    cupy.cuda.nccl.get_unique_id = no_id
    for error, _, _ in outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus()):
        assert type(error) is CommError and "cannot make an id" in str(error) and "NCCL_SOCKET_IFNAME" in str(error)


def test_a_rank_that_cannot_connect(cupy):
    def prepare(gpu):
        gpu.refuse = "init" if gpu.index == 1 else None

    got = outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus(), prepare)
    assert isinstance(got[1][0], CommError)
    assert "connecting GPU 1 (Stand-in, GPU-1) of host" in str(got[1][0]) and "NCCL_ERROR_2" in str(got[1][0])
    # The other waits inside NCCL, from which the failure notice frees it.
    assert isinstance(got[0][0], PeerFailedError) and got[0][1] < SOON


def test_deadline_of_connecting(cupy):
    comms, create = {}, cupy.cuda.nccl.NcclCommunicator

    def connect(n, uid, rank):
        comms[rank]._transport.timeout = 0.5  # from here on: what comes before has time
        return cupy.released.wait(2 * HANG) if rank else create(n, uid, rank)  # rank 1 never gets to NCCL's own part

    def body(comm, gpu):
        comms[comm.rank] = comm
        comm.barrier()
        comm.connect_gpus()

    cupy.cuda.nccl.NcclCommunicator = connect
    got = outcomes(cupy, 2, body)
    assert any(isinstance(error, CommTimeoutError) and "connecting GPU" in str(error) for error, _, _ in got)
    assert all(isinstance(error, CommError) and seconds < SOON for error, seconds, _ in got)
    assert max(seconds for _, seconds, _ in got) > 0.4


def test_deadline_of_the_first_exchange_aborts(cupy):
    comms, begun = {}, threading.Event()

    def act(made):
        if made.rank == 0:
            begun.set()
            return
        assert begun.wait(SOON)
        for comm in comms.values():  # both ranks are in the first exchange
            comm._transport.timeout = 0.5
        cupy.released.wait(2 * HANG)

    def body(comm, gpu):
        comms[comm.rank] = comm
        comm.barrier()
        comm.connect_gpus()

    on_first_exchange(cupy, act)
    got = outcomes(cupy, 2, body)
    assert any("a first exchange" in str(error) for error, _, _ in got)
    for error, seconds, gpu in got:
        assert isinstance(error, CommError) and seconds < SOON and "abort" in gpu.log and "destroy" not in gpu.log


def test_a_peer_that_fails_in_the_first_exchange(cupy):
    begun = threading.Event()  # by rank 0: it could still be connecting when rank 1 is refused

    def prepare(gpu):
        gpu.refuse = "call" if gpu.index == 1 else None

    on_first_exchange(cupy, lambda made: begun.wait(SOON) if made.rank else begun.set())
    for error, seconds, gpu in outcomes(cupy, 2, lambda comm, gpu: comm.connect_gpus(), prepare):
        assert isinstance(error, CommError) and "a first exchange" in str(error) and "NCCL_ERROR_5" in str(error)
        assert seconds < SOON and gpu.log.count("abort") == 1


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


# The end


def test_closing_in_order_twice(cupy):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        stream = Stream()
        with stream:
            comm.all_reduce(x, out=x)
        with capture(stream) as graph:
            comm.all_reduce(x, out=x)
        with stream:
            graph.launch()
            comm.all_reduce(x, out=x)
        close = graph.close
        graph.close = lambda: (gpu.log.append("graph"), close())
        gpu.log.clear()
        comm.close()
        comm.close()
        assert cupy.download(x).tolist() == [8.0] * 4, "what was started had not ended"
        with pytest.raises(ClosedError):
            comm.all_reduce(x)
        with pytest.raises(ClosedError):
            comm.wait()
        return gpu.log, graph._executable

    for result, _, _ in outcomes(cupy, 2, body):
        assert result == (["graph", "synchronize", "destroy"], None)


def test_a_graph_that_was_given_up_before_is_not_touched(cupy):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        comm.all_reduce(x, out=x)
        with capture(Stream()) as graph:
            comm.all_reduce(x, out=x)
        graph.close()
        link = comm._collectives._link
        assert list(link._graphs) == [graph]
        del graph
        gc.collect()
        assert list(link._graphs) == []
        return True

    assert all(result is True for result, _, _ in outcomes(cupy, 2, body))


def test_closing_with_work_that_never_ends(cupy, monkeypatch):
    left = threading.Event()  # by rank 1, whose work ends: it has time

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 0:
            comm.all_reduce(cupy.upload(np.ones(4, np.float32)))  # rank 1 does not
            assert left.wait(SOON)
            monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", 0.3)
        comm.close()
        left.set()
        return gpu.log

    logs = [result for result, seconds, _ in outcomes(cupy, 2, body) if seconds < SOON]
    assert [log[-1] for log in logs] == ["abort", "destroy"] and "destroy" not in logs[0]


def test_closing_when_destroying_hangs(cupy, caplog, monkeypatch):
    monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", 0.3)

    def prepare(gpu):
        gpu.hangs = {"destroy"}

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        link = comm._collectives._link
        assert link._has_ended(SOON)
        link._has_ended = lambda limit: True  # a busy machine may need longer to find that out
        comm.close()
        return "closed"

    for result, seconds, _ in outcomes(cupy, 2, body, prepare):
        assert result == "closed" and seconds < SOON
    assert "could not be destroyed within 0.3 s on GPU" in caplog.text


def test_many_communicators_one_after_another(cupy):
    def body(comm, gpu):
        for _ in range(20):
            with comm.split(0) as part:
                sum_and_wait(part, cupy)
        comm.barrier()
        return [c.destroyed for c in gpu.comms], len(nccl_link._links)

    for result, _, _ in outcomes(cupy, 2, body):
        assert result == ([True] * 20, 0)


AT_EXIT = """
import sys, threading
import numpy as np, pytest
from cutp.comm import nccl_link
from cutp.comm.communicator import Communicator
from cutp.comm.threads import _Group, ThreadTransport
from tests.comm.fake_nccl import fake_cupy
nccl_link._ABORT_SECONDS = 1.0 if {"late", "hang"} & set(sys.argv) else 20.0
nccl_link._WARM_UP_SIZES = (2, 16)
hold = []
group = _Group(2)
patch = pytest.MonkeyPatch()
context = fake_cupy(patch)
cupy = context.__enter__()
def rank(r):
    comm = Communicator(ThreadTransport(group, r, 120.0))
    hold.append(comm)
    with cupy.gpu(r) as gpu:
        if "hang" in sys.argv:
            gpu.hangs = {"abort", "destroy"}
        comm.all_reduce(cupy.upload(np.ones(3)))
        comm.wait()
        if r == 0 and "late" in sys.argv:
            comm.all_reduce(cupy.upload(np.ones(3)))
each = [threading.Thread(target=rank, args=(r,)) for r in (0, 1)]
[t.start() for t in each]
[t.join() for t in each]
import atexit
print("left", flush=True)
if "no_threads" in sys.argv:
    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")
    threading.Thread.start = refuse
# Called after what was registered later, which is cutp's own.
atexit.unregister(nccl_link._leave_at_exit)
atexit.register(lambda: print(sorted({e for g in cupy.gpus.values() for e in g.log} - {"synchronize"}), flush=True))
atexit.register(nccl_link._leave_at_exit)
"""


@pytest.mark.parametrize("case", ["well", "late", "hang", "no_threads"])
def test_a_communicator_that_is_left_open_does_not_hang_at_exit(case, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(AT_EXIT)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, program, case], capture_output=True, text=True, timeout=30, env=env,
                          check=False)
    assert done.returncode == 0 and done.stderr.count("Traceback") == 0, done.stderr
    left = "['abort', 'destroy']" if case == "late" else "['destroy']"
    assert done.stdout.splitlines() == ["left", left], done.stdout
