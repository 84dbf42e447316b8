"""What all ranks do together before the model is loaded."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cutp.batch.directory import JobDirectory
from cutp.batch.prepare import JobOptions, PreparedJob
from cutp.batch.stop import StopFlag
from cutp.batch.walltime import default_margin, parse_duration, seconds_left
from cutp.comm.communicator import Communicator
from cutp.errors import CutpError, OutputError

# How long a network file system may keep an old list of names.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class JobFacts:
    """What every rank knows of a prepared job; pending, done, settled: numbers of records; name: this start's file."""

    attempt: int
    name: str
    created: int
    pending: int
    done: int
    settled: int

    def file(self, directory: str, kind: str, replica: int) -> Path:
        return JobDirectory(directory).file(kind, replica, self.attempt)


def announce(comm: Communicator, prepare: Callable[[], PreparedJob]) -> tuple[PreparedJob | None, JobFacts]:
    """prepare() on rank 0, and its facts on every rank; the others wait as long as it takes. Errors reach all ranks."""
    job = facts = error = None
    if comm.rank == 0:
        try:
            job = prepare()
            facts = JobFacts(job.attempt.number, job.attempt.path.name, job.manifest.created, int(job.pending.sum()),
                             job.done, job.settled)
        except CutpError as raised:
            error = raised
        except BaseException as raised:
            comm.fail(raised)
            raise
    told = {"error": error and error.to_dict(), "facts": facts and dataclasses.asdict(facts)}
    told = comm.host.all_gather_json(told, patient=True)[0]
    if told["error"] is not None:
        error = error or CutpError.from_dict(told["error"])
        comm.host.agreed_error = error
        raise error
    return job, JobFacts(**told["facts"])


def check_directory(comm: Communicator, directory: str, facts: JobFacts) -> None:
    """OutputError on every rank when one does not see the directory that rank 0 has taken."""
    with comm.host.agree("opening the directory of the job"):
        end = time.monotonic() + _PATIENCE_SECONDS
        while not _sees(directory, facts.name):
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            raise OutputError(f"host {comm.hosts[comm.rank]} does not see the files of the job in {directory}",
                              hint="the directory must lie on a file system that all hosts share")


def _sees(directory: str, name: str) -> bool:
    try:
        return name in os.listdir(directory)
    except OSError:
        return False


def take_time_limit(comm: Communicator, options: JobOptions, stop: StopFlag) -> None:
    """Sets rank 0's deadline; the others hear of it when they meet. Errors reach all ranks."""
    with comm.host.agree("finding the time limit"):
        if options.time_limit is None or comm.rank != 0:
            return
        left = seconds_left() if options.time_limit == "auto" else parse_duration(options.time_limit) - stop.age
        margin = default_margin(left) if options.margin is None else parse_duration(options.margin)
        stop.stop_after(left - margin)
