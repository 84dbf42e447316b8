"""An all-reduce of one megabyte, checked and timed: through MPI on the host, through NCCL between GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cutp.doctor.check import Check, Job
from cutp.doctor.gpu import GPU_NEEDS, can_connect, use_gpu
from cutp.doctor.report import Finding, fail, ok, ranks_text, warn

_COUNT = 1 << 18
_ROUNDS = 7
_SLOW_HOST_MS = 100.0
_SLOW_GPU_MS = 5.0


def addend(rank: int) -> np.ndarray:
    """What a rank adds: small integers, so that every order of summation gives the same bits; float32, 1 MB."""
    return np.float32(rank + 1) * (np.arange(_COUNT) % 16).astype(np.float32)


def expected_sum(size: int) -> np.ndarray:
    return np.float32(size * (size + 1) // 2) * (np.arange(_COUNT) % 16).astype(np.float32)


def _measured(all_reduce: Callable[[], Any]) -> dict[str, Any]:
    """{"first": ms of the first call, "ms": of a later one}."""
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        all_reduce()
        times.append((time.perf_counter() - began) * 1e3)
    return {"first": times[0], "ms": statistics.median(times[1:])}


def _wrong(job: Job, total: np.ndarray) -> int:
    return int(np.count_nonzero(total != expected_sum(job.size)))


def probe_host(job: Job) -> dict[str, Any]:
    x, out = addend(job.rank), np.zeros(_COUNT, np.float32)
    return {**_measured(lambda: job.group.all_reduce(x, out=out)), "wrong": _wrong(job, out)}


def judge_host(job: Job, facts: list[dict[str, Any]]) -> Finding:
    return _judged("host all-reduce", job, facts, _SLOW_HOST_MS,
                   "an error in the MPI library or its transport: try another with UCX_TLS=tcp or FI_PROVIDER=tcp",
                   "ranks that share cores, or MPI that does not use the fast network: see its own diagnostics")


def probe_gpu(job: Job) -> dict[str, Any]:
    memory = use_gpu(job)
    host = addend(job.rank)
    x, out = memory.empty(host.shape, host.dtype), memory.empty(host.shape, host.dtype)
    memory.upload(x, host)

    def all_reduce() -> None:
        job.group.all_reduce(x, out=out)
        job.group.wait()

    return {**_measured(all_reduce), "wrong": _wrong(job, memory.numpy(out))}


def judge_gpu(job: Job, facts: list[dict[str, Any]]) -> Finding:
    return _judged("nccl all-reduce", job, facts, _SLOW_GPU_MS,
                   "an error of NCCL or of a link between GPUs: compare with NCCL_P2P_DISABLE=1 and NCCL_DEBUG=INFO",
                   "NCCL may not use NVLink or the fast network: NCCL_DEBUG=INFO shows its paths")


def _judged(name: str, job: Job, facts: list[dict[str, Any]], slow: float, fix_wrong: str, fix_slow: str) -> Finding:
    wrong = [rank for rank, fact in enumerate(facts) if fact["wrong"]]
    if wrong:
        text = f"{facts[wrong[0]]['wrong']} of {_COUNT} sums are wrong on {ranks_text(wrong)}"
        return fail(name, text, fix_wrong, wrong)
    worst, first = max(fact["ms"] for fact in facts), max(fact["first"] for fact in facts)
    text = f"1 MB over {job.size} ranks is right and takes {worst:.2f} ms (the first {first:.0f} ms)"
    return warn(name, text + ", which is slow", fix_slow) if worst > slow else ok(name, text)


HOST_CHECKS = (Check("host all-reduce", probe_host, judge_host, applies=lambda job: job.size > 1, collective=True),)
GPU_CHECKS = (Check("nccl all-reduce", probe_gpu, judge_gpu, applies=lambda job: job.size > 1 and can_connect(job),
                    needs=GPU_NEEDS, collective=True),)
