"""The gated feed-forward layer."""

from __future__ import annotations

import numpy as np

from cutp.nn.linear import Linear, gate_up_linear
from cutp.nn.module import ShardableModule
from cutp.nn.sharding import ShardingStrategy
from cutp.nn.storage import Padding
from cutp.ops.activation import activation_name


class MLP(ShardableModule):
    """down_proj(act(gate_proj(x)) * up_proj(x)).

    Under tensor parallelism gate and up are divided by output and down by input, so a shard's result is a partial
    sum over ranks. Accepts the strategies replicate and tensor_parallel. swiglu_limit: see
    `cutp.ops.activation.gated_activation`. fused: gate and up are one weight, `gate_up_proj`.
    """

    def __init__(self, hidden_dim: int, feed_forward_length: int, dtype: np.dtype, *, activation: str = "silu",
                 has_bias: bool = False, swiglu_limit: float | None = None, fused: bool = False):
        self.activation = activation_name(activation)
        self.swiglu_limit = swiglu_limit
        self.gate_up_proj = gate_up_linear(hidden_dim, feed_forward_length, dtype, has_bias=has_bias, fused=fused)
        self.down_proj = Linear(feed_forward_length, hidden_dim, dtype, has_bias=has_bias, padding=Padding(1))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; a partial sum when this is a tensor-parallel shard."""
        return self.down_proj(self.activated(x))

    def activated(self, x: np.ndarray) -> np.ndarray:
        """The input of down_proj: x [T, hidden] -> [T, feed_forward_length of this shard]."""
        return self.gate_up_proj.gated(x, self.activation, limit=self.swiglu_limit)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> MLP:
        part = self._copy()
        part.gate_up_proj = self.gate_up_proj._shard(strategy, rank)
        down = strategy if strategy.is_replicate else ShardingStrategy.columnwise(strategy.num_devices)
        part.down_proj = self.down_proj._shard(down, rank)
        return part
