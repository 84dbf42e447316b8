"""`cutp batch status`: where a corpus job stands."""

from __future__ import annotations

import argparse
import json
import time

HELP = "records done, failed and left of a batch job, running or not"
EXAMPLE = "example: cutp batch status out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the directory of the job")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> None:
    from cutp.batch.status import job_status
    from cutp.comm.launch import launcher_rank

    status = job_status(args.directory)
    if launcher_rank() not in (None, 0):
        return
    if args.json:
        print(json.dumps(status))
        return
    print(f"{status['directory']}: {status['done']} of {status['records']} records done, {status['failed']} failed, "
          f"{status['remaining']} left")
    for error in status["errors"]:
        print(f"  {error['count']} x {error['code']}, such as: {error['example']}")
    for attempt in status["attempts"]:
        print(f"  attempt {attempt['attempt']} on {attempt['host']}, {_time(attempt['started'])}, "
              f"{attempt['ranks']} ranks: {_end(attempt)}")
    names = ("prompt_tokens_per_s", "generated_tokens_per_s")
    rates = [sum(line[name] for line in status["metrics"]) for name in names]
    if status["metrics"]:
        print(f"  last reported: {rates[0]:.0f} prompt and {rates[1]:.0f} generated tokens/s")


def _time(seconds: int | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _end(attempt: dict) -> str:
    if "ended" not in attempt:
        return "running, or killed"
    if "error" in attempt:
        return f"ended {_time(attempt['ended'])} with an error: {attempt['error']}"
    return f"ended {_time(attempt['ended'])} with exit status {attempt.get('exit')}"
