"""Routers: which experts of a mixture each token goes to. They are replicated, so every rank makes the same choice."""

from __future__ import annotations

import numpy as np

from cutp.nn.module import ShardableModule, Weight
from cutp.nn.sharding import ShardingStrategy
from cutp.ops.dispatch import linear_by_row, route
from cutp.ops.moe_routing import check_groups, check_top_k


class Router(ShardableModule):
    """What all routers share: logits x W^T + b, with weight [num_experts, hidden] and bias [num_experts].

    Calling one gives experts int32 [T, top_k] and weights float32 [T, top_k], see `cutp.ops.moe_routing`. slots: of the
    tokens in the cache; on a device, one with a negative slot is padding and gets no experts. ConfigError unless
    1 <= top_k <= num_experts.
    """

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, dtype: np.dtype, *, has_bias: bool = False):
        check_top_k(num_experts, top_k)
        self.top_k = top_k
        self.weight = Weight((num_experts, hidden_dim), dtype)
        self.bias = Weight((num_experts,), dtype) if has_bias else None

    def __call__(self, x: np.ndarray, slots: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """x [T, hidden] -> (experts, weights)."""
        raise NotImplementedError

    def logits(self, x: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """[T, num_experts] in `dtype` (default: that of `x`); a token's are the same bits in every batch."""
        return linear_by_row(x, self.weight.value, None if self.bias is None else self.bias.value, dtype)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.is_replicate

    def _shard(self, strategy: ShardingStrategy, rank: int) -> Router:
        part = self._copy()
        for name, value in vars(self).items():
            if isinstance(value, Weight):
                setattr(part, name, value.share(strategy, rank))
        return part


class SoftmaxRouter(Router):
    """The top_k of softmax over all experts (Mixtral; Qwen3Moe, where renormalize is `norm_topk_prob`)."""

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, dtype: np.dtype, *, renormalize: bool,
                 has_bias: bool = False):
        super().__init__(hidden_dim, num_experts, top_k, dtype, has_bias=has_bias)
        self.renormalize = renormalize

    def __call__(self, x: np.ndarray, slots: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return route("route_softmax", self.logits(x), top_k=self.top_k, slots=slots, renormalize=self.renormalize)


class TopKSoftmaxRouter(Router):
    """Softmax over the top_k logits alone (GptOss)."""

    def __call__(self, x: np.ndarray, slots: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return route("route_top_k_softmax", self.logits(x), top_k=self.top_k, slots=slots)


class GroupLimitedRouter(Router):
    """Sigmoid scores, chosen inside the best groups by score + `e_score_correction_bias` (DeepseekV3).

    The logits are computed and kept in float32, and so is the correction bias (float32 [num_experts]). num_groups,
    top_groups, renormalize, scaling: see `cutp.ops.moe_routing.route_group_limited`. ConfigError for groups that
    cannot be.
    """

    def __init__(self, hidden_dim: int, num_experts: int, top_k: int, dtype: np.dtype, *, num_groups: int = 1,
                 top_groups: int = 1, renormalize: bool = True, scaling: float = 1.0):
        super().__init__(hidden_dim, num_experts, top_k, dtype)
        check_groups(num_experts, top_k, num_groups, top_groups)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalize, self.scaling = renormalize, scaling
        self.e_score_correction_bias = Weight((num_experts,), np.dtype(np.float32))

    def __call__(self, x: np.ndarray, slots: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return route("route_group_limited", self.logits(x, np.dtype(np.float32)), self.e_score_correction_bias.value,
                     top_k=self.top_k, slots=slots, num_groups=self.num_groups, top_groups=self.top_groups,
                     renormalize=self.renormalize, scaling=self.scaling)
