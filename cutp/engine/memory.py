"""How much memory weights and cache take on this rank, and whether it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cutp.array.scratch import Memory
from cutp.comm.communicator import Communicator
from cutp.engine.replicas import Replicas
from cutp.errors import CapacityError, ConfigError
from cutp.kv_cache.params import KVCacheParams
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.module import Module

if TYPE_CHECKING:
    from cutp.engine.core import EngineCore

# Share of the memory left after the weights that the cache may take, and the number of full-length requests beyond
# which more cache does not help.
_CACHE_SHARE = 0.5
_FULL_LENGTH_REQUESTS = 64

# On a GPU: what NCCL, graphs, kernels and cuBLASLt take, and the share of what is left that the cache may take.
_DEVICE_RESERVE = 1 << 30
_DEVICE_CACHE_SHARE = 0.9

_UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)},
          **{f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}}


def parse_bytes(value: int | str, name: str) -> int:
    """A number of bytes, from an int or a text like "20GB" (10**9) or "1.5 GiB" (2**30). ConfigError for others."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value, re.ASCII)
        if found and found[2].upper() in _UNITS:
            value = int(float(found[1]) * _UNITS[found[2].upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive number of bytes, not {value!r}",
                          hint="for example 20GB (10**9 bytes each) or 20GiB (2**30)")
    return value


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
    """Bytes this rank's weights take: where they are, or will be in the storage in use."""
    return sum(weight.held_bytes for _, weight in model.named_weights())


def check_weights_fit(model: Module, comm: Communicator) -> None:
    """CapacityError with the arithmetic when this host cannot hold the weights of its ranks."""
    available, needed = available_bytes(), weight_bytes(model)
    if available is not None and needed * comm.local_size > available:
        raise CapacityError(f"weights take {_gb(needed)} a rank as float32, times {comm.local_size} ranks on this "
                            f"host, and {_gb(available)} are free", hint="use more hosts, or a smaller model")


def plan_cache_pages(params: KVCacheParams, max_len: int, kv_tokens: int | None, replicas: Replicas,
                     kv_memory: int | None = None) -> int:
    """Pages of a cache on the host, equal on all ranks of all replicas: for `kv_tokens`, of `kv_memory` bytes a rank,
    or enough for many full-length requests; within the memory that is free.

    Raises CapacityError when that is not there, or when not even one page fits.
    """
    comm, group = replicas.comm, replicas.group
    page_bytes = params.bytes_per_token(group.size, group.rank) * params.page_size
    pages = _wanted_pages(params, page_bytes, max_len, kv_tokens, kv_memory)
    available = available_bytes()
    fitting = pages
    if available is not None:
        fitting = int(available * _CACHE_SHARE) // comm.local_size // page_bytes
    pages, fitting = (min(found) for found in zip(*comm.host.all_gather_json([pages, fitting]), strict=True))
    if min(pages, fitting) < 1:
        raise CapacityError(f"a cache page takes {_gb(page_bytes)}, and no rank-wide room is left for one "
                            f"({_gb(available or 0)} free on this host)")
    if (kv_tokens is not None or kv_memory is not None) and fitting < pages:
        raise CapacityError(f"a cache of {pages * params.page_size} tokens takes {_gb(pages * page_bytes)} a rank, "
                            f"times {comm.local_size} ranks on this host, and {_gb(available or 0)} are free, of which "
                            f"the cache may take {_CACHE_SHARE:.0%}", hint="set a smaller kv_tokens or kv_memory")
    return min(pages, fitting)


def _wanted_pages(params: KVCacheParams, page_bytes: int, max_len: int, kv_tokens: int | None,
                  kv_memory: int | None) -> int:
    if kv_memory is not None:
        return kv_memory // page_bytes
    if kv_tokens is not None:
        return -(-kv_tokens // params.page_size)
    return _FULL_LENGTH_REQUESTS * -(-max_len // params.page_size)


@dataclass(frozen=True)
class DevicePlan:
    """What one rank's GPU holds, in bytes: weights, what passes and libraries need, the cache. free: before any of it;
    a rank that shares its GPU has its part of that."""

    weights: int
    reserve: int
    page_bytes: int
    pages: int
    tokens: int
    free: int

    def __str__(self) -> str:
        """As in "weights 8.0 GB + KV 21.4 GB for 327k tokens, of 139.0 GB free"."""
        tokens = f"{self.tokens // 1000}k" if self.tokens >= 10_000 else str(self.tokens)
        return (f"weights {_gb(self.weights)} + KV {_gb(self.pages * self.page_bytes)} for {tokens} tokens, "
                f"of {_gb(self.free)} free")


def plan_device_memory(model: DistributedTransformer, max_len: int, kv_tokens: int | None, kv_memory: int | None,
                       replicas: Replicas, memory: Memory, *, max_batch_tokens: int, max_running: int,
                       sharers: int = 1) -> DevicePlan:
    """The plan of this rank's GPU, before weights are loaded; the storage in use is the GPU's. Collective.

    The cache has equally many pages on all ranks: as `plan_cache_pages`, within what the weights of every rank, and a
    reserve for computing, leave free. Raises CapacityError with the arithmetic, of the first rank where it does not
    work out, on all ranks.
    """
    comm, group, params = replicas.comm, replicas.group, model.kv_params
    page_bytes = params.bytes_per_token(group.size, group.rank) * params.page_size
    reserve = _DEVICE_RESERVE + _pass_bytes(model, group.size, max_batch_tokens, max_running)
    facts = comm.host.all_gather_json([memory.free_bytes()[0] // sharers, weight_bytes(model), reserve, page_bytes])
    wanted, fixed = [], kv_tokens is not None or kv_memory is not None
    for rank, (free, weights, rest, page) in enumerate(facts):
        where, left = f"rank {rank} ({comm.hosts[rank]})", free - weights - rest
        if left < page:
            raise CapacityError(
                f"{where}: weights {_gb(weights)} + {_gb(rest)} to compute with + {_gb(page)} for one page of the "
                f"cache are {_gb(weights + rest + page)}, and {_gb(free)} are free on its GPU",
                hint="use more ranks for a replica, a 16-bit dtype, or a GPU that others do not use")
        pages = _wanted_pages(params, page, max_len, kv_tokens, kv_memory)
        if pages < 1:
            raise CapacityError(f"{where}: kv_memory of {_gb(kv_memory or 0)} is less than one page of the cache, "
                                f"{_gb(page)}", hint="set a larger kv_memory")
        if fixed and pages * page > left:
            raise CapacityError(
                f"{where}: weights {_gb(weights)} + {_gb(rest)} to compute with + KV {_gb(pages * page)} for "
                f"{pages * params.page_size} tokens are {_gb(weights + rest + pages * page)}, and {_gb(free)} are free "
                "on its GPU", hint=f"set kv_memory to at most {_gb(left)}")
        wanted.append(pages if fixed else min(pages, max(1, int(left * _DEVICE_CACHE_SHARE) // page)))
    free, weights, rest, page = facts[comm.rank]
    return DevicePlan(weights, rest, page, min(wanted), min(wanted) * params.page_size, free)


def _pass_bytes(model: DistributedTransformer, size: int, max_batch_tokens: int, max_running: int) -> int:
    """An upper estimate of what one forward pass and one round of sampling take."""
    kv = model.kv_params
    widest, itemsize = model.dim, kv.dtype.itemsize
    for _, weight in model.named_weights():
        if len(weight.shape) == 2 and weight.shape[0] != model.vocab_size:
            widest = max(widest, *weight.held_shape)
    copies = max((getattr(module, "top_k", 1) for module in model.modules()), default=1)  # experts of a token
    logits = min(max_running, max_batch_tokens) * -(-model.vocab_size // size) * 4
    return max_batch_tokens * (6 * model.dim + 4 * widest) * copies * itemsize + 3 * logits


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
