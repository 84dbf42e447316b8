"""Ranks that are threads with a stand-in for CuPy and NCCL, and what came of them."""

import time

import numpy as np

from cutp import run_threads

# A rank that hears of a failure, or comes to a deadline of half a second, is done within SOON, also on a machine that
# is busy for a while. What is not told, or has no deadline, comes to HANG, or never ends.
SOON, HANG = 10, 30


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
