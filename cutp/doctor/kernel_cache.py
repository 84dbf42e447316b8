"""The directory of compiled kernels: where it is, and whether it works well there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cutp import settings
from cutp.array.kernel_cache import KernelCache, directory_problem
from cutp.doctor.check import Check, Job
from cutp.doctor.report import Finding, by_value, ok, ranks_text, warn

_LEAST_FREE = 200 << 20
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "afs", "panfs", "ceph", "9p", "fuse.", "wekafs", "pvfs2",
            "orangefs", "dvs", "davfs", "glusterfs")
_FIX = "set CUTP_KERNEL_CACHE, or TMPDIR, to a directory of your own on a local disk of each node"


def probe(job: Job) -> dict[str, Any]:
    directory = KernelCache().directory.absolute()
    there = nearest_existing(directory)
    room = os.statvfs(there)
    return {"directory": str(directory), "exists": directory.exists(), "problem": _problem(directory, there),
            "free": room.f_bavail * room.f_frsize, "filesystem": filesystem_of(there), "in_home": _in_home(directory),
            "kernels": len(list(directory.glob("*.kernel"))) if os.access(directory, os.R_OK) else 0,
            "chosen": settings.kernel_cache() is not None}


def nearest_existing(directory: Path) -> Path:
    """The directory, or the lowest one above it that is there."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _problem(directory: Path, there: Path) -> str | None:
    """Why kernels cannot be kept there, or None. Nothing is made."""
    if there == directory:
        problem = directory_problem(os.stat(directory))
        if problem:
            return problem
    elif not there.is_dir():
        return f"{there} is not a directory"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds the path, from the text of /proc/mounts; "" if there is no such file."""
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(errors="replace")
        except OSError:
            return ""
    best, kind = "", ""
    real = os.path.realpath(path)
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        # A later mount on the same point hides the earlier one.
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def is_network(kind: str) -> bool:
    return kind.startswith(_NETWORK)


def _in_home(directory: Path) -> bool:
    home = os.path.realpath(os.path.expanduser("~"))
    return home != "/" and os.path.realpath(directory).startswith(home + os.sep)


def judge(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "kernel cache"

    def those(bad: Any) -> list[int]:
        return [rank for rank, fact in enumerate(facts) if bad(fact)]

    if ranks := those(lambda fact: fact["problem"]):
        fact = facts[ranks[0]]
        return warn(name, f"{fact['directory']} ({fact['problem']}): every process on {ranks_text(ranks)} compiles its "
                    "kernels again", _FIX + ", with mode 700", ranks)
    if ranks := those(lambda fact: is_network(fact["filesystem"])):
        fact = facts[ranks[0]]
        home = "your home on " if fact["in_home"] else ""
        return warn(name, f"{fact['directory']} is in {home}a network file system ({fact['filesystem']}): slow, "
                    "and compute nodes may not reach it", _FIX, ranks)
    if ranks := those(lambda fact: fact["free"] < _LEAST_FREE):
        return warn(name, f"{facts[ranks[0]]['free'] >> 20} MB are free for {facts[ranks[0]]['directory']}",
                    f"make room, or {_FIX}", ranks)
    places = by_value([fact["directory"] for fact in facts])
    texts = []
    for directory, ranks in places.items():
        fact = facts[ranks[0]]
        where = f" ({ranks_text(ranks)})" if len(places) > 1 else ""
        texts.append(f"{directory}{where}: {fact['kernels']} kernels, {fact['free'] / 1e9:.1f} GB free"
                     + ("" if fact["exists"] else ", to be made"))
    return ok(name, "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else ""))


CHECKS = (Check("kernel cache", probe, judge),)
