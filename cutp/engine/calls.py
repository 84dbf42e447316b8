"""How the ranks of an `LLM` agree on what is called: rank 0's input counts, and others may simply follow.

Every public method begins with one exchange: each rank says what it calls and which input it holds. Rank 0 prepares
its input (tokenises, checks) and sends the result or the error to all, so that a bad request raises everywhere, before
any work, and leaves the engine usable. A rank that follows says nothing and does what rank 0 calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cutp.comm.communicator import Communicator
from cutp.errors import CutpError, InputMismatchError

CLOSE = "close"


@dataclass(frozen=True)
class Call:
    """One call, equal on all ranks. value: what rank 0 prepared from its input. leave: a stream is to be left."""

    name: str
    value: Any
    leave: bool


class Calls:
    """The calls of one object over `comm`. prepare(name, input): rank 0's work on a call's input, JSON-safe."""

    def __init__(self, comm: Communicator, prepare: Callable[[str, Any], Any]):
        self._comm = comm
        self._prepare = prepare
        # Whether other ranks followed the last call.
        self.is_followed = False

    def begin(self, name: str, read: Callable[[], Any] | None = None, given: bool = True, *,
              leave: bool = False) -> Call:
        """This rank calls `name`, with the input that `read` returns, JSON-safe, if it was given one.

        Raises on all ranks alike: InputMismatchError when ranks call different methods or hold different input, and
        whatever CutpError reading or preparing raised on rank 0.
        """
        return self._guarded(lambda: self._begin(name, read, given, leave))

    def wait(self) -> Call:
        """This rank follows: the next call of rank 0, however long it takes to come. Raises what `begin` raises."""
        return self._guarded(lambda: self._meet([None, None, False, False], None, patient=True))

    def _guarded(self, exchange: Callable[[], Call]) -> Call:
        try:
            return exchange()
        except CutpError as error:
            # Raised by all ranks alike (but for errors of communication, which the ranks know of).
            self._comm.host.agreed_error = error
            raise
        except BaseException as error:
            self._comm.fail(error)
            raise

    def _begin(self, name: str, read: Callable[[], Any] | None, given: bool, leave: bool) -> Call:
        value = error = None
        if read is not None and given:
            try:
                value = read()
            except CutpError as raised:
                error = raised
        if self._comm.rank == 0 and read is not None and not given:
            error = InputMismatchError("rank 0 passed no input",
                                       hint="rank 0 passes the input, the others None or the same")
        if self._comm.size == 1:
            if error is not None:
                raise error
            return Call(name, None if read is None else self._prepare(name, value), leave)
        digest = None
        if read is not None and given:
            digest = _digest(error.to_dict() if error else value)

        def prepared() -> Any:
            if error is not None:
                raise error
            return self._prepare(name, value)

        return self._meet([name, digest, read is not None, leave], prepared)

    def _meet(self, mine: list, prepared: Callable[[], Any] | None, patient: bool = False) -> Call:
        calls = self._comm.host.all_gather_json(mine, patient=patient)
        name, digest, has_input, leave = calls[0]
        self.is_followed = any(other is None for other, *_ in calls)
        if name is None:
            raise InputMismatchError("rank 0 follows, but it is rank 0 whose calls are followed",
                                     hint="call follow() on the other ranks only")
        self._check(name, digest, calls)
        if not has_input:
            return Call(name, None, leave)
        reply = None
        if self._comm.rank == 0:
            try:
                reply = {"value": prepared()}
            except CutpError as raised:
                reply = {"error": raised.to_dict()}
        reply = self._comm.host.broadcast_json(reply)
        if "error" in reply:
            raise CutpError.from_dict(reply["error"])
        return Call(name, reply["value"], leave)

    @staticmethod
    def _check(name: str, digest: str | None, calls: list) -> None:
        for rank, (other, other_digest, _, _) in enumerate(calls):
            if other not in (None, name):
                raise InputMismatchError(f"rank {rank} called {other}, rank 0 called {name}",
                                         hint="all ranks make the same calls in the same order, or call follow()")
            if other_digest is not None and digest is not None and other_digest != digest:
                raise InputMismatchError(f"rank {rank} passed another input than rank 0",
                                         hint="pass None on the other ranks, or the same input everywhere")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
