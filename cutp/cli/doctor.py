"""`cutp doctor`: does everything that a job needs work here, and if not, what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutp.comm import Communicator
    from cutp.doctor.report import Finding, Report

HELP = "check launcher, MPI, GPUs, NCCL and caches of this job; a fix for everything that is wrong"
EXAMPLE = """Works under any launcher with any number of ranks, and without a GPU or MPI. Each line is OK, WARN or FAIL.
Exit status: 0 no FAIL (there may be WARN lines); 7 a check failed.

example: mpirun -n 2 cutp doctor"""

_GRACE_SECONDS = 3.0
_FORWARDING_SECONDS = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mpi-only", action="store_true", help="leave out GPUs and what only they need")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S",
                        help="seconds that a check may take (default: 60)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from cutp.comm.launch import launcher_rank
    from cutp.doctor import Report, all_checks, examine
    from cutp.doctor.connect import connect

    # Without a launcher's word each process is alone, and speaks.
    speaks = launcher_rank() in (None, 0)
    host = os.uname().nodename

    def last_words(finding: Finding) -> str:
        return _whole_text(Report([host], [finding]), args.json) if speaks else ""

    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is said by a check
        comm, trouble = connect(args.timeout, last_words)
        if trouble is None:
            speaks = comm.rank == 0
        found = [trouble] if trouble else []

        def say(finding: Finding) -> None:
            if speaks and not args.json:
                print(finding.line(), flush=True)

        for finding in found:
            say(finding)
        report = examine(comm, all_checks(args.mpi_only), args.timeout, say, found)
    report.seconds = time.monotonic() - began
    if speaks:
        print(json.dumps(report.to_dict()) if args.json else report.summary(), flush=True)
    _leave(comm, report)


def _whole_text(report: Report, as_json: bool) -> str:
    if as_json:
        return json.dumps(report.to_dict()) + "\n"
    return "".join(f"{line}\n" for line in [*(finding.line() for finding in report.findings), report.summary()])


def _leave(comm: Communicator, report: Report) -> None:
    """Ends with the report's exit status: by force, if something still hangs that an orderly end would wait for."""
    if not report.stuck:
        comm.barrier()  # a launcher ends all ranks as soon as one ends with an error
        comm.close()
        if report.exit_code:
            sys.exit(report.exit_code)
        return
    if comm.rank > 0:
        # Rank 0 has the report to print and ends the job; after this time it is rank 0 that hangs.
        time.sleep(_GRACE_SECONDS)
        sys.stderr.write(f"[cutp rank {comm.rank} of {comm.size}] {report.findings[-1].line()}\n")
        sys.stderr.flush()
    time.sleep(_FORWARDING_SECONDS)
    if comm.size > 1:
        comm.abort(report.exit_code)
    os._exit(report.exit_code)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 86400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 86400")
    return value
