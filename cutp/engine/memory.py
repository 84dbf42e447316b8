"""How much memory weights and cache take on this rank, and whether it is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cutp.comm.communicator import Communicator
from cutp.engine.replicas import Replicas
from cutp.errors import CapacityError
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.module import CPU_STORAGE, Module

if TYPE_CHECKING:
    from cutp.engine.core import EngineCore

# Share of the memory left after the weights that the cache may take, and the number of full-length requests beyond
# which more cache does not help.
_CACHE_SHARE = 0.5
_FULL_LENGTH_REQUESTS = 64


def available_bytes() -> int | None:
    """Memory this machine (or the control group of the job) can still give, or None where that is not known."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def weight_bytes(model: Module) -> int:
    """Bytes this rank's weights take on the CPU, where they are held as float32."""
    return sum(weight.local_bytes // weight.dtype.itemsize * CPU_STORAGE.itemsize
               for _, weight in model.named_weights())


def check_weights_fit(model: Module, comm: Communicator) -> None:
    """CapacityError with the arithmetic when this host cannot hold the weights of its ranks."""
    available, needed = available_bytes(), weight_bytes(model)
    if available is not None and needed * comm.local_size > available:
        raise CapacityError(f"weights take {_gb(needed)} a rank as float32, times {comm.local_size} ranks on this "
                            f"host, and {_gb(available)} are free", hint="use more hosts, or a smaller model")


def plan_cache_pages(params: KVCacheParams, max_len: int, kv_tokens: int | None, replicas: Replicas) -> int:
    """Pages of the cache, equal on all ranks of all replicas: `kv_tokens`, or enough for many full-length requests;
    within the memory that is free.

    Raises CapacityError when that is not there, or when not even one page fits.
    """
    comm, group = replicas.comm, replicas.group
    page_bytes = params.bytes_per_token(group.size, group.rank) * params.page_size
    if kv_tokens is None:
        pages = _FULL_LENGTH_REQUESTS * -(-max_len // params.page_size)
    else:
        pages = -(-kv_tokens // params.page_size)
    available = available_bytes()
    fitting = pages
    if available is not None:
        fitting = int(available * _CACHE_SHARE) // comm.local_size // page_bytes
    fitting = min(comm.host.all_gather_json(fitting))
    if fitting < 1:
        raise CapacityError(f"a cache page takes {_gb(page_bytes)}, and no rank-wide room is left for one "
                            f"({_gb(available or 0)} free on this host)")
    if kv_tokens is not None and fitting < pages:
        raise CapacityError(f"a cache of {kv_tokens} tokens takes {_gb(pages * page_bytes)} a rank, times "
                            f"{comm.local_size} ranks on this host, and {_gb(available or 0)} are free, of which the "
                            f"cache may take {_CACHE_SHARE:.0%}", hint="set a smaller kv_tokens")
    return min(pages, fitting)


def memory_report(core: EngineCore) -> dict[str, int]:
    """What this rank holds: weight_bytes, cache_bytes (all pages; the system gives memory to those that were used),
    cache_tokens (what fits into the cache) and cache_tokens_in_use (whole pages that requests hold).
    """
    cache, pool = core.runner.cache, core.scheduler.pool
    return {"weight_bytes": weight_bytes(core.runner.model), "cache_bytes": sum(block.nbytes for block in cache.blocks),
            "cache_tokens": pool.num_pages * pool.page_size,
            "cache_tokens_in_use": (pool.num_pages - pool.free_pages) * pool.page_size}


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
