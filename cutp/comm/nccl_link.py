"""The NCCL communicator behind a Communicator: how ranks join it, wait for it and leave it.

NCCL knows no deadlines: what a missing rank leaves waiting waits for ever, in the host call or on the GPU. So what may
wait on the host (joining, connecting, leaving) happens in a thread that can be given up, and while the host waits for
the GPU it looks at NCCL's own errors, at the peers' failure notices and at the clock.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from cutp import settings
from cutp.array import cuda
from cutp.array.arena import address
from cutp.array.graph import Graph, is_capturing
from cutp.comm.host_messages import HostMessages
from cutp.comm.tasks import Task, keep_a_thread
from cutp.comm.transport import Transport
from cutp.errors import (
    ClosedError,
    CommError,
    CommTimeoutError,
    ConfigError,
    CutpError,
    DeviceError,
    DeviceMappingError,
    PeerFailedError,
)

log = logging.getLogger("cutp")

_LOG_HINT = "NCCL_DEBUG=INFO shows what NCCL does"
# One all-reduce each of so many float32: NCCL connects every algorithm at its first use, and chooses by size.
_WARM_UP_SIZES = (2, 64 << 10, 4 << 20)
_CUDA_NOT_READY = 600

_SPIN_SECONDS = 0.005
_PAUSE = 50e-6
_LOOK_SECONDS = 1e-3
_ABORT_SECONDS = 5.0
_LEAVE_SECONDS = 20.0
_ROLL_CALL_SECONDS = 3.0

_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))
_links: weakref.WeakSet[NcclLink] = weakref.WeakSet()


class NcclLink:
    """This rank's part of an NCCL communicator among the GPUs that were current when all ranks called `join`."""

    def __init__(self, transport: Transport, cupy: Any, card: dict[str, Any]):
        self._transport, self._cupy, self._card = transport, cupy, card
        self.nccl = cuda.nccl()
        self._comm: Any = None
        self._closed = False
        self._last_call = "joining NCCL"
        self._streams: dict[int, Any] = {}
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()

    @staticmethod
    def join(transport: Transport) -> NcclLink:
        """Collective: connects the current GPUs of all ranks.

        DeviceError where a GPU or NCCL is missing, DeviceMappingError for two ranks on one GPU (unless
        `CUTP_SHARE_GPU=1`), CommTimeoutError or CommError, naming rank, host and GPU, if NCCL does not connect them.
        """
        if is_capturing():
            raise ConfigError("the first collective on GPUs connects them, which cannot be captured in a graph",
                              hint="compute once before capturing")
        host = HostMessages(transport)
        with host.agree("looking for NCCL"):
            cupy = cuda.cupy()
            card = _describe_card()
        cards = host.all_gather_json(card)
        if _check_cards(transport, cards):
            # NCCL refuses two ranks of one host on one GPU. As ranks of different hosts they go through the network.
            os.environ["NCCL_HOSTID"] = f"{transport.hosts[transport.rank]}, rank {transport.rank}"
        with host.agree("making an NCCL id"):
            uid = _unique_id(cuda.nccl()) if transport.rank == 0 else None
        link = NcclLink(transport, cupy, card)
        link._connect(host.broadcast_bytes(uid))
        return link

    def _connect(self, uid: bytes) -> None:
        t = self._transport
        create = self.nccl.NcclCommunicator
        self._comm = self._guarded("connecting", lambda: create(t.size, uid, t.rank))
        _links.add(self)
        _prepare_exit()
        try:
            self._guarded("a first exchange", self._warm_up)
        except BaseException:
            self.abort()
            raise

    def _warm_up(self) -> None:
        cupy, nccl, comm, size = self._cupy, self.nccl, self._comm, self._transport.size
        # The default stream: CuPy keeps what a stream of its own would have used for that stream alone.
        stream = cupy.cuda.get_current_stream()
        data = cupy.empty(max(*_WARM_UP_SIZES, 8 * size), np.float32)
        data[...] = 0
        start = address(data)
        for count in _WARM_UP_SIZES:
            comm.allReduce(start, start, count, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.ptr)
        own = start + 32 * self._transport.rank
        comm.allGather(own, start, 8, nccl.NCCL_FLOAT32, stream.ptr)
        comm.reduceScatter(start, own, 8, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.ptr)
        comm.broadcast(start, start, 8, nccl.NCCL_FLOAT32, 0, stream.ptr)
        stream.synchronize()

    # -- use -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if this can no longer be used: ClosedError after `close`, the reason after a failure."""
        if self._closed:
            raise ClosedError("this communicator was closed")
        try:
            self._transport.check_usable()
        except CommError:
            self.abort()
            raise
        if self._comm is None:
            raise CommError("NCCL was aborted on this rank", rank=self._transport.rank)

    @contextmanager
    def calling(self, call: str) -> Iterator[Any]:
        """CuPy's communicator, for what the body starts; a refusal of NCCL's becomes a CommError about `call`."""
        self._last_call = call
        try:
            yield self._comm
        except self.nccl.NcclError as error:
            self._fail(CommError(f"{call} was refused by NCCL on {self._where()}: {error}",
                                 rank=self._transport.rank, hint=_LOG_HINT))

    def used(self, stream: Any, graph: Graph | None) -> None:
        """Remember what must have ended before this can be closed: `stream`, and the graph that is being captured."""
        self._streams.setdefault(stream.ptr, stream)
        if graph is not None:
            self._graphs.add(graph)

    def wait(self, what: Any) -> None:
        """Return once `what` has ended: an event, or all that was started on a stream.

        CommTimeoutError after the deadline, PeerFailedError when a peer reports a failure, CommError when NCCL does;
        NCCL is aborted then, which also ends what hangs on the GPU. DeviceError if a kernel failed.
        """
        self.check()
        event = what if isinstance(what, self._cupy.cuda.Event) else self._event(what)
        status = self._poll(event, self._transport.timeout)
        if status == _CUDA_NOT_READY:
            self._time_out()
        if status != 0:
            raise DeviceError(f"a kernel or copy on {self._where()} failed: "
                              f"{self._cupy.cuda.runtime.CUDARuntimeError(status)}",
                              hint="CUDA_LAUNCH_BLOCKING=1 shows which one")
        self._check_nccl()

    def _event(self, stream: Any) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def _poll(self, event: Any, limit: float) -> int:
        """The status of `event`: not ready, if it does not come within `limit` seconds."""
        # Event.done would be false for ever after an error.
        query = self._cupy.cuda.runtime.eventQuery
        began = time.monotonic()
        next_look = began + _LOOK_SECONDS
        while (status := query(event.ptr)) == _CUDA_NOT_READY:
            now = time.monotonic()
            if now >= next_look:
                self._check_nccl()
                try:
                    self._transport.check_peers()
                except PeerFailedError:
                    self.abort()
                    raise
                if now - began >= limit:
                    break
                next_look = now + _LOOK_SECONDS
            if now - began < _SPIN_SECONDS:
                _yield_core()
            else:
                time.sleep(_PAUSE)
        return status

    def _check_nccl(self) -> None:
        try:
            self._comm.check_async_error()
        except KeyError:
            pass  # CuPy has no name for "in progress"
        except self.nccl.NcclError as error:
            self._fail(CommError(f"NCCL failed on {self._where()} in or after {self._last_call}: {error}",
                                 rank=self._transport.rank, hint=_LOG_HINT))

    # -- failure ---------------------------------------------------------------------------------------

    def _fail(self, error: CommError) -> NoReturn:
        self.abort()
        self._transport.give_up(error)

    def _time_out(self) -> NoReturn:
        """Find out who is missing: ranks that wait for their GPUs as well come to their deadlines at the same time."""
        t = self._transport
        self.abort()
        late = f"{self._last_call} did not end on {self._where()} within {t.timeout:.1f} s"
        t.check_usable()
        limit, t.timeout = t.timeout, min(_ROLL_CALL_SECONDS, t.timeout)
        nothing = np.empty(0, np.uint8)
        missing = "all ranks wait: their calls do not match, or a GPU or a link between GPUs hangs"
        try:
            t.exchange(f"{self._last_call} on GPUs, late", t.next_tag(), dict.fromkeys(t.peers, nothing), t.peers)
        except PeerFailedError:
            raise
        except CommError as error:
            missing = error.message
        finally:
            t.timeout = limit
        error = CommTimeoutError(f"{late}; {missing}", rank=t.rank,
                                 hint="CUTP_COMM_TIMEOUT sets the limit in seconds")
        t.give_up(error)

    def abort(self) -> None:
        """End NCCL's work on this rank, on the GPU too, without its peers. Never waits long; may be called again."""
        comm, self._comm = self._comm, None
        # If it does not return, its thread holds the communicator, whose finaliser would wait as well.
        if comm is not None and not self._start(comm.abort).wait(_ABORT_SECONDS):
            log.warning("NCCL could not be aborted within %.1f s on %s", _ABORT_SECONDS, self._where())

    # -- end -------------------------------------------------------------------------------------------

    def close(self, limit: float | None = None) -> None:
        """Leave: graphs that hold calls are closed once what was started has ended, then NCCL's communicator is
        destroyed; after a failure it is aborted. Needs no peers, never waits long, never raises; may be called again.
        """
        if self._closed:
            return
        self._closed = True
        limit = _LEAVE_SECONDS if limit is None else limit
        _links.discard(self)
        if self._comm is not None and not self._has_ended(limit):
            self.abort()
        if self._comm is None:
            limit = min(limit, _ABORT_SECONDS)  # an error is on its way to the user
        graphs = list(self._graphs)
        if graphs and not self._start(lambda: _close_all(graphs)).wait(limit):
            log.warning("graphs that hold NCCL calls could not be closed on %s", self._where())
            self.abort()
        comm, self._comm = self._comm, None
        if comm is not None and not self._start(comm.destroy).wait(limit):
            log.warning("NCCL's communicator could not be destroyed within %.1f s on %s", limit, self._where())
        self._streams.clear()

    def _has_ended(self, limit: float) -> bool:
        """Whether all that was started ended well, within `limit` seconds."""
        t = self._transport
        with suppress(CutpError, RuntimeError), self._device():
            deadline = time.monotonic() + min(limit, t.timeout)
            return not t.failed and all(
                self._poll(self._event(stream), deadline - time.monotonic()) == 0 for stream in self._streams.values()
            )
        return False

    # -- threads that may be given up ------------------------------------------------------------------

    def _start(self, work: Callable[[], Any]) -> Task:
        return Task(work, self._device)

    def _device(self) -> Any:
        """This rank's GPU; in `with` it is the current one, whatever thread this is."""
        return self._cupy.cuda.Device(self._card["index"])

    def _guarded(self, what: str, work: Callable[[], Any]) -> Any:
        """work(), given up when a peer fails or the deadline passes."""
        t = self._transport
        task = self._start(work)
        began = time.monotonic()
        while not task.wait(0.002):
            t.check_peers()
            waited = time.monotonic() - began
            if waited >= t.timeout:
                self._fail(CommTimeoutError(
                    f"NCCL: {what} {self._where()} and the GPUs of the {t.size - 1} other ranks took more than "
                    f"{waited:.1f} s", rank=t.rank,
                    hint=f"a firewall or a wrong NCCL_SOCKET_IFNAME between hosts, or a rank that hangs; {_LOG_HINT}"))
        try:
            return task.result()
        except RuntimeError as error:  # NCCL's, or CUDA's
            self._fail(CommError(f"NCCL: {what} {self._where()} and the GPUs of the other ranks failed: {error}",
                                 rank=t.rank, hint=_LOG_HINT))

    def _where(self) -> str:
        t = self._transport
        return f"{_name(self._card)} of host {t.hosts[t.rank]}"


