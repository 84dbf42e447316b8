"""Communicator: how the ranks of a program talk to each other.

It has two parts, because there are two kinds of talk. `host` carries messages between host programs (requests,
errors, seeds). The collectives move arrays, and are the part that a GPU backend replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from cutp import settings
from cutp.comm.collectives import Pending
from cutp.comm.host_messages import HostMessages
from cutp.comm.nccl import NcclCollectives
from cutp.comm.single import SingleTransport
from cutp.comm.transport import Transport
from cutp.errors import ConfigError, PeerFailedError

if TYPE_CHECKING:
    from mpi4py import MPI


class Collectives(Protocol):
    """The part of a Communicator that moves arrays."""

    def all_reduce(self, x: Any, out: Any = None) -> Any: ...
    def all_reduce_async(self, x: Any, out: Any = None) -> Pending: ...
    def all_gather(self, x: Any, axis: int = 0, sizes: Sequence[int] | None = None, out: Any = None) -> Any: ...
    def reduce_scatter(self, x: Any, axis: int = 0, out: Any = None) -> Any: ...
    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any: ...
    def send(self, x: Any, dest: int) -> None: ...
    def recv(self, source: int, out: Any = None) -> Any: ...
    def connect(self) -> None: ...
    def wait(self, what: Any = None) -> None: ...
    def close(self) -> None: ...


class Communicator:
    """A group of ranks. All methods but `send`, `recv`, `wait`, `fail`, `close` and `abort` are collective.

    `local_rank` and `local_size` count the ranks of this communicator that run on this rank's node.

    Collective calls must be made by all ranks in the same order. Results are new arrays, with the same bits on
    all ranks: sums are formed in the order rank 0, 1, 2, ... whatever the timing, the size or the backend.
    float16 and bfloat16 are summed in float32 and rounded once; integers wrap around. Arguments may be
    non-contiguous or empty, and are never modified. All this holds for NumPy arrays.

    On device arrays (CuPy's) the same methods go through NCCL; one communicator takes both. They start their work on
    the current CuPy stream and return at once, and may be captured in a graph after a first call that was not. `out`
    must be C-contiguous; without it results lie in the scratch in use, else in new memory. How NCCL adds is said in
    `cutp.comm.nccl`. A failure on the GPU side is found by `wait`.

    Errors, of every operation: CommTimeoutError if a rank does not arrive within `CUTP_COMM_TIMEOUT` seconds,
    PeerFailedError if a rank called `fail`, CommError if the ranks' calls do not match; after these the
    communicator is unusable. ConfigError for an argument that cannot work; ClosedError after `close`.

    A communicator is used by one thread at a time.
    """

    def __init__(self, transport: Transport, make_collectives: Callable[[Transport], Collectives] = NcclCollectives):
        self._transport = transport
        self._make_collectives = make_collectives
        self._collectives = make_collectives(transport)
        self.host = HostMessages(transport)

    @staticmethod
    def single() -> Communicator:
        """A communicator of one rank."""
        return Communicator(SingleTransport(settings.comm_timeout()))

    @staticmethod
    def from_mpi(comm: MPI.Intracomm) -> Communicator:
        """A communicator of the ranks of an mpi4py communicator, which is duplicated; collective over `comm`.

        Raises ConfigError if `comm` is COMM_NULL, an intercommunicator or not from mpi4py.
        """
        from cutp.comm.mpi import MpiTransport

        return Communicator(MpiTransport.duplicate(comm, settings.comm_timeout()))

    @property
    def rank(self) -> int:
        return self._transport.rank

    @property
    def size(self) -> int:
        return self._transport.size

    @property
    def local_rank(self) -> int:
        return self._transport.local_rank

    @property
    def local_size(self) -> int:
        return self._transport.local_size

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host name of each rank."""
        return self._transport.hosts

    @property
    def timeout(self) -> float:
        """Seconds that this rank waits for another; may be set, alike on all ranks, for this communicator alone."""
        return self._transport.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._transport.timeout = seconds

    @property
    def closed(self) -> bool:
        return self._transport.closed

    def __repr__(self) -> str:
        kind = type(self._transport).__name__.removesuffix("Transport").lower()
        return f"<Communicator {kind} rank {self.rank} of {self.size}{', closed' if self.closed else ''}>"

    def all_reduce(self, x: Any, *, out: Any = None) -> Any:
        """The sum of all ranks' x: same shape and dtype on every rank, any real number type.

        `out`, with the shape and dtype of x, receives the sum and is returned; it may be x.
        """
        return self._collectives.all_reduce(x, out)

    def all_reduce_async(self, x: Any, *, out: Any = None) -> Pending:
        """Start an all_reduce and return at once; `.wait()` on what is returned gives the sum.

        x must not change before that. Several may be under way; they are waited for in the order of starting.
        On device arrays the sum runs on a second stream, and `.wait()` holds up the current stream, not the host.
        """
        return self._collectives.all_reduce_async(x, out)

    def all_gather(self, x: Any, axis: int = 0, *, sizes: Sequence[int] | None = None, out: Any = None) -> Any:
        """All ranks' x, concatenated along `axis` in rank order. Only the sizes along `axis` may differ.

        sizes: x.shape[axis] of every rank, if known: for device arrays it saves a host message.
        """
        return self._collectives.all_gather(x, axis, sizes, out)

    def reduce_scatter(self, x: Any, axis: int = 0, *, out: Any = None) -> Any:
        """This rank's slice along `axis` of the sum of all ranks' x.

        With n = x.shape[axis], the first n % size ranks get n // size + 1 and the others n // size.
        """
        return self._collectives.reduce_scatter(x, axis, out)

    def broadcast(self, x: Any, root: int = 0, *, out: Any = None) -> Any:
        """A copy of root's x on every rank. Any fixed-size dtype.

        The others' argument is not looked at; if root's is a device array, theirs must be one of its shape and dtype.
        """
        return self._collectives.broadcast(x, root, out)

    def send(self, x: Any, dest: int) -> None:
        """Send x to rank `dest`, which calls `recv`. A large array may have to wait for the receiver."""
        self._collectives.send(x, dest)

    def recv(self, source: int, *, out: Any = None) -> Any:
        """The next array that rank `source` sent to this rank. A device array needs `out`, of its shape and dtype."""
        return self._collectives.recv(source, out)

    def connect_gpus(self) -> None:
        """Connect the current GPUs of all ranks through NCCL; otherwise the first call on a device array does.

        DeviceError where a GPU or NCCL is missing, DeviceMappingError for two ranks on one GPU.
        """
        self._collectives.connect()

    def wait(self, what: Any = None) -> None:
        """Return once `what` has ended: a CuPy event, or all that was started on a stream (cutp's or CuPy's; by default
        the current one).

        Not collective. Unlike their own `synchronize` it looks for failures of NCCL and of peers, and has a
        deadline; after one of these, work that hangs on the GPU is aborted. DeviceError if a kernel failed.
        """
        self._collectives.wait(what)

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self.host.barrier()

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """A communicator for each color, of the ranks that passed it, ordered by (key, rank).

        None for ranks that pass None. Closing either communicator leaves the other usable; a failure announced
        on this one also wakes ranks that wait on the new ones.
        """
        if color is not None and (not isinstance(color, (int, np.integer)) or color < 0):
            raise ConfigError(f"split: color {color!r} is neither None nor an integer >= 0")
        t = self._transport
        call_index = t.next_tag()
        color = None if color is None else int(color)
        everyone = self.host.all_gather_json([color, int(key)])
        if color is None:
            return None
        members = sorted((k, r) for r, (c, k) in enumerate(everyone) if c == color)
        transport = t.split([c for c, _ in everyone], [r for _, r in members], call_index)
        return Communicator(transport, self._make_collectives)

    def fail(self, error: BaseException) -> None:
        """Tell all peers that this rank cannot go on: what they wait for, now or next, raises PeerFailedError.

        It names this rank, its host and `error`. Never blocks. With one rank, does nothing.
        """
        self._transport.fail(error)

    def abort(self, code: int) -> NoReturn:
        """End the job: with MPI all processes of COMM_WORLD, at once; otherwise SystemExit(code)."""
        self._transport.abort(code)

    def close(self) -> None:
        """Free what this object allocated, never what it was given. May be called again.

        Captured graphs that hold collectives are closed, then NCCL is left, once what was started has ended.
        """
        self._collectives.close()
        self._transport.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An exception that leaves the block takes this rank away from its peers, unless they all raise it too.
        expected = error is None or error is self.host.agreed_error or isinstance(error, (PeerFailedError, SystemExit))
        if not expected:
            self.fail(error)
        self.close()
