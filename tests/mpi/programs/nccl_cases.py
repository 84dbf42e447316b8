"""NCCL on real GPUs, one a rank; the first argument says what to do. Each rank prints what it saw."""

import json
import os
import signal
import sys
import time

import numpy as np

from cutp.array import cuda
from cutp.array.device import select_device
from cutp.array.graph import Stream, capture
from cutp.comm import Communicator, world
from tests.comm import device_cases

started = time.monotonic()


def say(comm, *words):
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


class Gpu:
    """What `tests.comm.device_cases` needs of a GPU."""

    def __init__(self):
        self.empty = cuda.cupy().empty

    @staticmethod
    def upload(host):
        return cuda.cupy().asarray(host)

    @staticmethod
    def download(x):
        return cuda.cupy().asnumpy(x)


def ones(n=1 << 20):
    return cuda.cupy().ones(n, np.float32)


def sum_and_wait(comm):
    total = comm.all_reduce(ones())
    comm.wait()
    assert float(total[-1]) == comm.size


def results(comm):
    digests = device_cases.run_all(comm, Gpu())
    reports = comm.host.gather_json(digests)
    if comm.rank == 0:
        print(json.dumps({"results": len(digests), "equal": all(other == digests for other in reports)}), flush=True)


def deadline(comm):
    """Rank 1 makes no second call; the others find out, and the job ends."""
    sum_and_wait(comm)
    if comm.rank == 1:
        time.sleep(2 * float(os.environ["CUTP_COMM_TIMEOUT"]) + 4)
    else:
        report(comm, lambda: sum_and_wait(comm))
        report(comm, lambda: sum_and_wait(comm))


def raises(comm):
    """Rank 1 raises while the GPUs of the others wait for it."""
    sum_and_wait(comm)
    if comm.rank == 1:
        time.sleep(0.5)
        raise ZeroDivisionError("a bug in rank 1")
    report(comm, lambda: sum_and_wait(comm))


def raises_in_a_graph(comm):
    """The same while a graph waits, which is then closed."""
    stream = Stream()
    with stream:
        x = ones()
        comm.all_reduce(x, out=x)
        comm.wait(stream)
    with capture(stream) as graph:
        comm.all_reduce(x, out=x)
    comm.barrier()
    if comm.rank == 1:
        raise ZeroDivisionError("a bug in rank 1")
    graph.launch()
    report(comm, lambda: comm.wait(stream))


def killed(comm):
    """Rank 1 is killed while the GPUs of the others wait for it."""
    sum_and_wait(comm)
    if comm.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    report(comm, lambda: sum_and_wait(comm))


def out_of_step(comm):
    sum_and_wait(comm)
    report(comm, lambda: comm.all_reduce(ones(100 + comm.rank)))


def setups(comm):
    """So many communicators made, used in a graph and closed, one after another: time and memory of each."""
    count = int(sys.argv[2])
    free = []
    began = time.monotonic()
    for _ in range(count):
        with comm.split(0) as part:
            stream = Stream()
            with stream:
                x = ones(1000)
                part.all_reduce(x, out=x)
                part.wait(stream)
            with capture(stream) as graph:
                part.all_reduce(x, out=x)
            with stream:
                graph.launch()
                part.wait(stream)
                assert float(x[0]) == part.size**2
        free.append(cuda.cupy().cuda.runtime.memGetInfo()[0])
    say(comm, json.dumps({"seconds": (time.monotonic() - began) / count, "lost": free[count // 4] - free[-1]}))


def left_open(comm):
    """Neither the communicator nor a graph that uses it is closed."""
    stream = Stream()
    with stream:
        x = ones()
        comm.all_reduce(x, out=x)
        comm.wait(stream)
    with capture(stream) as graph:
        comm.all_reduce(x, out=x)
    graph.launch()
    comm.wait(stream)
    globals()["kept"] = graph, x
    say(comm, "left")


def one_gpu(comm):
    """All ranks on GPU 0."""
    cuda.cupy().cuda.runtime.setDevice(0)

    def connect_and_sum():
        comm.connect_gpus()
        sum_and_wait(comm)

    report(comm, connect_and_sum)


CASES = {case.__name__: case for case in (
    results, deadline, raises, raises_in_a_graph, killed, out_of_step, setups, left_open, one_gpu)}

if __name__ == "__main__":
    case = CASES[sys.argv[1]]
    comm: Communicator = world()
    select_device("cuda", comm.local_rank)
    if case is left_open:
        case(comm)
    else:
        with comm:
            case(comm)
            say(comm, "done")
