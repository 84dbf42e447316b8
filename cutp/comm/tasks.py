"""Calls that may never return, made in threads that can be given up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

# What threads that cannot be started any more would have run.
_reserve: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()


class Task:
    """work() under way in a thread of its own, inside `context()`. The process does not wait for it at its end."""

    def __init__(self, work: Callable[[], Any], context: Callable[[], AbstractContextManager[Any]]):
        self._work, self._context = work, context
        self._done = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        try:
            _start_thread(self._run)
        except RuntimeError:
            # At its end Python (from 3.12 on) starts no threads. One task after the other will have to do.
            _reserve.put(self._run)

    def _run(self) -> None:
        try:
            with self._context():
                self._value = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        return self._done.wait(max(0.0, seconds))

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


@lru_cache(maxsize=1)
def keep_a_thread() -> None:
    """Once a process: a thread for tasks that begin when the interpreter is ending."""
    _start_thread(_run_reserve)


def _start_thread(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="cutp task", daemon=True).start()


def _run_reserve() -> None:
    while True:
        _reserve.get()()
