"""Sharding strategies: which part of a weight a rank of a tensor-parallel group holds.

A strategy names an axis and a list of segments along it. Every segment is divided among the ranks by itself, and a
rank's share is its part of each segment, in order. All remainders follow one rule (`cutp.comm.partition`): the
first ranks get one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from cutp.comm.partition import split_heads, split_range
from cutp.errors import ConfigError

Ranges = list[tuple[int, int]]


@runtime_checkable
class Shardable(Protocol):
    """What can be divided among devices: set `sharding_strategy`, then `shard(devices)` gives this process's shards."""

    sharding_strategy: ShardingStrategy | None

    def shard(self, devices) -> Sequence[Self]: ...


class Segment(Protocol):
    """A run of rows or columns that is divided among the ranks as one thing."""

    @property
    def length(self) -> int: ...

    def share(self, rank: int, size: int) -> tuple[int, int]:
        """(start, stop) of `rank`'s share, relative to the segment."""


@dataclass(frozen=True)
class EvenSegment:
    """`length` rows divided as evenly as they can be."""

    length: int

    def share(self, rank: int, size: int) -> tuple[int, int]:
        return split_range(self.length, size, rank)


@dataclass(frozen=True)
class HeadSegment:
    """The rows of attention heads, which are never cut inside a head.

    Query rows (n_heads * head_dim) by default; with `key_value`, the rows of the key-value heads that a rank's query
    heads read, so the same rows go to several ranks where there are more ranks than key-value heads.
    """

    n_heads: int
    head_dim: int
    n_kv_heads: int | None = None
    key_value: bool = False

    @property
    def length(self) -> int:
        heads = self.n_kv_heads if self.key_value and self.n_kv_heads is not None else self.n_heads
        return heads * self.head_dim

    def share(self, rank: int, size: int) -> tuple[int, int]:
        share = split_heads(self.n_heads, self.n_kv_heads or self.n_heads, size, rank)
        first, last = (share.kv_start, share.kv_stop) if self.key_value else (share.q_start, share.q_stop)
        return first * self.head_dim, last * self.head_dim


@dataclass(frozen=True)
class OwnerSegment:
    """`length` rows that one rank holds alone: an expert, or what is added once to a sum over ranks."""

    length: int
    owner: int = 0

    def share(self, rank: int, size: int) -> tuple[int, int]:
        return (0, self.length) if rank == self.owner else (0, 0)


