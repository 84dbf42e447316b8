"""Hosts: ranks and cores, BLAS threads, limits of the system."""

from __future__ import annotations

import os
from typing import Any

from cutp.comm import blas
from cutp.doctor.check import Check, Job
from cutp.doctor.report import Finding, ok, ranks_text, warn


def probe_ranks(job: Job) -> dict[str, Any]:
    return {"cores": blas.usable_cores(), "local_size": job.comm.local_size, "pid": os.getpid()}


def judge_ranks(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "ranks"
    hosts = job.ranks_of_host()
    text = "; ".join(f"{host}: {ranks_text(ranks)}, {_cores(_union(facts, ranks))}" for host, ranks in hosts.items())
    text = f"{job.size} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}: {text}"
    odd = [rank for ranks in hosts.values() for rank in ranks if facts[rank]["local_size"] != len(ranks)]
    if odd:
        rank = odd[0]
        return warn(name, f"{text}. MPI counts {facts[rank]['local_size']} ranks on the node of rank {rank}, the host "
                    f"names {len(hosts[job.hosts[rank]])}: ranks may choose the same GPU",
                    "give every node its own host name, and do not hide ranks of a node from each other in containers",
                    odd)
    crowded = {host: ranks for host, ranks in hosts.items() if len(ranks) > len(_union(facts, ranks))}
    if crowded:
        host, ranks = next(iter(crowded.items()))
        return warn(name, f"{text}. {len(ranks)} ranks share {_cores(_union(facts, ranks))} of {host}",
                    "start no more ranks than cores, or give the job more cores",
                    [rank for ranks in crowded.values() for rank in ranks])
    return ok(name, text)


def _union(facts: list[dict[str, Any]], ranks: list[int]) -> set[int]:
    return {core for rank in ranks for core in facts[rank]["cores"]}


def _cores(cores: set[int]) -> str:
    return f"{len(cores)} core{'s' if len(cores) != 1 else ''}"


def probe_affinity(job: Job) -> int:
    """The cores of the host, whoever may use them."""
    return os.cpu_count() or 1


def judge_affinity(job: Job, facts: list[int]) -> Finding:
    name = "cpu affinity"
    ranks_facts = job.facts["ranks"]
    sharing, single = [], []
    for ranks in job.ranks_of_host().values():
        sets = {rank: frozenset(ranks_facts[rank]["cores"]) for rank in ranks}
        sharing += [rank for rank in ranks
                    if any(sets[rank] & sets[other] and sets[rank] != sets[other] for other in ranks)]
        # Ranks of one core each, where others are idle: what some launchers do by default.
        if facts[ranks[0]] >= 2 * len(ranks):
            single += [rank for rank in ranks if len(sets[rank]) == 1]
    if sharing:
        return warn(name, f"{ranks_text(sharing)} share some of their cores with others, but not all",
                    "bind each rank to cores of its own (mpirun --bind-to core, srun --cpu-bind=cores) or none at all",
                    sharing)
    if single:
        return warn(name, f"{ranks_text(single)} may use only one of {facts[single[0]]} cores: models on the CPU and "
                    "reading weights are slow", "mpirun --bind-to none, or srun --cpus-per-task=N", single)
    hosts = job.ranks_of_host().values()
    if job.size == 1:
        return ok(name, f"the rank may use {len(ranks_facts[0]['cores'])} of {facts[0]} cores")
    bound = all(len({frozenset(ranks_facts[rank]["cores"]) for rank in ranks}) == len(ranks) for ranks in hosts)
    return ok(name, "each rank has cores of its own" if bound else "the ranks of a host share all its cores")


def probe_blas(job: Job) -> dict[str, Any]:
    import numpy as np  # noqa: F401  (loads BLAS)
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]
    return {"libraries": sorted({f"{pool['internal_api']} {pool.get('version') or ''}".strip() for pool in pools}),
            "threads": max((pool["num_threads"] for pool in pools), default=1), "chosen": blas.user_has_chosen()}


def judge_blas(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "blas threads"
    ranks_facts = job.facts["ranks"]
    crowded, share = [], 1
    for ranks in job.ranks_of_host().values():
        for rank in ranks:
            cores = set(ranks_facts[rank]["cores"])
            neighbours = [other for other in ranks if cores & set(ranks_facts[other]["cores"])]
            # Ranks that are threads of one process share its threads, too.
            processes = {ranks_facts[other]["pid"]: facts[other]["threads"] for other in neighbours}
            if sum(processes.values()) > max(len(_union(ranks_facts, neighbours)), len(processes)):
                crowded.append(rank)
                share = max(1, len(cores) // len(neighbours))
    libraries = ", ".join(facts[0]["libraries"]) or "none found"
    if crowded:
        return warn(name, f"{facts[crowded[0]]['threads']} a rank ({libraries}) are more than the cores of "
                    f"{ranks_text(crowded)}, which makes it many times slower",
                    f"set OMP_NUM_THREADS={share}, or leave it unset and cutp shares the cores out", crowded)
    counts = sorted({fact["threads"] for fact in facts})
    return ok(name, f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} a rank ({libraries})"
              + (", as the environment says" if facts[0]["chosen"] else ""))


_OPEN_FILES = 1024
_SHARED_MEMORY = 256 << 20
_LOCKED_MEMORY = 64 << 20


def probe_limits(job: Job) -> dict[str, Any]:
    import resource

    try:
        shm = os.statvfs("/dev/shm")
        shared = shm.f_bavail * shm.f_frsize
    except OSError:
        shared = None
    return {"files": _finite(resource.RLIMIT_NOFILE), "locked": _finite(resource.RLIMIT_MEMLOCK), "shared": shared}


def _finite(which: int) -> int | None:
    import resource

    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def judge_limits(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "limits"

    def below(key: str, least: int) -> list[int]:
        return [rank for rank, fact in enumerate(facts) if fact[key] is not None and fact[key] < least]

    if ranks := below("files", _OPEN_FILES):
        return warn(name, f"{facts[ranks[0]]['files']} open files are allowed on {ranks_text(ranks)}, too few for a "
                    "large checkpoint and many connections", f"ulimit -n {4 * _OPEN_FILES}", ranks)
    if job.size > 1 and (ranks := below("shared", _SHARED_MEMORY)):
        return warn(name, f"{facts[ranks[0]]['shared'] >> 20} MB are free in /dev/shm on {ranks_text(ranks)}, through "
                    "which MPI and NCCL move data inside a host",
                    "docker run --shm-size=1g or --ipc=host; or clear /dev/shm", ranks)
    if len(job.ranks_of_host()) > 1 and (ranks := below("locked", _LOCKED_MEMORY)):
        return warn(name, f"{facts[ranks[0]]['locked'] >> 10} kB may be locked in memory on {ranks_text(ranks)}, which "
                    "keeps NCCL and MPI from using InfiniBand",
                    "ulimit -l unlimited in the job; ask the site if that is refused", ranks)
    files = min((fact["files"] for fact in facts if fact["files"] is not None), default=None)
    shared = min((fact["shared"] for fact in facts if fact["shared"] is not None), default=None)
    return ok(name, f"{files or 'unlimited'} open files"
              + (f", {shared / 1e9:.1f} GB free in /dev/shm" if shared is not None else ""))


CHECKS = (
    Check("ranks", probe_ranks, judge_ranks),
    Check("cpu affinity", probe_affinity, judge_affinity, needs=("ranks",)),
    Check("blas threads", probe_blas, judge_blas, needs=("ranks",)),
    Check("limits", probe_limits, judge_limits),
)
