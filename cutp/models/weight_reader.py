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
from cutp.nn.storage import Lane, Storage, storage

# Of one piece, as it is held. A read of this size runs at full speed, and there are two buffers a thread.
PIECE_BYTES = 16 << 20

# Makes rows (start, stop) of a weight's share; the result may lie in the buffer.
Read = Callable[[tuple[int, int], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fill:
    """A weight and what makes its rows: a few at a time, or all at once."""

    weight: Weight
    read: Read
    in_pieces: bool = True


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


def fill_weights(fills: Sequence[Fill], threads: int, progress: Callable[[int], None] | None = None) -> None:
    """Allocates every weight in the storage in use, and stores what is read for it.

    progress: called, in this thread, with the bytes of each piece in the dtype of its weight. The first error of any
    thread ends the others, and is raised.
    """
    tasks: deque[tuple[Fill, list[tuple[int, int]]]] = deque()
    size = PIECE_BYTES
    for fill in fills:
        fill.weight.allocate()
        data = fill.weight.data
        row = math.prod(data.shape[1:]) * data.dtype.itemsize
        size = max(size, row)
        pieces = list(fill.weight.pieces(max(1, PIECE_BYTES // max(1, row))))
        tasks.extend((fill, [piece]) for piece in pieces) if fill.in_pieces else tasks.append((fill, pieces))
    done: SimpleQueue[int | None] = SimpleQueue()
    threads = max(1, min(threads, len(tasks)))
    where = storage()
    where.ready()
    with ThreadPoolExecutor(threads, "cutp-load") as pool:
        workers = [pool.submit(_work, tasks, where, size, done) for _ in range(threads)]
        try:
            running = threads
            while running:
                count = done.get()
                if count is None:
                    running -= 1
                elif progress is not None:
                    progress(count)
        finally:
            tasks.clear()  # an error or an interrupt: the workers end with the piece they are at
    for worker in workers:
        worker.result()


def _work(tasks: deque[tuple[Fill, list[tuple[int, int]]]], where: Storage, size: int,
          done: SimpleQueue[int | None]) -> None:
    try:
        with closing(where.lane(size)) as lane:
            while tasks:
                try:
                    fill, pieces = tasks.popleft()
                except IndexError:  # another thread was faster
                    return
                _store(fill, pieces, lane, done)
    except BaseException:
        tasks.clear()
        raise
    finally:
        done.put(None)


def _store(fill: Fill, pieces: Sequence[tuple[int, int]], lane: Lane, done: SimpleQueue[int | None]) -> None:
    if not pieces:  # another rank has all of it
        return
    weight, first = fill.weight, pieces[0][0]
    host = weight.rounded(fill.read((first, pieces[-1][1]), lane.buffer()))
    for start, stop in pieces:
        part = host[start - first : stop - first]
        lane.put(weight.rows(start, stop), part)
        done.put(part.size * weight.dtype.itemsize)
