"""Mixture of experts: a feed-forward layer of many, of which each token uses a few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp import settings
from cutp.comm.partition import split_range
from cutp.errors import ConfigError
from cutp.nn.linear import Linear, stack_weights
from cutp.nn.mlp import MLP
from cutp.nn.module import Module, ShardableModule
from cutp.nn.moe_router import Router
from cutp.nn.sharding import OwnerSegment, ShardingStrategy
from cutp.nn.storage import Padding, storage
from cutp.ops.activation import activation_name
from cutp.ops.dispatch import (
    activation,
    clamped_swiglu,
    combine_experts,
    expert_rows,
    gated_activation,
    grouped_linear,
    residual_add,
    scale_rows,
)


class MoE(ShardableModule):
    """The sum of the experts that `gate` chooses for a token, weighted, plus that of the shared experts.

    shared_experts: a layer every token takes. shared_expert_gate: [1, hidden], its result is multiplied by the sigmoid
    of it. expert_parallel: how the experts are divided among ranks, see `Experts`; None for what `CUTP_MOE` says. The
    router is replicated and shared experts are tensor-parallel in both.

    A shard's result is a partial sum over ranks: usable as the `mlp` of a block. Accepts the strategies replicate,
    tensor_parallel and expert_parallel; the attribute `expert_parallel` tells a block which of the last two to use.
    takes_slots tells it that a call may be given the slots of the tokens, see `Router`.
    """

    takes_slots = True

    def __init__(self, gate: Router, experts: Experts, *, shared_experts: MLP | None = None,
                 shared_expert_gate: Linear | None = None, expert_parallel: bool | None = None):
        if gate.weight.shape[0] != experts.num_experts:
            raise ConfigError(f"the router chooses among {gate.weight.shape[0]} experts, but there are "
                              f"{experts.num_experts}")
        if shared_expert_gate is not None and shared_experts is None:
            raise ConfigError("shared_expert_gate was given without shared_experts")
        self.gate, self.routed = gate, experts
        self.shared_experts, self.shared_expert_gate = shared_experts, shared_expert_gate
        self.expert_parallel = settings.moe() == "expert" if expert_parallel is None else expert_parallel

    def __call__(self, x: np.ndarray, slots: np.ndarray | None = None) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; a partial sum when this is a shard."""
        y = self.routed(x, *self.gate(x, slots))
        if self.shared_experts is None:
            return y
        shared = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            shared = scale_rows(shared, activation(self.shared_expert_gate(x), "sigmoid"))
        return residual_add(y, shared)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return self.routed._accepts(strategy)

    def _shard(self, strategy: ShardingStrategy, rank: int) -> MoE:
        part = self._copy()
        whole = ShardingStrategy.replicate(strategy.num_devices)
        part.gate = self.gate._shard(whole, rank)
        part.routed = self.routed._shard(strategy, rank)
        if self.shared_experts is not None:
            by_width = whole if strategy.is_replicate else ShardingStrategy.tensor_parallel(strategy.num_devices)
            part.shared_experts = self.shared_experts._shard(by_width, rank)
        if self.shared_expert_gate is not None:
            part.shared_expert_gate = self.shared_expert_gate._shard(whole, rank)
        return part


