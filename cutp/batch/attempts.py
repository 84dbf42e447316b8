"""One file for every start of a job: it numbers the starts, and shows whether an earlier one is still running.

No locks are used, which network file systems forget or hang on. A start takes the next number by creating its file
exclusively, and shows that it lives by touching the file every few seconds. Files of results carry the number of their
start, so that two jobs that run in one directory after all never write to the same file.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutp.batch.journal import cannot_write, read_journal, sync_directory, to_line
from cutp.errors import OutputError

HEARTBEAT_SECONDS = 5.0
# How long a start watches an earlier one that may be running elsewhere: three heartbeats.
WATCH_SECONDS = 15.0
_NAME = re.compile(r"attempt-(\d+)\.jsonl")


@dataclass(frozen=True)
class Attempt:
    """One start: who it was (`begin`), and how it ended (`end`, None while it runs or when it was killed)."""

    number: int
    path: Path
    begin: dict[str, Any]
    end: dict[str, Any] | None

    def __str__(self) -> str:
        job = f", job {self.begin['job']}" if self.begin.get("job") else ""
        return f"attempt {self.number} (host {self.begin.get('host')}, process {self.begin.get('pid')}{job})"


def read_attempts(directory: Path) -> list[Attempt]:
    """All starts in the order of their numbers."""
    found = []
    for name in os.listdir(directory):
        match = _NAME.fullmatch(name)
        if match:
            lines = [value for _, _, value in read_journal(directory / name) if value is not None]
            begin = lines[0] if lines else {}
            found.append(Attempt(int(match[1]), directory / name, begin, lines[1] if len(lines) > 1 else None))
    return sorted(found, key=lambda attempt: attempt.number)


class OwnAttempt:
    """The start that this process is. Its heart beats in a thread of its own, which only touches the file."""

    def __init__(self, directory: Path, facts: dict[str, Any], say: Callable[[str], None], *,
                 heartbeat_seconds: float = HEARTBEAT_SECONDS, watch_seconds: float = WATCH_SECONDS):
        """Takes the next number. Raises OutputError when another job runs in the directory, or when it is read-only."""
        attempts = read_attempts(directory)
        for attempt in attempts:
            if attempt.end is None and _may_run(attempt, say, watch_seconds):
                raise _running(directory, attempt)
        self.number = attempts[-1].number + 1 if attempts else 1
        self._directory = directory
        self.path = directory / f"attempt-{self.number}.jsonl"
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(self._fd, to_line({"attempt": self.number, **identity(), **facts, "started": int(time.time())}))
            os.fsync(self._fd)
            sync_directory(directory)
        except FileExistsError:
            raise _running(directory, f"attempt {self.number}, which started at the same time,") from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True)
        self._heart.start()

    def superseded(self) -> bool:
        """Whether a later start has taken over, as one does from a job that seems dead, for example a suspended one."""
        return os.path.exists(self._directory / f"attempt-{self.number + 1}.jsonl")

    def finish(self, result: dict[str, Any]) -> None:
        """Stops the heart, and says how it ended where the disk lets it; a second call does nothing.

        Without the word of its end a later start looks whether the process is there, as after a kill.
        """
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            os.write(self._fd, to_line({"ended": int(time.time()), **result}))
            os.fsync(self._fd)
        os.close(self._fd)

    def _beat(self, seconds: float) -> None:
        while not self._stopped.wait(seconds):
            try:
                os.utime(self._fd)
            except OSError:  # the file system is away at the moment; a later beat may reach it
                continue


def identity() -> dict[str, Any]:
    """Who this process is: {"host", "machine", "pid", "start", "job", "restart"}."""
    job = next((os.environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
                if os.environ.get(name)), None)
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid()),
            "job": job, "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}


def _may_run(attempt: Attempt, say: Callable[[str], None], watch_seconds: float) -> bool:
    me, other = identity(), attempt.begin
    if other and other.get("machine") == me["machine"] and me["machine"]:
        return _start(other.get("pid")) is not None and _start(other["pid"]) == other.get("start")
    if other.get("job") and other["job"] == me["job"] and other.get("restart") != me["restart"]:
        return False  # the scheduler restarts a job once it has ended
    # Elsewhere, or so young that it has not said who it is.
    say(f"{attempt} has not said that it ended; watching for {watch_seconds:g} s whether it still runs")
    before = _touched(attempt.path)
    time.sleep(watch_seconds)
    return _touched(attempt.path) != before


def _running(directory: Path, who: object) -> OutputError:
    return OutputError(f"{who} is running in {directory}", hint="wait for it, stop it, or choose another directory")


def _touched(path: Path) -> int:
    """The time of the last heartbeat. The file is opened, because only that makes NFS ask its server."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _machine() -> str | None:
    """What tells apart machines, and containers on one: only within it do process ids mean anything."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start(pid: Any) -> str | None:
    """When the process started, in ticks since the machine did; None when there is no such process, or a dead one."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
