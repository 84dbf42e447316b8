"""The transport of a communicator with one rank: nobody to talk to."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from cutp.comm.transport import Exchange, Transport


class _NothingToWaitFor:
    def wait(self) -> dict[int, np.ndarray]:
        return {}


class SingleTransport(Transport):
    def __init__(self, timeout: float, parent: Transport | None = None):
        super().__init__(0, [socket.gethostname()], timeout, local_rank=0, local_size=1, parent=parent)

    def start(
        self, call: str, tag: int, outgoing: Mapping[int, np.ndarray], sources: Sequence[int],
        into: Mapping[int, np.ndarray] | None = None,
    ) -> Exchange:
        self.check_usable()
        return _NothingToWaitFor()

    def split(self, colors: Sequence[int | None], members: Sequence[int], call_index: int) -> Transport:
        return SingleTransport(self.timeout, parent=self)

    def release(self) -> None:
        pass

    def abort(self, code: int) -> NoReturn:
        raise SystemExit(code)

    def announce(self, record: dict[str, Any]) -> None:
        pass

    def known_failure(self) -> dict[str, Any] | None:
        return None
