"""What a running job says of itself: a bar on a terminal, else a plain line now and then, and lines of metrics."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class JobCounts:
    """Records of the whole job: with a result, with nothing but errors, and not tried yet."""

    done: int
    failed: int
    remaining: int

    @property
    def records(self) -> int:
        return self.done + self.failed + self.remaining

    def to_dict(self) -> dict[str, int]:
        return {"done": self.done, "failed": self.failed, "remaining": self.remaining}


class Rates:
    """Tokens a second since the last question, from counters that only grow; and over all."""

    def __init__(self):
        self._began = self._time = time.monotonic()
        self._counts = (0, 0)

    def overall(self, prompt_tokens: int, generated_tokens: int) -> tuple[float, float]:
        """(prompt, generated) tokens a second since this object was made."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return prompt_tokens / seconds, generated_tokens / seconds

    def advance(self, prompt_tokens: int, generated_tokens: int) -> tuple[float, float]:
        """The same since the last call, or since this object was made."""
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        rates = ((prompt_tokens - self._counts[0]) / seconds, (generated_tokens - self._counts[1]) / seconds)
        self._time, self._counts = now, (prompt_tokens, generated_tokens)
        return rates


class Progress:
    """The job's progress on stderr; only rank 0 has one that is `shown`."""

    def __init__(self, shown: bool, stream: TextIO | None = None):
        self._shown = shown
        self._stream = sys.stderr if stream is None else stream
        self._bar = None

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.clear()
        self._stream.write(f"cutp: {text}\n")
        self._stream.flush()

    def start(self, counts: JobCounts) -> None:
        if self._shown and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=counts.records, initial=counts.done + counts.failed, unit="record",
                             file=self._stream, dynamic_ncols=True)

    def update(self, counts: JobCounts) -> None:
        """Moves the bar; nothing where there is none."""
        if self._bar is not None:
            self._bar.set_postfix(failed=counts.failed, refresh=False)
            self._bar.update(counts.done + counts.failed - self._bar.n)

    def report(self, counts: JobCounts, rates: tuple[float, float], *, last: bool = False) -> None:
        """A plain line, where there is no bar that says the same; the last one always."""
        if self._bar is None or last:
            self.say(f"{counts.done} of {counts.records} records done, {counts.failed} failed, {counts.remaining} "
                     f"left; {rates[0]:.0f} prompt and {rates[1]:.0f} generated tokens/s")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def peak_memory() -> dict[str, int | None]:
    """Bytes this process held at most: on the host, and of CuPy's pool on the device (None without one)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = None
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None and cupy.cuda.is_available():
        device = int(cupy.get_default_memory_pool().total_bytes())
    return {"peak_host_bytes": peak, "peak_device_bytes": device}
