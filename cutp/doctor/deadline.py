"""Running something that may hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class HungError(Exception):
    """A call did not return in time; its thread goes on."""


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """work(), in a thread of its own. HungError after `seconds`; the thread is then left behind as a daemon.

    Only what gives up Python's global lock while it hangs can be left behind like this.
    """
    outcome: list[tuple[bool, Any]] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))
        finally:
            done.set()

    threading.Thread(target=run, name="cutp doctor", daemon=True).start()
    if not done.wait(seconds):
        raise HungError(f"no answer within {seconds:g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value
