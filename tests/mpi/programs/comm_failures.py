"""Situations in which something goes wrong; the first argument says which. Each rank prints what it saw."""

import gc
import os
import sys
import time

import numpy as np
from mpi4py import MPI

from cutp.comm import Communicator, as_communicator, world
from cutp.errors import ConfigError

started = time.monotonic()


def say(comm, *words):
    # One write per line, so that the ranks' lines do not mix.
    sys.stdout.write(f"[{comm.rank}] {time.monotonic() - started:.2f} {' '.join(map(str, words))}\n")
    sys.stdout.flush()


def report(comm, fn):
    began = time.monotonic()
    try:
        fn()
    except Exception as error:
        say(comm, f"waited {time.monotonic() - began:.2f} {type(error).__name__} {error}")
    else:
        say(comm, "fine")


def until_the_others_are_done(comm):
    """Waits without a call of MPI's, with which this rank could take part in something after all."""
    end = time.monotonic() + 30
    while len(os.listdir(os.environ["OVER"])) < comm.size - 1 and time.monotonic() < end:
        time.sleep(0.01)


def done(comm):
    open(os.path.join(os.environ["OVER"], str(comm.rank)), "x").close()


def deadline(comm):
    """Rank 1 does not come; the others find out, and the job ends."""
    if comm.rank == 1:
        until_the_others_are_done(comm)
    else:
        report(comm, lambda: comm.all_reduce(np.ones(int(sys.argv[2]), np.float32)))
        report(comm, comm.barrier)
        done(comm)


def deadline_of_construction(comm):
    """Only rank 0 passes the communicator on."""
    if comm.rank == 0:
        report(comm, lambda: Communicator.from_mpi(MPI.COMM_WORLD))
        done(comm)
    else:
        until_the_others_are_done(comm)


def fail(comm):
    """Rank 1 fails while the others wait, in the communicator itself and in one split off."""
    part = comm.split(0)
    pair = comm.split(0 if comm.rank in (0, 2) else None)
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.5)
        comm.fail(ValueError("no more"))
        report(comm, comm.barrier)
    elif comm.rank == 0:
        report(comm, lambda: pair.recv(1) if pair.size > 1 else part.recv(1))
        report(comm, comm.barrier)
    else:
        report(comm, lambda: comm.all_reduce_async(np.ones(1_000_000)).wait())
        report(comm, part.barrier)
    part.close()
    comm.close()


def exception_in_agree(comm):
    with comm.host.agree("loading"):
        if comm.rank == 1:
            raise ZeroDivisionError("a bug in rank 1")


def agree(comm):
    def body():
        with comm.host.agree("loading"):
            if comm.rank > 0:
                raise ConfigError(f"bad value on {comm.rank}")

    for _ in range(3):
        report(comm, body)
    say(comm, "sum", comm.all_reduce(np.array(1)))


def mismatch(comm):
    calls = {
        "kind": (lambda: comm.all_reduce(np.ones(10)), comm.barrier),
        "small-large": (lambda: comm.all_reduce(np.ones(10)), lambda: comm.all_reduce(np.ones(1_000_000))),
        "large": (lambda: comm.all_reduce(np.ones(999_999)), lambda: comm.all_reduce(np.ones(1_000_000))),
        "host": (lambda: comm.host.all_gather_json([1]), lambda: comm.all_gather(np.ones((500_000, 2)))),
        "send": (lambda: comm.send(np.ones(1_000_000), 1), lambda: comm.host.recv_bytes(0)),
    }[sys.argv[2]]
    report(comm, calls[min(comm.rank, 1)])
    report(comm, comm.barrier)


def user_communicator(comm):
    """What cutp is given stays usable, and what is sent on it does not get mixed up with cutp's messages."""
    mine = MPI.COMM_WORLD.Split(0, -comm.rank)
    mine.Isend([np.zeros(1, np.uint8), MPI.BYTE], (mine.rank + 1) % mine.size, 2).Wait()
    for _ in range(50):
        ours, owned = as_communicator(mine)
        assert owned and ours.rank == mine.rank and ours.all_reduce(np.array(ours.rank)) == sum(range(ours.size))
        ours.close()
        ours.close()
    got = np.ones(1, np.uint8)
    mine.Recv([got, MPI.BYTE], (mine.rank - 1) % mine.size, 2)
    total = np.zeros(1, "i8")
    mine.Allreduce(np.ones(1, "i8"), total)
    part = mine.Split(0 if mine.rank == 0 else MPI.UNDEFINED)
    try:
        alone, _ = as_communicator(part)
        say(comm, "alone", alone.size)
    except ConfigError as error:
        say(comm, "null", error)
    mine.Free()
    say(comm, "total", total[0], got[0])


def busy_elsewhere(comm):
    """A sub-communicator works while the other ranks do something that cutp does not know of."""
    part = comm.split(0 if comm.rank < 2 else None)
    if part is not None:
        for i in range(200):
            assert part.all_reduce(np.full(5000, i)).sum() == 2 * i * 5000
        say(comm, "worked")
        MPI.COMM_WORLD.Send([b"done", MPI.BYTE], 2, 9) if comm.rank == 0 else None
    elif comm.rank == 2:
        buffer = bytearray(4)
        MPI.COMM_WORLD.Recv([buffer, MPI.BYTE], 0, 9)
        say(comm, buffer.decode())
    comm.barrier()


def many_calls(comm):
    """The tags of the sequence are used again without mixing messages up; pending handles are allowed."""
    comm._transport._sequence_tags = 7
    for i in range(300):
        handles = [comm.all_reduce_async(np.full(n, i + n)) for n in (1, 3, 20_000)]
        assert [h.wait()[0] for h in handles] == [comm.size * (i + n) for n in (1, 3, 20_000)]
    say(comm, "many")


def chunks(comm):
    """Messages longer than one MPI message may be."""
    from cutp.comm import mpi_exchange

    mpi_exchange.BODY_BYTES = 100_001
    x = np.random.default_rng(comm.rank).standard_normal(70_000)
    want = sum(np.random.default_rng(r).standard_normal(70_000) for r in range(1, comm.size))
    want = np.random.default_rng(0).standard_normal(70_000) + want if comm.size == 2 else want
    assert comm.all_reduce(x).tobytes() == want.tobytes()
    assert len(comm.host.broadcast_bytes(bytes(1_000_000))) == 1_000_000
    say(comm, "chunks")


def interrupted(comm):
    """A rank that leaves a `with` block by an exception takes the others along, without any agree()."""
    with comm:
        if comm.rank == 1:
            raise KeyError("left")
        comm.barrier()


def dropped_handles(comm):
    """Operations that were started but not waited for must keep their buffers, also after an error."""
    for _ in range(20):
        comm.all_reduce_async(np.ones(40_000))
        comm.all_reduce_async(np.ones(3))
    gc.collect()
    others = [np.full(n, 7.0) for n in (2560, 20_000) for _ in range(100)]
    comm.barrier()
    assert all((x == 7).all() for x in others)
    comm.close()
    say(comm, "dropped")


def aborted(comm):
    if comm.rank == 1:
        comm.abort(3)
    comm.barrier()


def blas_share(comm):
    import threadpoolctl

    say(comm, "share", [p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"])


globals()[sys.argv[1]](world())
