"""Linear layers: one matrix, several stacked ones, and the column-parallel output head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.errors import ConfigError
from cutp.nn.module import Module, ShardableModule, Shards, Weight, sharded
from cutp.nn.sharding import EvenSegment, OwnerSegment, Segment, ShardingStrategy, qkv_segments
from cutp.nn.storage import Padding, storage
from cutp.ops.dispatch import gated_linear, linear


class Linear(ShardableModule):
    """y = x W^T + b with weight [out_dim, in_dim] and bias [out_dim].

    Sharded along axis 0 ("rowwise", and the segmented kinds) it is a column-parallel layer: each rank computes some
    of the outputs, with their part of the bias. Sharded along axis 1 ("columnwise", "head_aware_columnwise") it is
    a row-parallel layer: each rank takes some of the inputs and computes a partial sum of all outputs, and only
    rank 0 keeps the bias, so that the sum over ranks has it once. clip_weight: the weight is clamped to
    [-clip_weight, clip_weight] when it is loaded. padding: an axis of the weight that a device may need longer; the
    outputs then are, or the inputs must be.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: np.dtype, *, has_bias: bool = False,
                 clip_weight: float | None = None, padding: Padding | None = None):
        self.in_dim, self.out_dim = in_dim, out_dim
        self.weight = Weight((out_dim, in_dim), dtype, clip=clip_weight, padding=padding)
        of_rows = padding if padding is not None and padding.axis == 0 else None
        self.bias = Weight((out_dim,), dtype, padding=of_rows) if has_bias else None

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x [T, in] -> [T, out], in the dtype of `x`."""
        bias = self.bias.value if self.bias is not None and self.bias.local_shape[0] else None
        return linear(x, self.weight.value, bias, out)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.is_replicate or strategy.axis in (0, 1)

    def _shard(self, strategy: ShardingStrategy, rank: int) -> Linear:
        part = self._copy()
        part.weight = self.weight.share(strategy, rank)
        part.out_dim, part.in_dim = part.weight.local_shape
        if self.bias is not None:
            if strategy.axis == 1:
                strategy = ShardingStrategy.segmented(strategy.num_devices, 0, [OwnerSegment(self.out_dim)])
            part.bias = self.bias.share(strategy, rank)
        return part


class StackedLinear(ShardableModule):
    """Several matrices with the same input, stacked so that one product computes them all.

    The weights keep the names a checkpoint gives them (`q_proj.weight`, `k_proj.weight`, ...) and are views into one
    buffer. names, segments: one a matrix, the segment saying how its rows are divided among ranks.
    """

    transparent = True

    def __init__(self, in_dim: int, names: Sequence[str], segments: Sequence[Segment], dtype: np.dtype, *,
                 has_bias: bool = False, padding: Padding | None = None):
        self.names = tuple(names)
        self.segments = tuple(segments)
        for name, segment in zip(self.names, self.segments, strict=True):
            setattr(self, name, Linear(in_dim, segment.length, dtype, has_bias=has_bias, padding=padding))
        self._weight: np.ndarray | None = None
        self._bias: np.ndarray | None = None

    @property
    def parts(self) -> list[Linear]:
        return [getattr(self, name) for name in self.names]

    @property
    def out_dims(self) -> list[int]:
        """Rows of each matrix that this shard holds."""
        return [part.out_dim for part in self.parts]

    def materialize(self) -> None:
        """Makes the stacked buffer; weights that already have data move into it."""
        self._weight = stack_weights([part.weight for part in self.parts])
        if self.parts[0].bias is not None:
            self._bias = stack_weights([part.bias for part in self.parts])

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x [T, in] -> [T, sum of out_dims], the outputs of the matrices side by side."""
        if self._weight is None:
            self.materialize()
        return linear(x, self._weight, self._bias, out)

    def gated(self, x: np.ndarray, activation: str, limit: float | None = None) -> np.ndarray:
        """act(first output) * second output, for two equally wide matrices (`cutp.ops.activation.gated_activation`)."""
        if self._weight is None:
            self.materialize()
        return gated_linear(x, self._weight, self._bias, activation, limit=limit)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> StackedLinear:
        part = self._copy()
        part._weight = part._bias = None
        for name, segment in zip(self.names, self.segments, strict=True):
            own = strategy if strategy.is_replicate else ShardingStrategy.segmented(strategy.num_devices, 0, [segment])
            setattr(part, name, getattr(self, name)._shard(own, rank))
        return part