class Experts(ShardableModule):
    """down_proj_e(act(gate_proj_e(x)) * up_proj_e(x)) for the experts e of each token, weighted and summed.

    Weights `experts.N.gate_proj`, `.up_proj`, `.down_proj`; with fused, `experts.N.gate_up_proj` holds gate and up.
    The matrices of a rank's experts lie in two buffers, [experts, 2 * width, hidden] and [experts, hidden, width].
    activation, swiglu_limit: see `cutp.ops.activation.gated_activation`; swiglu_alpha: `clamped_swiglu` instead.

    Under tensor_parallel every expert is divided along its width. Under expert_parallel each rank has whole experts,
    neighbours, the first ranks one more; ranks beyond the number of experts have none. Either way a shard's result is a
    partial sum over ranks, and the biases of the down projections are in the sum once.
    """

    transparent = True

    def __init__(self, num_experts: int, hidden_dim: int, width: int, dtype: np.dtype, *, activation: str = "silu",
                 has_bias: bool = False, fused: bool = False, swiglu_limit: float | None = None,
                 swiglu_alpha: float | None = None):
        if num_experts < 1:
            raise ConfigError(f"a mixture of {num_experts} experts has nothing to route to")
        if swiglu_alpha is not None and swiglu_limit is None:
            raise ConfigError("swiglu_alpha belongs to a clamped activation; give swiglu_limit too")
        self.num_experts, self.width = num_experts, width
        self.activation = activation_name(activation)
        self.swiglu_limit, self.swiglu_alpha = swiglu_limit, swiglu_alpha

        def linear(in_dim: int, out_dim: int, padding: Padding) -> Linear:
            return Linear(in_dim, out_dim, dtype, has_bias=has_bias, padding=padding)

        gates = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
        of_gates = Padding(0, 2 if fused else 1)
        self.experts = [Expert({name: linear(hidden_dim, rows, of_gates) for name, rows in gates.items()},
                               linear(width, hidden_dim, Padding(1))) for _ in range(num_experts)]
        self._first, self._count, self._width = 0, num_experts, width  # what this shard has
        self._stacked: tuple | None = None

    def __call__(self, x: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """x [T, hidden], experts int32 [T, k], weights float32 [T, k] -> [T, hidden]."""
        if self._stacked is None:
            self.materialize()
        gate_up, gate_up_bias, down, down_bias = self._stacked
        rows, share = expert_rows(experts, self._first, self._count), self._count / self.num_experts
        y = grouped_linear(x, gate_up, rows, gate_up_bias, gather=True, share=share)
        if self.swiglu_alpha is None:
            y = gated_activation(y, self.activation, limit=self.swiglu_limit)
        else:
            y = clamped_swiglu(y, alpha=self.swiglu_alpha, limit=self.swiglu_limit)
        return combine_experts(grouped_linear(y, down, rows, down_bias, share=share), rows.positions, weights)

    def materialize(self) -> None:
        """Makes the buffers; weights that already have data move into them."""
        gates = [layer for expert in self.experts for layer in expert.gate_layers]
        down = [expert.down_proj for expert in self.experts]
        width = storage().padded(self._width, down[0].weight.dtype)
        self._stacked = (*self._stack(gates, 2 * width), *self._stack(down, down[0].weight.shape[0]))

    def _stack(self, layers: Sequence[Linear], rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights [experts of this rank, rows, in] and biases [experts of this rank, rows] of `layers`.

        No biases where the layers have none, or where another rank adds them.
        """
        weight = stack_weights([layer.weight for layer in layers])
        weight = weight.reshape(self._count, rows, weight.shape[1])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if not any(bias.local_shape[0] for bias in biases):
            return weight, None
        return weight, stack_weights(biases).reshape(self._count, rows)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "tensor_parallel", "expert_parallel")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> Experts:
        part = self._copy()
        part._stacked = None
        size = strategy.num_devices
        if strategy.kind == "expert_parallel":
            first, stop = split_range(self.num_experts, size, rank)
            part._first, part._count = first, stop - first
            owners = [owner for owner in range(size) for _ in range(*split_range(self.num_experts, size, owner))]
            part.experts = [expert.on_one_rank(size, owner, rank)
                            for expert, owner in zip(self.experts, owners, strict=True)]
        else:
            part.experts = [expert.divided(strategy, rank) for expert in self.experts]
            part._width = part.experts[0].down_proj.in_dim
        return part


class Expert(Module):
    """The matrices of one expert, named as a checkpoint names them; `Experts` computes with those of all at once."""

    def __init__(self, gates: dict[str, Linear], down_proj: Linear):
        self._gates = tuple(gates)
        for name, layer in gates.items():
            setattr(self, name, layer)
        self.down_proj = down_proj

    @property
    def gate_layers(self) -> list[Linear]:
        """Gate and up projection, or the one layer that is both."""
        return [getattr(self, name) for name in self._gates]

    def divided(self, strategy: ShardingStrategy, rank: int) -> Expert:
        """`rank`'s share of the width, or a copy."""
        gate = down = strategy
        if not strategy.is_replicate:
            down = ShardingStrategy.columnwise(strategy.num_devices)
            gate = ShardingStrategy.rowwise(strategy.num_devices)
            if len(self._gates) == 1:
                gate = ShardingStrategy.gate_up(strategy.num_devices, axis=0)
        return Expert({name: getattr(self, name)._shard(gate, rank) for name in self._gates},
                      self.down_proj._shard(down, rank))

    def on_one_rank(self, size: int, owner: int, rank: int) -> Expert:
        """The whole expert for rank `owner`, a share without elements for the others."""
        def share(layer: Linear) -> Linear:
            return layer._shard(ShardingStrategy.segmented(size, 0, [OwnerSegment(layer.out_dim, owner)]), rank)

        return Expert({name: share(getattr(self, name)) for name in self._gates}, share(self.down_proj))
