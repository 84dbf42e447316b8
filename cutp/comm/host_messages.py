"""Host messages: bytes and JSON between the ranks' host programs (requests, errors, seeds).

Nothing is pickled: what one rank sends can at worst be wrong data on another, never code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cutp.comm.transport import POINT_TO_POINT, Transport
from cutp.errors import ClosedError, CommError, ConfigError, CutpError


class HostMessages:
    """Messages among the ranks of one communicator.

    All but `send_*` and `recv_*` are collective. `*_json` takes what `json.dumps` takes, NaN and Infinity included.
    Errors: CommTimeoutError, PeerFailedError, CommError if the ranks are out of step, ClosedError after close.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        # The error that `agree` raised last: all ranks raise it, so it need not be announced again.
        self.agreed_error: CutpError | None = None

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        """The bytes that `root` passed, on every rank; the others' argument is not looked at."""
        t = self._transport
        root = t.check_peer(root, "broadcast_bytes: root", may_be_self=True)
        call = f"broadcast_bytes(root={root})"
        if t.rank != root:
            return t.exchange(call, t.next_tag(), {}, (root,))[root].tobytes()
        x = _to_array(data, "broadcast_bytes")
        t.exchange(call, t.next_tag(), dict.fromkeys(t.peers, x), ())
        return x.tobytes()

    def gather_bytes(self, data: bytes, root: int = 0) -> list[bytes] | None:
        """On `root` the bytes of all ranks in rank order, None on the others."""
        t = self._transport
        root = t.check_peer(root, "gather_bytes: root", may_be_self=True)
        call = f"gather_bytes(root={root})"
        x = _to_array(data, "gather_bytes")
        if t.rank != root:
            t.exchange(call, t.next_tag(), {root: x}, ())
            return None
        got = t.exchange(call, t.next_tag(), {}, t.peers)
        return [(x if r == root else got[r]).tobytes() for r in range(t.size)]

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of all ranks in rank order."""
        return self._all_gather("all_gather_bytes", _to_array(data, "all_gather_bytes"))

    def send_bytes(self, data: bytes, dest: int) -> None:
        """Send to `dest`, which calls `recv_bytes`. May wait for the receiver."""
        t = self._transport
        dest = t.check_peer(dest, "send_bytes: dest")
        t.exchange("send_bytes/recv_bytes", POINT_TO_POINT, {dest: _to_array(data, "send_bytes")}, ())

    def recv_bytes(self, source: int) -> bytes:
        """The next bytes that `source` sent to this rank."""
        t = self._transport
        source = t.check_peer(source, "recv_bytes: source")
        return t.exchange("send_bytes/recv_bytes", POINT_TO_POINT, {}, (source,))[source].tobytes()

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """The value that `root` passed, on every rank, as JSON has it (a tuple becomes a list on all ranks)."""
        return _from_json(self.broadcast_bytes(_to_json(value) if self._transport.rank == root else None, root))

    def gather_json(self, value: Any, root: int = 0) -> list[Any] | None:
        got = self.gather_bytes(_to_json(value), root)
        return None if got is None else [_from_json(g) for g in got]

    def all_gather_json(self, value: Any, *, patient: bool = False) -> list[Any]:
        """The values of all ranks in rank order. patient: wait for the others without a deadline."""
        x = _to_array(_to_json(value), "all_gather_json")
        if not patient:
            return [_from_json(g) for g in self._all_gather("all_gather_json", x)]
        with self._transport.without_deadline():
            return [_from_json(g) for g in self._all_gather("all_gather_json", x)]

    def send_json(self, value: Any, dest: int) -> None:
        self.send_bytes(_to_json(value), dest)

    def recv_json(self, source: int) -> Any:
        return _from_json(self.recv_bytes(source))

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._all_gather("barrier", np.empty(0, np.uint8))

    @contextmanager
    def agree(self, phase: str) -> Iterator[None]:
        """Make the errors of a `with` body collective; `phase` says what the body does, in errors.

        If the body raised a CutpError on any rank, every rank raises the error of the lowest such rank at the
        end of the body. Its `rank` is set unless all ranks raised the same message.
        Any other exception is announced with `fail` and raised again; the other ranks get PeerFailedError.
        """
        t = self._transport
        mine: CutpError | None = None
        try:
            yield
        except (CommError, ClosedError) as error:
            # With a broken communicator there is nobody to agree with; the peers have been told already.
            if t.closed or t.failed:
                raise
            mine = error
        except CutpError as error:
            mine = error
        except BaseException as error:
            t.fail(error)
            raise
        status = None if mine is None else mine.to_dict()
        gathered = self._all_gather(f"agree({phase!r})", _to_array(_to_json(status), "agree"))
        errors = {r: d for r, g in enumerate(gathered) if (d := _from_json(g)) is not None}
        if not errors:
            return
        origin = min(errors)
        error = mine if mine is not None and origin == t.rank else CutpError.from_dict(errors[origin])
        same_on_all = len(errors) == t.size and len({(d["code"], d["message"]) for d in errors.values()}) == 1
        if t.size > 1 and not same_on_all:
            error.rank = origin
        self.agreed_error = error
        if error is mine:
            raise error
        raise error from mine

    def _all_gather(self, call: str, x: np.ndarray) -> list[bytes]:
        t = self._transport
        got = t.exchange(call, t.next_tag(), dict.fromkeys(t.peers, x), t.peers)
        return [(x if r == t.rank else got[r]).tobytes() for r in range(t.size)]


def _to_array(data: bytes | bytearray | memoryview | None, what: str) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ConfigError(f"{what}: expected bytes, got {type(data).__name__}")
    return np.frombuffer(data, np.uint8)


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _from_json(data: bytes) -> Any:
    return json.loads(data)