@lru_cache(maxsize=1)
def _prepare_exit() -> None:
    """Once a process: a thread is there and this is known before the interpreter ends."""
    keep_a_thread()
    atexit.register(_leave_at_exit)


def _leave_at_exit() -> None:
    # CuPy's finaliser would destroy what is left, and wait for peers and a driver that may be gone.
    for link in list(_links):
        link.close(_ABORT_SECONDS)


def _close_all(graphs: Sequence[Graph]) -> None:
    for graph in graphs:
        with suppress(CutpError, RuntimeError):  # the GPU may be broken
            graph.close()


def _describe_card() -> dict[str, Any]:
    nccl, info = cuda.nccl(), cuda.device_info()
    return {"card": info.uuid or info.pci_bus_id, "index": info.index, "name": info.name, "nccl": nccl.get_version(),
            "share": settings.share_gpu()}


def _check_cards(transport: Transport, cards: Sequence[dict[str, Any]]) -> bool:
    """Whether ranks share a GPU. Raises, the same on all ranks, where they may not, and for different versions of NCCL.
    """
    hosts, shared = transport.hosts, False
    for rank, card in enumerate(cards):
        for other in range(rank):
            if (hosts[other], cards[other]["card"]) != (hosts[rank], card["card"]):
                continue
            shared = True
            if not all(each["share"] for each in cards):
                raise DeviceMappingError(
                    f"{transport.names([other, rank])} use the same {_name(card)}",
                    hint="start no more ranks on a node than it has GPUs; let every rank see its own or all of them; "
                         "for tests, CUTP_SHARE_GPU=1 lets ranks share, which then exchange data through the network")
        if card["nccl"] != cards[0]["nccl"]:
            raise ConfigError(
                f"{transport.names([0])} has NCCL {cards[0]['nccl']} and {transport.names([rank])} NCCL {card['nccl']}",
                hint="install the same NCCL everywhere, and see that LD_LIBRARY_PATH names no other")
    return shared


def _name(card: dict[str, Any]) -> str:
    return f"GPU {card['index']} ({card['name']}, {card['card']})"


def _unique_id(nccl: Any) -> bytes:
    try:
        return bytes(nccl.get_unique_id())
    except nccl.NcclError as error:
        raise CommError(f"NCCL cannot make an id: {error}",
                        hint=f"it needs a network interface, which NCCL_SOCKET_IFNAME names; {_LOG_HINT}") from error
