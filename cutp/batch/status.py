"""Where a job stands, from its files alone: needs no model, no GPU and no MPI, and disturbs no running job."""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.batch.directory import JobDirectory
from cutp.batch.journal import read_journal


def job_status(directory: str) -> dict[str, Any]:
    """{"records", "done", "failed", "remaining", "errors", "seed", "parameters", "attempts", ...} of a job.

    failed: records that have error lines and no result; remaining: those with neither. Done records that a changed
    input no longer has count as done. Raises OutputError when there is no job.
    """
    job = JobDirectory(directory)
    manifest = job.manifest()
    done = job.done_keys()
    since = manifest.last_change
    failures = {key: value["error"] for key, attempt, value in job.errors() if attempt >= since}
    failed = len(failures) - int(np.isin(np.array(list(failures), done.dtype), done).sum())
    attempts = []
    for attempt in job.attempts():
        attempts.append({"attempt": attempt.number, **{name: attempt.begin.get(name) for name in
                         ("host", "pid", "job", "ranks", "replicas", "started")}, **(attempt.end or {})})
    return {"directory": str(job.path), "records": manifest.records, "done": len(done), "failed": failed,
            "remaining": max(0, manifest.records - len(done) - failed),
            "errors": _most_common(failures.values()), "seed": manifest.seed, "parameters": manifest.parameters,
            "inputs": [file["path"] for file in manifest.inputs], "changes": manifest.changes, "attempts": attempts,
            "metrics": _last_metrics(job)}


def _most_common(errors, limit: int = 5) -> list[dict[str, Any]]:
    """The commonest kinds of errors with their number and one message as an example."""
    kinds: dict[str, dict[str, Any]] = {}
    for error in errors:
        kind = kinds.setdefault(error.get("code"), {"code": error.get("code"), "count": 0,
                                                    "example": error.get("message")})
        kind["count"] += 1
    return sorted(kinds.values(), key=lambda kind: -kind["count"])[:limit]


def _last_metrics(job: JobDirectory) -> list[dict[str, Any]]:
    """The last line of each replica of the newest start that has any."""
    files = job.files("metrics")
    newest = max((attempt for attempt, _ in files), default=0)
    lines = []
    for attempt, path in files:
        if attempt == newest:
            values = [value for _, _, value in read_journal(path) if value is not None]
            lines += values[-1:]
    return lines
