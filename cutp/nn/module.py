"""The module tree: weights that know their full shape and this rank's share, and modules that hold them.

Building a module takes no memory: a weight is a shape until it is loaded. So a model of any size can be built to be
measured (`cutp info`), sharded, and only then read slice by slice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError, MissingTensorError, ShapeMismatchError
from cutp.nn.sharding import Ranges, Shardable, ShardingStrategy
from cutp.nn.storage import Padding, storage


class Weight:
    """One named parameter: `shape` of the whole tensor, `dtype` its values are rounded to, and one rank's share.

    data: the share, or None before it is loaded. On the CPU it is float32, rounded to `dtype`; on a device it is of
    `device_dtype`, by default `dtype`, and its axes may be longer by the zeros of `padding`. clip: values are clamped
    to [-clip, clip] when they are stored.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, *, strategy: ShardingStrategy | None = None,
                 rank: int = 0, clip: float | None = None, device_dtype: np.dtype | None = None,
                 padding: Padding | None = None):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.strategy = strategy
        self.rank = rank
        self.clip = clip
        self.device_dtype, self.padding = device_dtype, padding
        self.data: np.ndarray | None = None
        self.sharding_strategy: ShardingStrategy | None = None

    @property
    def value(self) -> np.ndarray:
        """The data, for computing with it; ConfigError before the weight is loaded."""
        if self.data is None:
            raise ConfigError(f"a weight of shape {self.shape} was used before it was loaded",
                              hint="load the model's weights first, for example with Module.load")
        return self.data

    @property
    def axis(self) -> int | None:
        """The divided axis, or None when this rank holds the whole tensor."""
        return None if self.ranges is None else self.strategy.axis

    @property
    def ranges(self) -> Ranges | None:
        """The (start, stop) pairs this rank holds along `axis`, or None for the whole tensor."""
        return None if self.strategy is None else self.strategy.ranges(self.shape, self.rank)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shape if self.strategy is None else self.strategy.local_shape(self.shape, self.rank)

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's share in the weight's own dtype."""
        return math.prod(self.local_shape) * self.dtype.itemsize

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The local shape, with the zeros that the storage in use appends."""
        shape = list(self.local_shape)
        if self.padding is not None:
            axis, parts = self.padding
            shape[axis] = parts * storage().padded(shape[axis] // parts, self.dtype)
        return tuple(shape)

    @property
    def held_dtype(self) -> np.dtype:
        """The dtype that the storage in use holds the share in."""
        return storage().held_dtype(self.dtype, self.device_dtype)

    @property
    def held_bytes(self) -> int:
        """Bytes the share takes: where it is, or would take in the storage in use."""
        if self.data is not None:
            return self.data.nbytes
        return math.prod(self.held_shape) * self.held_dtype.itemsize

    def shard(self, devices) -> list[Weight]:
        """The shares of `devices` that this process holds, by `sharding_strategy`; see `ShardableModule.shard`."""
        return [self.share(self.sharding_strategy, rank) for rank in local_ranks(self, devices)]

    def share(self, strategy: ShardingStrategy, rank: int) -> Weight:
        """`rank`'s share as a weight of its own; data that is present is cut along. ConfigError if already cut."""
        if self.strategy is not None:
            raise ConfigError("a weight that is already a shard cannot be sharded again")
        part = Weight(self.shape, self.dtype, strategy=strategy, rank=rank, clip=self.clip,
                      device_dtype=self.device_dtype, padding=self.padding)
        part.local_shape  # noqa: B018  (raises now, not at load, when the strategy does not fit the shape)
        if self.data is not None:
            part.store(cut(self.data, part.axis, part.ranges))
        return part

    def store(self, array: np.ndarray) -> None:
        """Takes `array`, which must have the local shape, as the data; ShapeMismatchError otherwise."""
        if tuple(array.shape) != self.local_shape:
            raise ShapeMismatchError(f"an array of shape {tuple(array.shape)} was stored in a weight whose share has "
                                     f"shape {self.local_shape}")
        self.allocate()
        for start, stop in self.pieces():
            storage().put(self.rows(start, stop), self.rounded(array[start:stop]))

    def allocate(self) -> None:
        """Takes memory for the share from the storage in use, if it has none."""
        if self.data is None:
            shape = self.held_shape
            self.data = storage().empty(shape, self.held_dtype, zeros=shape != self.local_shape)

    def pieces(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """The allocated share's rows as (start, stop) pairs, at most `rows` each, none of which has padding inside."""
        length = self._run[0]
        step = max(1, length if rows is None else min(rows, length))
        for first in range(0, self.local_shape[0], max(1, length)):
            for start in range(first, first + length, step):
                yield start, min(start + step, first + length)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The place in `data` of one of `pieces`."""
        length, held = self._run
        first = start // length * held + start % length
        return self.data[first : first + stop - start]

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """`array` clamped to the clip, and of the weight's dtype."""
        if self.clip is not None:
            array = np.clip(array.astype(np.float32), -self.clip, self.clip)
        return array.astype(self.dtype, copy=False)

    @property
    def _run(self) -> tuple[int, int]:
        """Rows from one padding to the next, without it and with it."""
        length, held = self.local_shape[0], len(self.data)
        parts = 1 if held == length else self.padding.parts
        return length // parts, held // parts


def cut(array: np.ndarray, axis: int | None, ranges: Ranges | None) -> np.ndarray:
    """The parts `ranges` of `array` along `axis`, joined; the whole array when there are none."""
    if ranges is None:
        return array
    return np.concatenate([array.take(range(start, stop), axis=axis) for start, stop in ranges], axis=axis)


class Shards(list):
    """The shards of one module that this process holds; they share the module's name in the tree."""


class Module:
    """A node of the tree. Attributes that are weights, modules or lists of modules are its children.

    Two kinds of children do not appear in the names, their weights are named as if they were the parent's: a
    `transparent` module, and the shards in an attribute called `shards` (a parallel layer is named like the layer it
    divides).
    """

    transparent = False

    def named_weights(self, prefix: str = "") -> Iterator[tuple[str, Weight]]:
        """(dotted name, weight) of every weight below; each local shard of a weight comes under the same name."""
        seen: set[int] = set()
        for name, weight in self._walk(prefix):
            if id(weight) not in seen:  # a tied weight belongs to the module that comes first
                seen.add(id(weight))
                yield name, weight

    def modules(self) -> Iterator[Module]:
        """This module and all below it, parents first."""
        yield self
        for _, child in self._children():
            if isinstance(child, Module):
                yield from child.modules()

    def signature(self) -> dict[str, object]:
        """What must be equal for two modules to compute the same with other weights: name -> shape or setting.

        Shapes are those of whole weights, so that all ranks of a group come to the same answer.
        """
        found: dict[str, object] = {}
        for name, child in self._children():
            if isinstance(child, Weight):
                found[name] = f"{child.dtype.name}{list(child.shape)}"
            else:
                found.update({f"{name}.{key}" if name else key: value for key, value in child.signature().items()})
        plain = (bool, int, float, str, type(None))
        found.update({key: value for key, value in vars(self).items()
                      if isinstance(value, plain) and not key.startswith("_")})
        found["class"] = type(self).__qualname__
        return found

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes every weight from `tensors`, whole arrays by the names of `named_weights`; each shard its part.

        Raises MissingTensorError and ShapeMismatchError naming the weight; names that no weight has are refused too.
        """
        names = {name for name, _ in self.named_weights()}
        if unknown := sorted(set(tensors) - names):
            raise ConfigError(f"no weight is called {unknown[0]!r}", hint=f"the names are {', '.join(sorted(names))}")
        for name, weight in self.named_weights():
            if name not in tensors:
                raise MissingTensorError(f"no array was given for the weight {name!r}")
            if np.shape(tensors[name]) != weight.shape:
                raise ShapeMismatchError(f"the array for {name!r} has shape {np.shape(tensors[name])}, "
                                         f"not {weight.shape}")
        for module in self.modules():
            module.materialize()
        for name, weight in self.named_weights():
            weight.store(cut(np.asarray(tensors[name]), weight.axis, weight.ranges))

    def materialize(self) -> None:
        """Prepares storage before the weights are loaded; modules that stack weights override it."""

    def _children(self) -> Iterator[tuple[str, Weight | Module]]:
        """(name, child); the name is empty for a child whose weights are named as the parent's own."""
        for key, value in vars(self).items():
            if isinstance(value, Shards):
                for shard in value:
                    if isinstance(shard, (Weight, Module)):
                        yield "" if key == "shards" else key, shard
            elif isinstance(value, (Weight, Module)):
                yield "" if getattr(value, "transparent", False) else key, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                for index, item in enumerate(value):
                    yield f"{key}.{index}", item

    def _walk(self, prefix: str) -> Iterator[tuple[str, Weight]]:
        for name, child in self._children():
            if isinstance(child, Weight):
                yield prefix + name, child
            else:
                yield from child._walk(f"{prefix}{name}." if name else prefix)


class ShardableModule(Module):
    """A module that can be divided: set `sharding_strategy`, then `shard(devices)`.

    Subclasses say in `_accepts` which strategies fit and build one rank's share in `_shard`.
    """

    _strategy: ShardingStrategy | None = None

    @property
    def sharding_strategy(self) -> ShardingStrategy | None:
        return self._strategy

    @sharding_strategy.setter
    def sharding_strategy(self, strategy: ShardingStrategy) -> None:
        if not self._accepts(strategy):
            raise ConfigError(f"{type(self).__name__} cannot be sharded by strategy {strategy.kind!r}")
        self._strategy = strategy

    def shard(self, devices) -> Sequence[Self]:
        """The shards of `devices` (a DeviceGroup or a list of DeviceRef) that this process holds.

        One shard under MPI, one for every device when the devices live in this process. Data that is present is
        cut along. Raises ConfigError without a strategy, or when it is for another number of devices.
        """
        return Shards(self._shard(self._strategy, rank) for rank in local_ranks(self, devices))

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        raise NotImplementedError

    def _shard(self, strategy: ShardingStrategy, rank: int) -> Self:
        raise NotImplementedError

    def _copy(self) -> Self:
        """A shallow copy without a strategy, for `_shard` to put the cut weights in."""
        other = copy.copy(self)
        other._strategy = None
        return other


def local_ranks(shardable: Weight | ShardableModule, devices) -> tuple[int, ...]:
    """The ranks of `devices` whose shards this process holds, once the strategy is known to fit the devices."""
    group = DeviceGroup.of(devices)
    strategy = shardable.sharding_strategy
    name = type(shardable).__name__
    if strategy is None:
        raise ConfigError(f"{name} has no sharding strategy; set sharding_strategy first")
    if strategy.num_devices != group.size:
        raise ConfigError(f"the sharding strategy of {name} is for {strategy.num_devices} devices, but {group.size} "
                          "were given")
    return group.local_ranks


def sharded(module: Shardable, strategy: ShardingStrategy, devices) -> Shards:
    """Sets the strategy of `module`, which need not be a `Module`, and shards it."""
    module.sharding_strategy = strategy
    return Shards(module.shard(devices))
