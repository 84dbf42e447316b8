"""How a dimension is divided among ranks: the one rule for remainders, and the rule for attention heads.

Everything that is split anywhere (rows of a matrix, the vocabulary, the result of a reduce-scatter) is split by
`split_range`, so two sides of a communication can never disagree about who owns what.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutp.errors import ConfigError


def split_range(length: int, size: int, rank: int) -> tuple[int, int]:
    """(start, stop) of `rank`'s share of `length` elements: the first length % size ranks get one more."""
    base, remainder = divmod(length, size)
    start = rank * base + min(rank, remainder)
    return start, start + base + (rank < remainder)


@dataclass(frozen=True)
class HeadShare:
    """One rank's query heads [q_start, q_stop) and the key-value heads [kv_start, kv_stop) they read."""

    q_start: int
    q_stop: int
    kv_start: int
    kv_stop: int

    @property
    def n_heads(self) -> int:
        return self.q_stop - self.q_start

    @property
    def n_kv_heads(self) -> int:
        return self.kv_stop - self.kv_start


def split_heads(n_heads: int, n_kv_heads: int, size: int, rank: int) -> HeadShare:
    """`rank`'s heads under grouped-query attention; every query head is on exactly one rank.

    With at least as many key-value heads as ranks, whole groups are dealt out, so each key-value head is on one
    rank. With fewer, each rank reads a single key-value head: the ranks are dealt to the key-value heads and the
    ranks of one head share its group of query heads (its keys and values are replicated on them). Either way a
    rank's query heads divide evenly among its key-value heads, which is what attention kernels rely on.
    Raises ConfigError when a rank would have no query head.
    """
    if n_heads % n_kv_heads:
        raise ConfigError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly")
    if size > n_heads:
        raise ConfigError(f"{n_heads} heads cannot be divided among {size} ranks; at most {n_heads} ranks work")
    group = n_heads // n_kv_heads
    if n_kv_heads >= size:
        start, stop = split_range(n_kv_heads, size, rank)
        return HeadShare(start * group, stop * group, start, stop)
    for kv_head in range(n_kv_heads):
        first, last = split_range(size, n_kv_heads, kv_head)
        if first <= rank < last:
            start, stop = split_range(group, last - first, rank - first)
            return HeadShare(kv_head * group + start, kv_head * group + stop, kv_head, kv_head + 1)
    raise AssertionError("unreachable: the ranks are dealt out completely")
