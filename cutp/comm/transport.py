"""What a backend must provide: arrays exchanged between ranks, with deadlines and failure notices.

Every collective and every host message is built from one primitive, `Transport.start`: send some arrays to
some peers and receive one array from each of some others. A message carries its dtype, its shape and the
*call* it belongs to (for example "all_reduce(float32[2, 8])"); a receiver compares the call with its own, so
ranks that got out of step are told so instead of exchanging the wrong data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import numpy as np

from cutp.errors import ClosedError, CommError, CommTimeoutError, ConfigError, CutpError, PeerFailedError

POINT_TO_POINT = -1
"""The tag of `send` and `recv`, which are ordered per pair of ranks and not part of the collective sequence."""

_FAILURE_TEXT_LIMIT = 2000


class Exchange(Protocol):
    """An exchange under way."""

    def wait(self) -> dict[int, np.ndarray]:
        """The array received from each source. Returns once the sent arrays may be changed again."""


class Transport(ABC):
    """One rank's end of a communicator.

    `hosts[r]` is the host name of rank r; `world_ranks[r]` is the rank that r has in the communicator from
    which this one was split (in the end): the number that a user sees in the launcher.
    """

    def __init__(
        self, rank: int, hosts: Sequence[str], timeout: float, *,
        local_rank: int, local_size: int, parent: Transport | None = None, world_ranks: Sequence[int] | None = None,
    ):
        self.rank = rank
        self.size = len(hosts)
        self.hosts = tuple(hosts)
        self.timeout = timeout
        self.local_rank = local_rank
        self.local_size = local_size
        self.parent = parent
        self.world_ranks = tuple(world_ranks) if world_ranks is not None else tuple(range(self.size))
        self.peers = tuple(r for r in range(self.size) if r != rank)
        self.closed = False
        self._sequence = 0
        # Why this communicator can no longer be used, if the reason arose on this rank.
        self._own_failure: CutpError | None = None

    # -- the primitive ---------------------------------------------------------------------------------

    @abstractmethod
    def start(
        self, call: str, tag: int, outgoing: Mapping[int, np.ndarray], sources: Sequence[int],
        into: Mapping[int, np.ndarray] | None = None,
    ) -> Exchange:
        """Start sending `outgoing[dest]` to each dest and receiving one array from each of `sources`.

        Outgoing arrays must be C-contiguous and stay unchanged until `wait` returns. An array received from a
        rank named in `into` is stored there if it has the dtype and shape of that buffer (C-contiguous).
        Received arrays may be shared with other ranks when they are marked read-only.
        """

    def exchange(
        self, call: str, tag: int, outgoing: Mapping[int, np.ndarray], sources: Sequence[int],
        into: Mapping[int, np.ndarray] | None = None,
    ) -> dict[int, np.ndarray]:
        return self.start(call, tag, outgoing, sources, into).wait()

    def next_tag(self) -> int:
        """The place of the next collective call in the sequence that all ranks follow."""
        self.check_usable()
        self._sequence += 1
        return self._sequence - 1

    @contextmanager
    def without_deadline(self) -> Iterator[None]:
        """Within the block this rank waits for others as long as it takes; their failures still reach it."""
        limit, self.timeout = self.timeout, math.inf
        try:
            yield
        finally:
            self.timeout = limit

    def check_peer(self, peer: int, what: str, *, may_be_self: bool = False) -> int:
        if not isinstance(peer, (int, np.integer)) or not 0 <= peer < self.size:
            raise ConfigError(f"{what} {peer!r} is not a rank of this communicator of {self.size}")
        if peer == self.rank and not may_be_self:
            raise ConfigError(f"{what} {peer} is this rank itself")
        return int(peer)

    # -- life ------------------------------------------------------------------------------------------

    @abstractmethod
    def split(self, colors: Sequence[int | None], members: Sequence[int], call_index: int) -> Transport:
        """The transport among `members` (ranks of this one in their new order), of which this rank is one.

        Called by all members at the same place of the sequence, `call_index`; `colors` are those of all ranks.
        """

    @abstractmethod
    def release(self) -> None:
        """Give back what this transport allocated; called once."""

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End the whole job with exit status `code`."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.release()

    # -- failure ---------------------------------------------------------------------------------------

    @abstractmethod
    def announce(self, record: dict[str, Any]) -> None:
        """Pass the failure `record` to all peers, without waiting for them."""

    @abstractmethod
    def known_failure(self) -> dict[str, Any] | None:
        """The failure record of a peer, here or in a communicator this one was split from, if one has arrived."""

    @property
    def failed(self) -> bool:
        return self._own_failure is not None or self.known_failure() is not None

    def check_usable(self) -> None:
        """Raise ClosedError after close, and the reason again after a failure."""
        if self.closed:
            raise ClosedError("this communicator was closed")
        if self._own_failure is not None:
            raise CutpError.from_dict(self._own_failure.to_dict())
        self.check_peers()

    def check_peers(self) -> None:
        """Raise PeerFailedError if a peer has announced that it failed."""
        record = self.known_failure()
        if record is not None:
            raise self.peer_failed(record)

    def fail(self, error: BaseException) -> None:
        """Tell all peers that this rank cannot go on because of `error`. The first call counts.

        Without peers there is nobody who could be left waiting, and the communicator stays usable.
        """
        if self.closed or self._own_failure is not None or self.size == 1:
            return
        text = f"{type(error).__name__}: {error}".removesuffix(": ")[:_FAILURE_TEXT_LIMIT]
        self._own_failure = CommError(f"this rank has reported that it failed: {text}", rank=self.rank)
        # A peer's failure came from that peer, which has told everybody itself.
        if not (isinstance(error, PeerFailedError) and self.known_failure() is not None):
            self.announce({
                "rank": self.rank, "world_rank": self.world_ranks[self.rank],
                "host": self.hosts[self.rank], "text": text,
            })

    def give_up(self, error: CommError) -> NoReturn:
        """Raise `error`, after which this communicator is unusable, here and on the peers."""
        self.fail(error)
        self._own_failure = error
        raise error

    def peer_failed(self, record: dict[str, Any]) -> PeerFailedError:
        world_rank = record["world_rank"]
        rank = self.world_ranks.index(world_rank) if world_rank in self.world_ranks else None
        who = "" if rank == world_rank else f"world rank {world_rank} "
        return PeerFailedError(f"{who}failed on host {record['host']}: {record['text']}", rank=rank)

    def timed_out(self, call: str, waited: float, missing: Sequence[int]) -> CommTimeoutError:
        return CommTimeoutError(
            f"{call} waited {waited:.1f} s for {self.names(missing)}", rank=self.rank,
            hint="it may have died, be stuck, or never make this call; CUTP_COMM_TIMEOUT sets the limit in seconds",
        )

    def out_of_step(self, call: str, peer: int, peer_call: str) -> CommError:
        return CommError(
            f"this rank called {call} but {self.names([peer])} called {peer_call}", rank=self.rank,
            hint="all ranks must make the same calls, with matching shapes and dtypes, in the same order",
        )

    def names(self, ranks: Sequence[int]) -> str:
        """For example "rank 1 (host a) and rank 3 (host b, world rank 7)"."""
        named = [
            f"rank {r} (host {self.hosts[r]}" + (f", world rank {w})" if (w := self.world_ranks[r]) != r else ")")
            for r in ranks[:16]
        ]
        if len(ranks) > 16:
            named.append(f"{len(ranks) - 16} more")
        return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
