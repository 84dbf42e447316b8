"""Copies of a model side by side: one communicator cut into tensor-parallel groups."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError

log = logging.getLogger("cutp")


@dataclass(frozen=True)
class Replicas:
    """The groups of `comm`, seen from one rank: it belongs to replica `index` of `count`, whose ranks are `group`.

    first_ranks: the rank in `comm` of each replica's first rank; that of replica 0 is 0.
    """

    comm: Communicator
    group: Communicator
    index: int
    count: int
    first_ranks: tuple[int, ...]

    def close(self) -> None:
        """Frees the group's communicator; `comm` stays open."""
        if self.group is not self.comm:
            self.group.close()


def split_replicas(comm: Communicator, tp: int | None = None) -> Replicas:
    """Groups of `tp` ranks (default: all); collective over `comm`.

    Ranks of one host stay together, so that a group crosses hosts only where `tp` does not divide the ranks of a host.
    Raises ConfigError when `tp` does not divide the number of ranks.
    """
    check_tensor_parallel(comm.size, tp)
    tp = comm.size if tp is None else tp
    if tp == comm.size:
        return Replicas(comm, comm, 0, 1, (0,))
    order = sorted(range(comm.size), key=lambda rank: (comm.hosts.index(comm.hosts[rank]), rank))
    groups = [order[i : i + tp] for i in range(0, len(order), tp)]
    index = next(i for i, ranks in enumerate(groups) if comm.rank in ranks)
    crossing = sum(len({comm.hosts[rank] for rank in ranks}) > 1 for ranks in groups)
    if crossing and comm.rank == 0 and len(set(comm.hosts)) < comm.size:
        log.warning("%d of %d tensor-parallel groups of %d ranks cross hosts; their all-reduces go over the network",
                    crossing, len(groups), tp)
    group = comm.split(index, groups[index].index(comm.rank))
    return Replicas(comm, group, index, len(groups), tuple(ranks[0] for ranks in groups))


def check_tensor_parallel(ranks: int, tp: int | None) -> None:
    """ConfigError naming the sizes that work, unless `ranks` ranks divide into groups of `tp`."""
    if tp is None:
        return
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1 or ranks % tp:
        divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
        raise ConfigError(f"tp={tp!r}, but there are {ranks} ranks, which do not divide into groups of that size",
                          hint=f"choose a tp of {', '.join(map(str, divisors))}, or start other ranks")


class Assignment:
    """Deals requests to replicas: each to the one with the least work before it, the first of equals.

    Every rank keeps the same account, so nobody has to be asked.
    """

    def __init__(self, count: int):
        self._work = [0] * count
        self._where: dict[object, tuple[int, int]] = {}

    def place(self, request: object, work: int) -> int:
        """The replica of `request`, which is at most `work` tokens long; `done` takes it off the account again."""
        replica = self._work.index(min(self._work))
        self._work[replica] += work
        self._where[request] = (replica, work)
        return replica

    def done(self, requests: Iterable[object]) -> None:
        for request in requests:
            if request in self._where:
                replica, work = self._where.pop(request)
                self._work[replica] -= work
