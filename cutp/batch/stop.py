"""What makes a job stop early: a signal, the time, another job that took over."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_STOPPED = 75
# From a signal to the end by force; schedulers kill about 30 s after SIGTERM.
GRACE_SECONDS = 25.0
# Within this time a signal that comes again is the same one, which a launcher has passed on as well.
_ECHO_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 and SIGINT; a second signal, or a grace time after the first, ends the process at once.

    Use it as a context manager, before anything that takes long: an unhandled SIGUSR1 kills a process. The handler only
    sets a flag. Result lines go to the system with one write each, so that even an end by force loses none.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS):
        self._made = time.monotonic()
        self.signal: int | None = None
        self._signalled = 0.0
        self.deadline: float | None = None
        self.given_up: str | None = None
        self._grace_seconds = grace_seconds
        self._timer: threading.Timer | None = None
        self._before: dict[int, object] = {}

    @property
    def reason(self) -> str | None:
        """Why this rank wants to stop, None while it does not."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self.given_up is not None:
            return self.given_up
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the time limit"
        return None

    @property
    def age(self) -> float:
        """Seconds since this object was made, which is the first thing a job does."""
        return time.monotonic() - self._made

    def stop_after(self, seconds: float) -> None:
        """Stop once so many seconds from now have passed."""
        self.deadline = time.monotonic() + seconds

    def give_up(self, reason: str) -> None:
        """Stop for another reason."""
        self.given_up = reason

    def __enter__(self) -> StopFlag:
        # Only the main thread may set handlers; elsewhere there is nothing but the time limit.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._signalled > _ECHO_SECONDS:
                self._end_by_force("a second signal")
            return
        self.signal, self._signalled = number, time.monotonic()
        self._timer = threading.Timer(self._grace_seconds, self._end_by_force, (f"{self._grace_seconds:g} s",))
        self._timer.daemon = True
        self._timer.start()

    @staticmethod
    def _end_by_force(after: str) -> None:
        message = f"cutp: stopped by force after {after}; all written results are kept\n"
        os.write(sys.__stderr__.fileno(), message.encode())
        os._exit(EXIT_STOPPED)
