"""Routing of a mixture of experts: from router logits to each token's experts and their weights.

Every function takes logits [T, E] (read as float32) and returns experts int32 [T, k] and weights float32 [T, k]. Slot j
of a token is its j-th choice: scores in descending order, equal scores by lower expert index, NaN below everything.
`torch.topk` leaves ties open; with a rule, every rank and every device makes the same choice. Sums over the chosen run
over the slots in order. Weights stay float32, whatever the dtype of the model.
"""

from __future__ import annotations

import numpy as np

from cutp.errors import ConfigError
from cutp.ops.activation import ACTIVATIONS
from cutp.ops.rounding import as_float32

Routing = tuple[np.ndarray, np.ndarray]


def route_softmax(logits: np.ndarray, top_k: int, *, renormalize: bool) -> Routing:
    """The `top_k` largest of softmax(logits); with `renormalize`, divided by their sum (MixtralTopKRouter).

    The choice compares logits: softmax keeps their order, but may round different logits to equal probabilities.
    """
    logits = as_float32(logits)
    experts = _largest(logits, top_k)
    with np.errstate(invalid="ignore", over="ignore"):
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights = _chosen(e, experts) / e.sum(axis=-1, keepdims=True, dtype=np.float32)
        return experts, weights / _sum(weights) if renormalize else weights


def route_top_k_softmax(logits: np.ndarray, top_k: int) -> Routing:
    """Softmax over the `top_k` largest logits alone (GptOssTopKRouter)."""
    logits = as_float32(logits)
    experts = _largest(logits, top_k)
    chosen = _chosen(logits, experts)
    with np.errstate(invalid="ignore", over="ignore"):
        e = np.exp(chosen - chosen[:, :1])
        return experts, e / _sum(e)


def route_group_limited(logits: np.ndarray, correction_bias: np.ndarray | None, top_k: int, *, num_groups: int = 1,
                        top_groups: int = 1, renormalize: bool = True, scaling: float = 1.0) -> Routing:
    """Sigmoid scores, chosen inside the best groups of experts (DeepSeek-V3, 2024; DeepseekV3TopkRouter).

    The choice goes by score + correction_bias (float32 [E], or None); the weights are the scores without it. The E
    experts form `num_groups` groups of neighbours; a group counts the sum of its two largest, and only experts of the
    `top_groups` best groups (equal ones: the lower first) can be chosen. With `renormalize`, the weights are divided by
    their sum + 1e-20; then they are multiplied by `scaling`.
    """
    check_groups(logits.shape[1], top_k, num_groups, top_groups)
    scores = ACTIVATIONS["sigmoid"](as_float32(logits)).astype(np.float32, copy=False)
    biased = scores if correction_bias is None else scores + as_float32(correction_bias)
    if top_groups < num_groups:
        grouped = biased.reshape(len(biased), num_groups, biased.shape[1] // num_groups)
        best = _chosen(grouped, _largest(grouped, 2))
        kept = _largest(best[..., 0] + best[..., 1], top_groups)
        outside = np.ones((len(biased), num_groups), bool)
        np.put_along_axis(outside, kept, False, axis=-1)
        # NaN, not -inf: a kept expert whose score is -inf still comes before all others.
        biased = np.where(outside[..., None], np.float32(np.nan), grouped).reshape(biased.shape)
    experts = _largest(biased, top_k)
    weights = _chosen(scores, experts)
    if renormalize:
        weights = weights / (_sum(weights) + np.float32(1e-20))
    return experts, weights * np.float32(scaling)


def check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    """ConfigError unless the groups are equal, have two experts or more, and the kept ones hold `top_k` experts."""
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ConfigError(f"{num_experts} experts cannot be routed to {top_groups} of {num_groups} equal groups")
    size = num_experts // num_groups
    if top_groups < num_groups and size < 2:
        raise ConfigError(f"groups of {size} expert: a group is judged by its two best experts")
    check_top_k(size * top_groups, top_k)


def check_top_k(num_experts: int, top_k: int) -> None:
    """ConfigError unless `top_k` experts can be chosen among `num_experts`."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"{top_k} experts a token cannot be chosen among {num_experts}")


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest along the last axis, int32, by the rule of this module."""
    check_top_k(values.shape[-1], count)
    return np.argsort(-values, axis=-1, kind="stable")[..., :count].astype(np.int32)


def _chosen(values: np.ndarray, experts: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, experts, axis=-1)


def _sum(weights: np.ndarray) -> np.ndarray:
    """The sum over the slots, first to last, as [T, 1]."""
    total = np.zeros((len(weights), 1), np.float32)
    for slot in range(weights.shape[1]):
        total = total + weights[:, slot : slot + 1]
    return total
