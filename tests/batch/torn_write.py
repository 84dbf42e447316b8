"""`cutp` that is killed in the middle of writing a result line.

Arguments: the line, counted from 1; the part of it that reaches the file, 0 to 1; then cutp's own. Only lines of
results count. With several ranks, the first to come so far dies.
"""

import os
import signal
import sys

from cutp.batch import journal
from cutp.cli.main import main


class _TornWrites:
    """`os` with a `write` that dies."""

    def __init__(self, line: int, part: float):
        self._left = line
        self._part = part

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        if b'"finish_reason"' in data:
            self._left -= 1
            if self._left == 0:
                os.write(fd, data[: round(self._part * len(data))])
                os.kill(os.getpid(), signal.SIGKILL)
        return os.write(fd, data)


if __name__ == "__main__":
    journal.os = _TornWrites(int(sys.argv[1]), float(sys.argv[2]))
    main(sys.argv[3:])
