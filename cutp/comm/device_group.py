"""The devices of one tensor-parallel group, and collectives over the shards this process holds.

Under MPI each process holds one shard and the others are reached through a `Communicator`: the lists below have
length 1. A group made from a plain list of N devices lives in one process, which holds all N shards: the lists
have length N and a collective is arithmetic. Layers are written once, over lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.array.device import DeviceRef
from cutp.array.scratch import on_device
from cutp.comm.collectives import Pending, sum_in_rank_order
from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError


class DeviceGroup(Sequence[DeviceRef]):
    """The devices of a tensor-parallel group, in rank order.

    devices: one DeviceRef a rank. comm: the communicator of the group, whose size must equal the number of devices,
    or None when this process holds every shard.
    """

    def __init__(self, devices: Sequence[DeviceRef], comm: Communicator | None = None):
        self.devices = tuple(devices)
        self.comm = comm
        if not self.devices:
            raise ConfigError("a device group needs at least one device")
        if comm is not None and comm.size != len(self.devices):
            raise ConfigError(f"{len(self.devices)} devices were given for a communicator of {comm.size} ranks")
        self.local_ranks = tuple(range(len(self.devices))) if comm is None else (comm.rank,)

    @classmethod
    def of(cls, devices: Sequence[DeviceRef] | Communicator) -> DeviceGroup:
        """`devices` as a group: a group as it is, a communicator (CPU devices), or a plain list (one process)."""
        if isinstance(devices, DeviceGroup):
            return devices
        if isinstance(devices, Communicator):
            return cls([DeviceRef.CPU()] * devices.size, devices)
        return cls(devices)

    @classmethod
    def planned(cls, size: int, rank: int) -> DeviceGroup:
        """Rank `rank` of a group that does not exist: for shapes and sizes only, without any communication."""
        group = cls([DeviceRef.CPU()] * size)
        group.local_ranks = (rank,)
        return group

    def __len__(self) -> int:
        return len(self.devices)

    def __getitem__(self, index):
        return self.devices[index]

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def local_devices(self) -> tuple[DeviceRef, ...]:
        return tuple(self.devices[rank] for rank in self.local_ranks)

    def all_reduce(self, xs: list[np.ndarray]) -> list[np.ndarray]:
        """The sum over all ranks in rank order, once for every local shard; the dtype stays.

        ConfigError when the local arrays differ in shape or dtype.
        """
        self._check(xs)
        if len({(x.shape, x.dtype) for x in xs}) > 1:
            given = ", ".join(f"{x.dtype.name}{list(x.shape)}" for x in xs)
            raise ConfigError(f"all_reduce needs arrays of one shape and dtype, not {given}")
        if self.size == 1:
            return [xs[0]]
        if self.comm is not None:
            return [self.comm.all_reduce(xs[0])]
        total = sum_in_rank_order(xs)
        return [total] * len(xs)

    def all_reduce_async(self, xs: list[np.ndarray], out: np.ndarray | None = None) -> PendingSum:
        """Starts `all_reduce` and returns at once; `wait()` gives its result. `xs` must not change before that.

        out: like xs[0]; receives the sum, which is then the result for every local shard.
        """
        self._check(xs)
        if self.comm is not None:
            return PendingSum(self.comm.all_reduce_async(xs[0], out=out))
        sums = self.all_reduce(xs)
        if out is None:
            return PendingSum(None, sums)
        out[...] = sums[0]
        return PendingSum(None, [out] * len(xs))

    def all_gather(self, xs: list[np.ndarray], axis: int = -1) -> list[np.ndarray]:
        """The shards joined along `axis` in rank order, once for every local shard; sizes may differ."""
        self._check(xs)
        if self.size == 1:
            return [xs[0]]
        if self.comm is not None:
            return [self.comm.all_gather(xs[0], axis=axis)]
        return [np.concatenate(xs, axis=axis)] * len(xs)

    def _check(self, xs: list[np.ndarray]) -> None:
        if len(xs) != len(self.local_ranks):
            raise ConfigError(f"{len(xs)} arrays were given for {len(self.local_ranks)} local shards")
        if self.comm is None and len(self.local_ranks) != self.size:
            raise ConfigError("a planned device group has no peers to communicate with")
        if self.comm is None and self.size > 1 and any(on_device(x) for x in xs):
            raise ConfigError(f"a process computes on one GPU, but this device group has {self.size} shards in one",
                              hint="start one rank a GPU, for example with mpirun, and pass a communicator")


class PendingSum:
    """An all-reduce under way."""

    def __init__(self, pending: Pending | None, result: list[np.ndarray] | None = None):
        self._pending = pending
        self._result = result

    def wait(self) -> list[np.ndarray]:
        """The sum, once for every local shard. Call it once, in the order in which the sums were started."""
        return self._result if self._pending is None else [self._pending.wait()]