@dataclass(frozen=True)
class ShardingStrategy:
    """How a weight or a module is divided among `num_devices` ranks. Make one with the static methods.

    axis: the divided axis, None for a replicated weight. segments: the runs along it; without them the whole axis is
    one even segment.
    """

    kind: str
    num_devices: int
    axis: int | None = None
    segments: tuple[Segment, ...] = ()

    @staticmethod
    def replicate(num_devices: int) -> ShardingStrategy:
        """Every rank holds the whole weight."""
        return ShardingStrategy("replicate", num_devices)

    @staticmethod
    def rowwise(num_devices: int) -> ShardingStrategy:
        """Axis 0, the output dimension of a [out, in] matrix."""
        return ShardingStrategy("rowwise", num_devices, 0)

    @staticmethod
    def columnwise(num_devices: int) -> ShardingStrategy:
        """Axis 1, the input dimension of a [out, in] matrix: each rank's product is a partial sum."""
        return ShardingStrategy("columnwise", num_devices, 1)

    @staticmethod
    def axiswise(axis: int, num_devices: int) -> ShardingStrategy:
        """Any one axis (counted from 0)."""
        return ShardingStrategy("axiswise", num_devices, axis)

    @staticmethod
    def head_aware_columnwise(num_devices: int, num_heads: int, head_dim: int,
                              num_kv_heads: int | None = None) -> ShardingStrategy:
        """Axis 1 by whole query heads: the output projection of attention."""
        segment = HeadSegment(num_heads, head_dim, num_kv_heads)
        return ShardingStrategy("head_aware_columnwise", num_devices, 1, (segment,))

    @staticmethod
    def stacked_qkv(num_devices: int, num_heads: int, head_dim: int,
                    num_kv_heads: int | None = None) -> ShardingStrategy:
        """Axis 0, query, key and value rows stacked, each by whole heads."""
        return ShardingStrategy.segmented(num_devices, 0, qkv_segments(num_heads, head_dim, num_kv_heads))

    @staticmethod
    def gate_up(num_devices: int, axis: int = 2) -> ShardingStrategy:
        """`axis` holds the gate and then the up projection, equally long; each half is divided."""
        return ShardingStrategy("gate_up", num_devices, axis)

    @staticmethod
    def segmented(num_devices: int, axis: int, segments: Sequence[Segment]) -> ShardingStrategy:
        """Any list of segments along one axis."""
        if not segments:
            raise ConfigError("a segmented strategy needs at least one segment")
        return ShardingStrategy("segmented", num_devices, axis, tuple(segments))

    @staticmethod
    def tensor_parallel(num_devices: int) -> ShardingStrategy:
        """A module's own way to be divided; each module that accepts it says what it does."""
        return ShardingStrategy("tensor_parallel", num_devices)

    @staticmethod
    def expert_parallel(num_devices: int) -> ShardingStrategy:
        """Whole experts on each rank; a mixture-of-experts module says what it does."""
        return ShardingStrategy("expert_parallel", num_devices)

    def __post_init__(self):
        if self.num_devices < 1:
            raise ConfigError(f"strategy {self.kind} was made for {self.num_devices} devices; it needs at least 1")
        if self.axis is not None and self.axis < 0:
            raise ConfigError(f"strategy {self.kind} divides axis {self.axis}; axes are counted from 0")

    @property
    def is_replicate(self) -> bool:
        return self.kind == "replicate"

    def ranges(self, shape: Sequence[int], rank: int) -> Ranges | None:
        """`rank`'s (start, stop) pairs along `axis` of a weight of `shape`, or None for the whole weight."""
        if self.is_replicate:
            return None
        if self.axis is None:
            raise NotImplementedError(f"{self.kind} divides modules; a single weight needs one of the axis strategies")
        if self.axis >= len(shape):
            raise ConfigError(f"strategy {self.kind} divides axis {self.axis}, but the weight has shape {tuple(shape)}")
        if not 0 <= rank < self.num_devices:
            raise ConfigError(f"rank {rank} is not one of the {self.num_devices} of strategy {self.kind}")
        length = shape[self.axis]
        segments = self._segments(length)
        if sum(segment.length for segment in segments) != length:
            lengths = " + ".join(str(segment.length) for segment in segments)
            raise ConfigError(f"strategy {self.kind} expects {lengths} entries along axis {self.axis}, "
                              f"but the weight has shape {tuple(shape)}")
        ranges, start = [], 0
        for segment in segments:
            first, last = segment.share(rank, self.num_devices)
            ranges.append((start + first, start + last))
            start += segment.length
        return ranges

    def _segments(self, length: int) -> tuple[Segment, ...]:
        if self.kind == "gate_up":
            if length % 2:
                raise ConfigError(f"gate_up divides two equal halves, but axis {self.axis} has {length} entries")
            return (EvenSegment(length // 2),) * 2
        return self.segments or (EvenSegment(length),)

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of `rank`'s share of a weight of `shape`."""
        ranges = self.ranges(shape, rank)
        if ranges is None:
            return tuple(shape)
        local = list(shape)
        local[self.axis] = sum(stop - start for start, stop in ranges)
        return tuple(local)


def qkv_segments(num_heads: int, head_dim: int, num_kv_heads: int | None = None) -> list[Segment]:
    """The row segments of stacked query, key and value projections."""
    return [HeadSegment(num_heads, head_dim, num_kv_heads),
            HeadSegment(num_heads, head_dim, num_kv_heads, key_value=True),
            HeadSegment(num_heads, head_dim, num_kv_heads, key_value=True)]
