"""How many threads BLAS may use when several ranks share the cores of a node.

Left alone, every rank's BLAS starts a thread per core, and N ranks on N cores run several times slower than one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_USER_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_lasting_limit: threadpool_limits | None = None


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def ranks_share_of_cores(local_size: int) -> int:
    return max(1, len(usable_cores()) // local_size)


def user_has_chosen() -> bool:
    return any(os.environ.get(name) for name in _USER_VARIABLES)


def cap_blas_threads(local_size: int) -> int | None:
    """Let BLAS use this rank's share of the cores when `local_size` ranks run on them; returns the share.

    Does nothing and returns None if the user has chosen a number (OMP_NUM_THREADS, ...), if there is only one
    rank, or if the process has been capped before: the first communicator is the one that spans most ranks.
    """
    global _lasting_limit
    if local_size == 1 or _lasting_limit is not None or user_has_chosen():
        return None
    share = ranks_share_of_cores(local_size)
    _lasting_limit = threadpool_limits(share)
    return share


@contextmanager
def limited_blas_threads(n: int) -> Iterator[None]:
    """BLAS uses n threads inside the `with` block, unless the user has chosen a number."""
    if user_has_chosen():
        yield
        return
    with threadpool_limits(n):
        yield
