"""Which replica gets how much work, and which records: the longest first, a window of the input at a time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cutp.batch.records import Record

# Records of one window, and the bytes of text after which a window ends early.
WINDOW_RECORDS = 2048
WINDOW_COST = 16 << 20
# Records a replica has beside those that run, at least and at most, so that it need not wait for the next meeting.
LEAST_BACKLOG, MOST_BACKLOG = 32, 1024
# Seconds between two meetings: short at first, because the first guess of the work may be wrong.
SHORTEST, LONGEST = 0.1, 2.0


def plan(slots: int, finished: int, between: float) -> tuple[int, float]:
    """(how many records a replica is to have until the next meeting, seconds until then).

    slots: requests that run at once. finished: what the fastest replica has finished since the last meeting, `between`
    seconds ago. A replica has what runs and twice what one finishes in the time: more would only be missing elsewhere
    at the end. Where that is too much to hold, meetings come more often.
    """
    rate = finished / between if between else 0.0
    after = min(max(2 * between, SHORTEST), LONGEST)
    if 2 * rate * after > MOST_BACKLOG:
        after = max(SHORTEST, MOST_BACKLOG / (2 * rate))
    return slots + min(max(LEAST_BACKLOG, round(2 * rate * after)), MOST_BACKLOG), after


def shares(available: int, outstanding: Sequence[int], target: int) -> list[int]:
    """How many of `available` records each replica gets, so that all come as close to `target` as they evenly can.

    outstanding: records each replica still has. A pure function: every rank computes the same. Where records are few,
    they go to those with the least, the first of equals first.
    """
    left = min(available, sum(max(0, target - count) for count in outstanding))
    # Raise all to the highest level that the records reach, then give out the rest one each.
    low, high = 0, target
    while low < high:
        middle = (low + high + 1) // 2
        if sum(max(0, middle - count) for count in outstanding) <= left:
            low = middle
        else:
            high = middle - 1
    counts = [max(0, low - count) for count in outstanding]
    left -= sum(counts)
    for index, count in enumerate(outstanding):
        if left and count + counts[index] == low:
            counts[index] += 1
            left -= 1
    return counts


def deal(records: Sequence[Record], counts: Sequence[int]) -> list[list[Record]]:
    """sum(counts) records, in their order, to replicas with that many places, each to the one with the least cost."""
    hands: list[list[Record]] = [[] for _ in counts]
    waiting = [(0, index) for index, count in enumerate(counts) if count]
    for record in records:
        cost, index = heapq.heappop(waiting)
        hands[index].append(record)
        if len(hands[index]) < counts[index]:
            heapq.heappush(waiting, (cost + record.cost, index))
    return hands


@dataclass
class Window:
    """Records read ahead on rank 0: one stretch of the input after the other, each with its longest records first."""

    source: Iterator[Record]
    _held: list[Record] = field(default_factory=list)
    exhausted: bool = False

    def available(self, wanted: int) -> int:
        """How many records are at hand, at least `wanted` unless the input ends."""
        while len(self._held) < wanted and not self.exhausted:
            self._read()
        return len(self._held)

    def take(self, count: int) -> list[Record]:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _read(self) -> None:
        stretch: list[Record] = []
        cost = 0
        while len(stretch) < WINDOW_RECORDS and cost < WINDOW_COST:
            record = next(self.source, None)
            if record is None:
                self.exhausted = True
                break
            stretch.append(record)
            cost += record.cost
        self._held += sorted(stretch, key=lambda record: (-record.cost, record.index))