class FusedLinear(Linear):
    """Several matrices with the same input whose checkpoint holds them as one, each divided among ranks by itself.

    What `StackedLinear` computes, with one `weight` (and `bias`) under this layer's own name. segments: the runs of
    rows, one a matrix. Accepts the strategies replicate and tensor_parallel.
    """

    def __init__(self, in_dim: int, segments: Sequence[Segment], dtype: np.dtype, *, has_bias: bool = False,
                 padding: Padding | None = None):
        super().__init__(in_dim, sum(segment.length for segment in segments), dtype, has_bias=has_bias, padding=padding)
        self.segments = tuple(segments)

    @property
    def out_dims(self) -> list[int]:
        """Rows of each matrix that this shard holds."""
        ranges = self.weight.ranges
        return [segment.length for segment in self.segments] if ranges is None else [b - a for a, b in ranges]

    def gated(self, x: np.ndarray, activation: str, limit: float | None = None) -> np.ndarray:
        """act(first output) * second output, for two equally wide matrices (`cutp.ops.activation.gated_activation`)."""
        return gated_linear(x, self.weight.value, None if self.bias is None else self.bias.value, activation,
                            limit=limit)

    def signature(self) -> dict[str, object]:
        return {**super().signature(), "segments": self.segments}

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> FusedLinear:
        own = strategy if strategy.is_replicate else ShardingStrategy.segmented(strategy.num_devices, 0, self.segments)
        return super()._shard(own, rank)


def stack_weights(weights: Sequence[Weight]) -> np.ndarray:
    """One buffer with the shares of `weights` on top of each other; each weight's data becomes its part of it."""
    shapes = [weight.held_shape for weight in weights]
    rows = [shape[0] for shape in shapes]
    padded = any(weight.local_shape != shape for weight, shape in zip(weights, shapes, strict=True))
    buffer = storage().empty((sum(rows), *shapes[0][1:]), weights[0].held_dtype, zeros=padded)
    for weight, stop in zip(weights, itertools.accumulate(rows), strict=True):
        view = buffer[stop - weight.held_shape[0] : stop]
        if weight.data is not None:
            view[...] = weight.data
        weight.data = view
    return buffer


def qkv_linear(in_dim: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: np.dtype, *,
               has_bias: bool = False, fused: bool = False) -> StackedLinear | FusedLinear:
    """Query, key and value projections as one layer, divided by whole heads (key-value heads replicate).

    fused: the checkpoint has one weight for all three.
    """
    segments = qkv_segments(n_heads, head_dim, n_kv_heads)
    if fused:
        return FusedLinear(in_dim, segments, dtype, has_bias=has_bias)
    return StackedLinear(in_dim, ("q_proj", "k_proj", "v_proj"), segments, dtype, has_bias=has_bias)


def gate_up_linear(in_dim: int, width: int, dtype: np.dtype, *, has_bias: bool = False,
                   fused: bool = False) -> StackedLinear | FusedLinear:
    """Gate and up projections as one layer, each divided by itself. fused: the checkpoint has one weight for both."""
    segments = [EvenSegment(width)] * 2
    if fused:
        return FusedLinear(in_dim, segments, dtype, has_bias=has_bias, padding=Padding(0, 2))
    return StackedLinear(in_dim, ("gate_proj", "up_proj"), segments, dtype, has_bias=has_bias, padding=Padding(0))


class ColumnParallelLinear(Module):
    """A linear layer whose outputs are divided among the devices and gathered: the output head.

    tied_weight: the `VocabParallelEmbedding` whose table it shares.
    Raises ConfigError without devices, or with a tied weight and a bias.
    """

    def __init__(self, in_dim: int, out_dim: int, dtype: np.dtype, devices, tied_weight: Module | None = None, *,
                 has_bias: bool = False):
        if tied_weight is not None and has_bias:
            raise ConfigError("ColumnParallelLinear cannot have a bias when its weight is tied")
        self.group = DeviceGroup.of(devices)
        layer = Linear(in_dim, out_dim, dtype, has_bias=has_bias)
        self.out_dim = out_dim
        self.shards: Shards = sharded(layer, ShardingStrategy.rowwise(self.group.size), self.group)
        if tied_weight is not None:
            for shard, tied in zip(self.shards, tied_weight.shards, strict=True):
                if tied.weight.shape != shard.weight.shape:
                    raise ConfigError(f"the tied weight has shape {tied.weight.shape}, "
                                      f"the head needs {shard.weight.shape}")
                shard.weight = tied.weight

    @property
    def starts(self) -> list[int]:
        """The first output each local shard computes."""
        return [shard.weight.ranges[0][0] for shard in self.shards]

    def local(self, xs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each local shard's own outputs, not gathered: [T, in] -> [T, out_local]."""
        return [shard(x) for shard, x in zip(self.shards, xs, strict=True)]

    def __call__(self, xs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """[T, in] -> [T, out], all outputs on every device."""
        return self.group.all_gather(self.local(xs), axis=-1)
