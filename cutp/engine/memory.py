"""How much memory weights and cache take on this rank, and whether it is there."""

from __future__ import annotations

from pathlib import Path

from cutp.comm.communicator import Communicator
from cutp.errors import CapacityError
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.module import CPU_STORAGE, Module

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


def plan_cache_pages(params: KVCacheParams, max_len: int, comm: Communicator) -> int:
    """Pages of the cache, equal on all ranks: enough for many full-length requests, within the memory that is free.

    Raises CapacityError when not even one page fits.
    """
    page_bytes = params.bytes_per_token(comm.size, comm.rank) * params.page_size
    pages = _FULL_LENGTH_REQUESTS * -(-max_len // params.page_size)
    available = available_bytes()
    if available is not None:
        pages = min(pages, int(available * _CACHE_SHARE) // comm.local_size // page_bytes)
    pages = min(comm.host.all_gather_json(pages))
    if pages < 1:
        raise CapacityError(f"a cache page takes {_gb(page_bytes)}, and no rank-wide room is left for one "
                            f"({_gb(available or 0)} free on this host)")
    return pages


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
