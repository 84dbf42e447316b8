"""Exchanging arrays over non-blocking MPI point-to-point messages.

A message is a *frame*: the call it belongs to, the dtype and the shape, followed by the data if they are few.
More data follow in *body* messages with the same tag, which MPI keeps in order. The receiver needs to know
nothing beforehand, and a peer that makes another call is found out before its data are touched.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NoReturn, Protocol

import numpy as np
from mpi4py import MPI

from cutp.errors import CommError

FRAME_BYTES = 20 * 1024
INLINE_BYTES = 16 * 1024
# Counts in MPI's classic interface are 32-bit.
BODY_BYTES = 1 << 30

SPIN_SECONDS = 0.0015
_FIRST_SLEEP = 20e-6
_LONGEST_SLEEP = 1e-3

# Exchanges that are not complete. MPI may still read and write their buffers, so they stay here, and if need be
# until the process ends, whatever becomes of the code that started them.
_incomplete: set[MpiExchange] = set()

_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))


class ExchangeOwner(Protocol):
    """What an exchange needs of the transport that starts it."""

    mpi_comm: MPI.Intracomm
    timeout: float

    def take_frame(self) -> np.ndarray: ...

    def give_frame_back(self, frame: np.ndarray) -> None: ...

    def check_peers(self) -> None: ...

    def give_up(self, error: CommError) -> NoReturn: ...

    def timed_out(self, call: str, waited: float, missing: Sequence[int]) -> CommError: ...

    def out_of_step(self, call: str, peer: int, peer_call: str) -> CommError: ...


class Waitable(Protocol):
    def progress(self) -> bool:
        """Look after the operation once; True if it is complete."""

    def missing(self) -> Iterable[int]:
        """The peers it is waiting for."""


def wait_until_done(transport: ExchangeOwner, call: str, operation: Waitable) -> None:
    """Return when `operation` is complete; raise if a peer failed or the deadline passed."""
    if operation.progress():
        return
    began = time.monotonic()
    deadline = began + transport.timeout
    spin_end = began + min(SPIN_SECONDS, transport.timeout)
    while time.monotonic() < spin_end:
        _yield_core()
        if operation.progress():
            return
    pause = _FIRST_SLEEP
    while not operation.progress():
        transport.check_peers()
        now = time.monotonic()
        if now >= deadline:
            transport.give_up(transport.timed_out(call, now - began, sorted(set(operation.missing()))))
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_SLEEP)


@lru_cache(maxsize=4096)
def _encode_head(call: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    text = json.dumps([call, dtype.name, shape]).encode()
    if len(text) > FRAME_BYTES - INLINE_BYTES - 4:
        raise CommError(f"{call[:80]}...: the description of the call is too long to send")
    return np.frombuffer(len(text).to_bytes(4, "little") + text, np.uint8)


@lru_cache(maxsize=4096)
def _decode_head(text: bytes) -> tuple[str, np.dtype, tuple[int, ...]]:
    call, dtype, shape = json.loads(text)
    return call, np.dtype(dtype), tuple(shape)


def has_incomplete_exchanges(transport: ExchangeOwner) -> bool:
    return any(exchange.transport is transport for exchange in _incomplete)


def _as_bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


def _chunks(data: np.ndarray) -> list[np.ndarray]:
    return [data[i : i + BODY_BYTES] for i in range(0, data.size, BODY_BYTES)]


class MpiExchange:
    """One exchange: posted when created, complete when `wait` returns."""

    def __init__(
        self, transport: ExchangeOwner, call: str, tag: int, outgoing: Mapping[int, np.ndarray],
        sources: Sequence[int], into: Mapping[int, np.ndarray],
    ):
        self.transport, self._call = transport, call
        self._incoming = [_Incoming(transport, call, tag, source, into.get(source)) for source in sources]
        # (destination, request, buffer)
        self._sends: list[tuple[int, MPI.Request, np.ndarray]] = []
        _incomplete.add(self)
        comm = transport.mpi_comm
        frames: dict[int, np.ndarray] = {}
        for dest, x in outgoing.items():
            inline = x.nbytes <= INLINE_BYTES
            frame = frames.get(id(x))
            if frame is None:
                head = _encode_head(call, x.dtype, x.shape)
                frame = np.concatenate((head, _as_bytes(x))) if inline else head
                frames[id(x)] = frame
            pieces = [frame] if inline else [frame, *_chunks(_as_bytes(x))]
            for piece in pieces:
                self._sends.append((dest, comm.Isend([piece, piece.size, MPI.BYTE], dest, tag), piece))

    def progress(self) -> bool:
        done = True
        for incoming in self._incoming:
            if not incoming.progress():
                done = False
        if self._sends:
            self._sends = [send for send in self._sends if not send[1].Test()]
        return done and not self._sends

    def missing(self) -> Iterable[int]:
        late = [incoming.source for incoming in self._incoming if incoming.result is None]
        return late or [dest for dest, _, _ in self._sends]

    def wait(self) -> dict[int, np.ndarray]:
        try:
            wait_until_done(self.transport, self._call, self)
        except BaseException:
            for incoming in self._incoming:
                incoming.cancel()
            raise
        _incomplete.discard(self)
        return {incoming.source: incoming.result for incoming in self._incoming}


class _Incoming:
    """The message from one source: first its frame, then the body if there is one."""

    def __init__(self, transport: ExchangeOwner, call: str, tag: int, source: int, into: np.ndarray | None):
        self.source = source
        self.result: np.ndarray | None = None
        self._transport, self._call, self._tag, self._into = transport, call, tag, into
        self._frame: np.ndarray | None = transport.take_frame()
        self._body: np.ndarray | None = None
        self._requests = [transport.mpi_comm.Irecv([self._frame, FRAME_BYTES, MPI.BYTE], source, tag)]

    def progress(self) -> bool:
        if self.result is not None:
            return True
        while self._requests:
            if not self._requests[0].Test():
                return False
            del self._requests[0]
        if self._body is None:
            self._open_frame()
            return self.result is not None
        self.result = self._body
        return True

    def _open_frame(self) -> None:
        frame = self._frame
        assert frame is not None
        end = 4 + int.from_bytes(frame[:4].tobytes(), "little")
        call, dtype, shape = _decode_head(frame[4:end].tobytes())
        if call != self._call:
            self._transport.give_up(self._transport.out_of_step(self._call, self.source, call))
        fits = self._into is not None and self._into.shape == shape and self._into.dtype == dtype
        body = self._into if fits else np.empty(shape, dtype)
        if body.nbytes <= INLINE_BYTES:
            _as_bytes(body)[...] = frame[end : end + body.nbytes]
            self.result = body
        else:
            self._body = body
            comm = self._transport.mpi_comm
            self._requests = [
                comm.Irecv([chunk, chunk.size, MPI.BYTE], self.source, self._tag) for chunk in _chunks(_as_bytes(body))
            ]
        self._transport.give_frame_back(frame)
        self._frame = None

    def cancel(self) -> None:
        for request in self._requests:
            if request != MPI.REQUEST_NULL:
                request.Cancel()
