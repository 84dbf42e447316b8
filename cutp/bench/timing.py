"""Timing kernels on a GPU: inside a CUDA graph, on data that the cache does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from cutp.array import cuda
from cutp.array.graph import Stream, capture

# More than the L2 cache of any GPU cutp knows, so that a kernel finds its data in device memory.
CACHE_BYTES = 256 << 20


def copies_beyond_cache(bytes_touched: int) -> int:
    """How many copies of a kernel's data, used in turn, the cache cannot hold at once."""
    return max(2, min(64, -(-CACHE_BYTES // max(1, bytes_touched))))


def microseconds(calls: Sequence[Callable[[], object]], repeats: int = 5, least_launches: int = 20) -> float:
    """Median time of one of `calls`, each starting the same kernels on its own data, run one after another in a graph.

    The graph holds every call as often as makes `least_launches`; it is replayed once to warm up and then `repeats`
    times.
    """
    cupy = cuda.cupy()
    # What the calls work on was made on another stream, for which this one does not wait.
    cupy.cuda.runtime.deviceSynchronize()
    stream = Stream()
    rounds = max(1, -(-least_launches // len(calls)))
    with stream:
        for call in calls:
            call()
    stream.synchronize()
    with capture(stream) as graph:
        for _ in range(rounds):
            for call in calls:
                call()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(repeats + 1):
        start.record(stream.cupy)
        graph.launch()
        stop.record(stream.cupy)
        stream.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3 / (rounds * len(calls)))
    graph.close()
    return median(times[1:])
