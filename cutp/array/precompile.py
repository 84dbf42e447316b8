"""Compile many kernels ahead of their first launch: in parallel, and once per node."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cutp.array.compile import CompiledKernel
from cutp.array.kernel_cache import KernelCache
from cutp.array.kernel_source import read_source
from cutp.errors import CutpError


@dataclass(frozen=True)
class KernelSpec:
    """One build: a kernel file (of `cutp/ops`, or an absolute path), an architecture, a variant."""

    source: str
    arch: str
    defines: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def shared_cache() -> KernelCache:
    """The cache that all launches of this process use."""
    return KernelCache()


def build(spec: KernelSpec, cache: KernelCache | None = None) -> CompiledKernel:
    """The compiled kernel. Only declared variants are built (ConfigError); other errors: see `compile_cubin`."""
    source = read_source(spec.source)
    source.check_variant(spec.arch, spec.defines)
    cache = cache or shared_cache()
    return cache.get(source.text, source.name, spec.arch, spec.defines, source.headers)


def precompile(specs: Iterable[KernelSpec], comm: Any = None, *, cache: KernelCache | None = None) -> None:
    """Have the kernels in `cache`; with a Communicator, collective.

    On every node the rank with `local_rank` 0 compiles while the others wait, who then read its files. Where they
    cannot (no usable directory, containers with a /tmp of their own) each compiles for itself.

    Raises the error of the first spec that cannot be built. A kernel that does not compile raises on every rank,
    because every rank tries what its node's first rank failed to leave behind.
    """
    specs = list(dict.fromkeys(specs))
    failure = None
    if comm is None or comm.local_rank == 0:
        try:
            _build_all(specs, cache)
        except CutpError as error:
            failure = error  # raised after the barrier, at which the others wait
    if comm is not None:
        comm.host.barrier()
        if comm.local_rank != 0:
            _build_all(specs, cache)
    if failure is not None:
        raise failure


def _build_all(specs: list[KernelSpec], cache: KernelCache | None) -> None:
    # The compiler runs outside of Python's lock, hence threads. The first error in the order of specs is raised.
    workers = max(1, min(len(specs), usable_cores()))
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        for result in [pool.submit(build, spec, cache) for spec in specs]:
            result.result()


def usable_cores() -> int:
    """The number of CPU cores this process may use, which a launcher may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
