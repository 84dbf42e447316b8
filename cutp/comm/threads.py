"""Ranks as threads of one process: for tests, notebooks and debuggers.

Each rank has a mailbox per communicator; a message is a copy of the array that was sent.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from cutp import settings
from cutp.comm.blas import limited_blas_threads, ranks_share_of_cores
from cutp.comm.communicator import Communicator
from cutp.comm.transport import Exchange, Transport
from cutp.errors import ConfigError, CutpError, PeerFailedError


class _Group:
    """What the ranks of one communicator share."""

    def __init__(self, size: int):
        self.mailboxes = [_Mailbox() for _ in range(size)]
        self.failure: dict[str, Any] | None = None
        self._children: dict[tuple[int, int], _Group] = {}
        self._lock = threading.Lock()

    def child(self, call_index: int, color: int, size: int) -> _Group:
        """The group that the ranks with this color split off at this call; the first to ask creates it."""
        with self._lock:
            group = self._children.setdefault((call_index, color), _Group(size))
            group.failure = group.failure or self.failure
            return group

    def fail(self, record: dict[str, Any]) -> None:
        """Wake all who wait here or in a group split off from here; the first failure counts."""
        with self._lock:
            self.failure = self.failure or record
            children = list(self._children.values())
        for mailbox in self.mailboxes:
            mailbox.wake()
        for child in children:
            child.fail(record)


class _Mailbox:
    """The messages to one rank that it has not yet taken, in order per sender and tag."""

    def __init__(self):
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int], deque[tuple[str, np.ndarray]]] = {}

    def put(self, source: int, tag: int, call: str, x: np.ndarray) -> None:
        with self._changed:
            self._messages.setdefault((source, tag), deque()).append((call, x))
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def take(
        self, source: int, tag: int, deadline: float, failure: Callable[[], object]
    ) -> tuple[str, np.ndarray] | None:
        """The next message; None if the deadline passed or a failure came up first."""
        with self._changed:
            while not (queue := self._messages.get((source, tag))):
                left = deadline - time.monotonic()
                if left <= 0 or failure():
                    return None
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            message = queue.popleft()
            if not queue:
                del self._messages[source, tag]
            return message


class ThreadTransport(Transport):
    def __init__(
        self, group: _Group, rank: int, timeout: float,
        parent: Transport | None = None, world_ranks: Sequence[int] | None = None,
    ):
        size = len(group.mailboxes)
        hosts = [socket.gethostname()] * size
        super().__init__(
            rank, hosts, timeout, local_rank=rank, local_size=size, parent=parent, world_ranks=world_ranks
        )
        self._group = group

    def start(
        self, call: str, tag: int, outgoing: Mapping[int, np.ndarray], sources: Sequence[int],
        into: Mapping[int, np.ndarray] | None = None,
    ) -> Exchange:
        self.check_usable()
        copies: dict[int, np.ndarray] = {}
        for dest, x in outgoing.items():
            copy = copies.get(id(x))
            if copy is None:
                copy = copies[id(x)] = x.copy()
                copy.flags.writeable = False
            self._group.mailboxes[dest].put(self.rank, tag, call, copy)
        return _ThreadExchange(self, call, tag, sources, into or {})

    def receive(self, call: str, tag: int, sources: Sequence[int]) -> dict[int, np.ndarray]:
        mailbox = self._group.mailboxes[self.rank]
        began = time.monotonic()
        deadline = began + self.timeout
        got: dict[int, np.ndarray] = {}
        for source in sources:
            message = mailbox.take(source, tag, deadline, self.known_failure)
            if message is None:
                self.check_peers()
                late = [s for s in sources if s not in got and mailbox.take(s, tag, 0.0, self.known_failure) is None]
                self.give_up(self.timed_out(call, time.monotonic() - began, late or [source]))
            peer_call, got[source] = message
            if peer_call != call:
                self.give_up(self.out_of_step(call, source, peer_call))
        return got

    def split(self, colors: Sequence[int | None], members: Sequence[int], call_index: int) -> Transport:
        color = colors[self.rank]
        assert color is not None
        group = self._group.child(call_index, color, len(members))
        world_ranks = [self.world_ranks[m] for m in members]
        return ThreadTransport(group, members.index(self.rank), self.timeout, self, world_ranks)

    def release(self) -> None:
        pass

    def abort(self, code: int) -> NoReturn:
        raise SystemExit(code)

    def announce(self, record: dict[str, Any]) -> None:
        self._group.fail(record)

    def known_failure(self) -> dict[str, Any] | None:
        return self._group.failure


class _ThreadExchange:
    def __init__(
        self, transport: ThreadTransport, call: str, tag: int, sources: Sequence[int], into: Mapping[int, np.ndarray]
    ):
        self._transport, self._call, self._tag, self._sources, self._into = transport, call, tag, sources, into

    def wait(self) -> dict[int, np.ndarray]:
        got = self._transport.receive(self._call, self._tag, self._sources)
        for source, buffer in self._into.items():
            if buffer.shape == got[source].shape and buffer.dtype == got[source].dtype:
                buffer[...] = got[source]
                got[source] = buffer
        return got


def run_threads(n: int, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
    """Run `fn(comm, *args)` on n ranks, each a thread of this process; return their results in rank order.

    `timeout` is the number of seconds a rank waits for another (default `CUTP_COMM_TIMEOUT`). An exception on
    one rank makes all others fail with PeerFailedError at once; then that exception is raised here. If several
    ranks raised on their own account, it is the one of the lowest rank. While the threads run, BLAS uses
    cores // n threads for each, unless the user has set a number.
    """
    if n < 1:
        raise ConfigError(f"run_threads: the number of ranks must be at least 1, not {n}")
    limit = settings.comm_timeout() if timeout is None else timeout
    group = _Group(n)
    results: list[Any] = [None] * n
    errors: dict[int, BaseException] = {}
    anybody_failed = threading.Event()

    def run_rank(rank: int) -> None:
        transport = ThreadTransport(group, rank, limit)
        comm = Communicator(transport)
        try:
            results[rank] = fn(comm, *args)
        except BaseException as error:
            errors[rank] = error
            transport.fail(error)
            anybody_failed.set()
        finally:
            comm.close()

    threads = [
        threading.Thread(target=run_rank, args=(r,), name=f"rank {r}", daemon=True) for r in range(n)
    ]
    with limited_blas_threads(ranks_share_of_cores(n)):
        for thread in threads:
            thread.start()
        try:
            _join(threads, anybody_failed, limit)
        except BaseException as error:
            # For instance Ctrl-C, which only the main thread sees: the ranks must not wait for each other any more.
            text = f"{type(error).__name__} in the thread that called run_threads"
            group.fail({"rank": None, "world_rank": None, "host": socket.gethostname(), "text": text})
            raise
    if errors:
        raise _cause(errors)
    return results


def _join(threads: Sequence[threading.Thread], anybody_failed: threading.Event, grace: float) -> None:
    """Wait for all threads; once a rank has failed, at most `grace` seconds more.

    A rank that never looks at its communicator again cannot be stopped; it is left behind as a daemon thread.
    """
    for thread in threads:
        while thread.is_alive() and not anybody_failed.is_set():
            thread.join(0.05)
    deadline = time.monotonic() + grace
    for thread in threads:
        thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))


def _cause(errors: Mapping[int, BaseException]) -> BaseException:
    """The error to report: not a consequence of another rank's, and of the rank where it arose."""
    ranks = sorted(r for r, e in errors.items() if not isinstance(e, PeerFailedError)) or sorted(errors)
    error = errors[ranks[0]]
    if isinstance(error, CutpError) and error.rank in ranks:
        return errors[error.rank]
    return error
