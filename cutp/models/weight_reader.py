"""Fills the weights of a model with several reads in flight, piece by piece, never more in memory than the pieces."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from cutp.nn.module import Weight
from cutp.nn.storage import Storage, storage

# Of one piece, as it is stored. A read of this size runs at full speed, and there are two buffers a thread.
PIECE_BYTES = 16 << 20

# Makes rows (start, stop) of a weight's share; the result may lie in the buffer.
Read = Callable[[Weight, tuple[int, int], np.ndarray], np.ndarray]
_Piece = tuple[Weight, Read, int, int]


@dataclass(frozen=True)
class LoadReport:
    """How the weights of one rank were read: bytes fetched from files, in so many seconds."""

    bytes: int
    seconds: float

    @property
    def gb_per_second(self) -> float:
        return self.bytes / 1e9 / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, float]:
        return {"bytes": self.bytes, "seconds": self.seconds, "gb_per_second": self.gb_per_second}


def fill_weights(reads: Sequence[tuple[Weight, Read]], threads: int,
                 progress: Callable[[int], None] | None = None) -> None:
    """Allocates every weight in the storage in use, and stores what its `Read` gives.

    progress: called, in this thread, with the bytes of each piece in the dtype of its weight. The first error of any
    thread ends the others, and is raised.
    """
    where = storage()
    pieces: deque[_Piece] = deque()
    size = PIECE_BYTES
    for weight, read in reads:
        weight.allocate()
        shape = weight.data.shape
        row = math.prod(shape[1:]) * max(weight.data.dtype.itemsize, weight.dtype.itemsize)
        size = max(size, row)
        pieces.extend((weight, read, *piece) for piece in weight.pieces(max(1, PIECE_BYTES // max(1, row))))
    done: SimpleQueue[int | None] = SimpleQueue()
    threads = max(1, min(threads, len(pieces)))
    with ThreadPoolExecutor(threads, "cutp-load") as pool:
        workers = [pool.submit(_work, pieces, where, size, done) for _ in range(threads)]
        try:
            running = threads
            while running:
                count = done.get()
                if count is None:
                    running -= 1
                elif progress is not None:
                    progress(count)
        finally:
            pieces.clear()  # an error or an interrupt: the workers end with the piece they are at
    for worker in workers:
        worker.result()


def _work(pieces: deque[_Piece], where: Storage, size: int, done: SimpleQueue[int | None]) -> None:
    try:
        with closing(where.lane(size)) as lane:
            while True:
                try:
                    weight, read, start, stop = pieces.popleft()
                except IndexError:
                    return
                host = weight.rounded(read(weight, (start, stop), lane.buffer()))
                lane.put(weight.rows(start, stop), host)
                done.put(host.size * weight.dtype.itemsize)
    except BaseException:
        pieces.clear()
        raise
    finally:
        done.put(None)
