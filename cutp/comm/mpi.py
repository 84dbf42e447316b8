"""Ranks as MPI processes. Importing this module initialises MPI (mpi4py's default); nothing else in cutp does."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from cutp.comm.blas import cap_blas_threads, usable_cores
from cutp.comm.mpi_exchange import FRAME_BYTES, MpiExchange, has_incomplete_exchanges
from cutp.comm.transport import POINT_TO_POINT, Exchange, Transport
from cutp.errors import CommTimeoutError, ConfigError, PeerFailedError

_FAILURE_TAG = 0
_POINT_TO_POINT_TAG = 1
_FIRST_SEQUENCE_TAG = 2
_CREATE_GROUP_TAG = 3
_SPARE_FRAMES = 64
# How long a rank that hears of a peer's failure leaves it to print its traceback. A launcher kills all ranks as soon
# as one exits with an error, and it should not be the one that knows least.
_TRACEBACK_SECONDS = 0.5

# What MPI may still use after nobody waits for it any more: buffers and requests.
_kept_to_the_end: list[object] = []


class MpiTransport(Transport):
    """One rank of `mpi_comm`, a communicator that this transport owns: it frees it, and nobody else sends on it."""

    def __init__(
        self, mpi_comm: MPI.Intracomm, timeout: float,
        parent: MpiTransport | None = None, world_ranks: Sequence[int] | None = None,
    ):
        # The node is known only after a first exchange, for which the rest of this object must exist.
        hosts = ["unknown"] * mpi_comm.size
        super().__init__(
            mpi_comm.rank, hosts, timeout, local_rank=0, local_size=1, parent=parent, world_ranks=world_ranks
        )
        self.mpi_comm = mpi_comm
        # MPI promises the attribute on COMM_WORLD only, and no less than 32767.
        self._sequence_tags = (MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767) - _FIRST_SEQUENCE_TAG
        self._failure_record: dict[str, Any] | None = None
        self._spare_frames: list[np.ndarray] = []
        self._meet_peers()

    @staticmethod
    def duplicate(comm: MPI.Intracomm, timeout: float) -> MpiTransport:
        """The transport of a duplicate of `comm`. Collective over `comm`; see `Communicator.from_mpi`."""
        if not isinstance(comm, MPI.Intracomm):
            raise ConfigError(f"expected an mpi4py intracommunicator, got {type(comm).__name__}")
        if comm == MPI.COMM_NULL:
            raise ConfigError("this process is not part of the communicator (it is MPI.COMM_NULL)")
        return MpiTransport(_duplicate(comm, timeout), timeout)

    def _meet_peers(self) -> None:
        me = json.dumps({"host": socket.gethostname(), "cores": usable_cores()}).encode()
        mine = np.frombuffer(me, np.uint8)
        got = self.exchange("meeting of the ranks", self.next_tag(), dict.fromkeys(self.peers, mine), self.peers)
        met = [json.loads((mine if r == self.rank else got[r]).tobytes()) for r in range(self.size)]
        self.hosts = tuple(m["host"] for m in met)
        # A blocking collective, but every rank is known to be here.
        node = self.mpi_comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        node.Free()
        # Launchers may give each rank its own cores; only ranks that run on the same ones have to share.
        cores = set(met[self.rank]["cores"])
        sharing = sum(m["host"] == self.hosts[self.rank] and not cores.isdisjoint(m["cores"]) for m in met)
        cap_blas_threads(sharing)

    def start(
        self, call: str, tag: int, outgoing: Mapping[int, np.ndarray], sources: Sequence[int],
        into: Mapping[int, np.ndarray] | None = None,
    ) -> Exchange:
        self.check_usable()
        mpi_tag = _POINT_TO_POINT_TAG if tag == POINT_TO_POINT else _FIRST_SEQUENCE_TAG + tag % self._sequence_tags
        return MpiExchange(self, call, mpi_tag, outgoing, sources, into or {})

    def split(self, colors: Sequence[int | None], members: Sequence[int], call_index: int) -> Transport:
        # Unlike Comm.Split this involves the members only, who are all here: they have just exchanged colors.
        everyone = self.mpi_comm.Get_group()
        group = everyone.Incl(list(members))
        comm = self.mpi_comm.Create_group(group, _CREATE_GROUP_TAG)
        group.Free()
        everyone.Free()
        return MpiTransport(comm, self.timeout, self, [self.world_ranks[m] for m in members])

    def release(self) -> None:
        # After a failure messages may still be on their way. Freeing the communicator would let MPI give its
        # identity to a new one, which would then receive them; so it is left to the end of the process.
        if not MPI.Is_finalized() and not self.failed and not has_incomplete_exchanges(self):
            self.mpi_comm.Free()

    def abort(self, code: int) -> NoReturn:
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def announce(self, record: dict[str, Any]) -> None:
        # Small enough for MPI to send at once; nobody waits for the requests, whose buffers must stay.
        notice = json.dumps(record).encode()
        for peer in self.peers:
            request = self.mpi_comm.Isend([notice, len(notice), MPI.BYTE], peer, _FAILURE_TAG)
            _kept_to_the_end.append((notice, request))

    def known_failure(self) -> dict[str, Any] | None:
        if self._failure_record is None and not self.closed and not MPI.Is_finalized():
            message = self.mpi_comm.Improbe(MPI.ANY_SOURCE, _FAILURE_TAG, status := MPI.Status())
            if message is not None:
                notice = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([notice, len(notice), MPI.BYTE])
                self._failure_record = json.loads(notice)
        if self._failure_record is None and self.parent is not None:
            return self.parent.known_failure()
        return self._failure_record

    def peer_failed(self, record: dict[str, Any]) -> PeerFailedError:
        if not record.get("heard"):
            record["heard"] = True
            time.sleep(_TRACEBACK_SECONDS)
        return super().peer_failed(record)

    def take_frame(self) -> np.ndarray:
        """A receive buffer of FRAME_BYTES bytes."""
        return self._spare_frames.pop() if self._spare_frames else np.empty(FRAME_BYTES, np.uint8)

    def give_frame_back(self, frame: np.ndarray) -> None:
        if len(self._spare_frames) < _SPARE_FRAMES:
            self._spare_frames.append(frame)


def _duplicate(comm: MPI.Intracomm, timeout: float) -> MPI.Intracomm:
    """comm.Dup() with a deadline, because a rank that never makes this call is an easy mistake to make."""
    duplicate, request = comm.Idup()
    deadline = time.monotonic() + timeout
    pause = 20e-6
    while not request.Test():
        if time.monotonic() > deadline:
            _kept_to_the_end.append((duplicate, request))
            raise CommTimeoutError(
                f"waited {timeout:.1f} s for the other ranks of an MPI communicator of {comm.size} to duplicate it",
                rank=comm.rank, hint="every rank of a communicator that is given to cutp must make the same call",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 1e-3)
    return duplicate
