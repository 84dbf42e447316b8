"""What goes wrong while ranks connect their GPUs: who is told, how soon, and that nothing hangs."""

import os
import threading

from cutp.errors import CommError, CommTimeoutError, ConfigError, DeviceError, DeviceMappingError, PeerFailedError
from tests.comm.nccl_ranks import HANG, SOON, outcomes


def on_first_exchange(cupy, act):
    """act(NCCL communicator) is called in the thread in which its rank begins the first exchange."""
    create = cupy.cuda.nccl.NcclCommunicator

    def created(*args):
        made = create(*args)
        made.allReduce = lambda *call: (act(made), type(made).allReduce(made, *call))
        return made

    cupy.cuda.nccl.NcclCommunicator = created


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


