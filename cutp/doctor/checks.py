"""Which checks there are, in their order: from what everything needs to what only some jobs do."""

from __future__ import annotations

from cutp.doctor import all_reduce, gpu, gpu_work, host, kernel_cache, launcher, software
from cutp.doctor.check import Check


def all_checks(mpi_only: bool = False) -> tuple[Check, ...]:
    """mpi_only: those that touch neither GPUs nor what only they need."""
    checks = (*launcher.CHECKS, *software.CHECKS, *host.CHECKS, *all_reduce.HOST_CHECKS)
    if mpi_only:
        return checks
    return (*checks, *kernel_cache.CHECKS, *gpu.CHECKS, *gpu_work.CHECKS, *all_reduce.GPU_CHECKS)
