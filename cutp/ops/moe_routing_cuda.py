"""Launchers of moe_routing.cu. The specifications are in `cutp.ops.moe_routing`.

logits: [T, E] (bfloat16, float16 or float32); experts: int32 [T, k] and weights: float32 [T, k], which are written.
slots: int64 [T], the cache slot of each token, or None. A token with a negative one is padding: its experts are -1 and
its weights 0. Arrays are contiguous. At most 512 experts, of which 32 can be chosen. ConfigError otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array.kernel import launch
from cutp.array.layout import Layout, layout, optional_layout, remembered
from cutp.errors import ConfigError
from cutp.ops.launch_arguments import DTYPE_DEFINES, MAX_ROWS, LaunchPlan, check_array, check_axes, check_dtype
from cutp.ops.moe_routing import check_groups, check_top_k

MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 512, 32, 32

_TOKENS_PER_BLOCK, _THREADS = 4, 128


def route_softmax(logits: Any, top_k: int, *, renormalize: bool, slots: Any = None, experts: Any, weights: Any,
                  pdl: bool = False) -> None:
    """`moe_routing.route_softmax`."""
    _route("route_softmax", logits, top_k, slots, experts, weights, [np.int32(renormalize)], pdl)


def route_top_k_softmax(logits: Any, top_k: int, *, slots: Any = None, experts: Any, weights: Any,
                        pdl: bool = False) -> None:
    """`moe_routing.route_top_k_softmax`."""
    _route("route_top_k_softmax", logits, top_k, slots, experts, weights, [], pdl)


def route_group_limited(logits: Any, correction_bias: Any, top_k: int, *, num_groups: int = 1, top_groups: int = 1,
                        renormalize: bool = True, scaling: float = 1.0, slots: Any = None, experts: Any, weights: Any,
                        pdl: bool = False) -> None:
    """`moe_routing.route_group_limited`; correction_bias: float32 [E] or None. At most 32 groups."""
    op = "route_group_limited"
    check_axes(op, "logits", logits, "T, E")
    check_groups(logits.shape[1], top_k, num_groups, top_groups)
    if num_groups > MAX_GROUPS:
        raise ConfigError(f"{op}: {num_groups} groups; at most {MAX_GROUPS} are possible")
    if correction_bias is not None:
        check_array(op, "correction_bias", correction_bias, (logits.shape[1],), np.float32)
    _route(op, logits, top_k, slots, experts, weights,
           [correction_bias, np.int32(num_groups), np.int32(top_groups), np.int32(renormalize), np.float32(scaling)],
           pdl)


def _route(op: str, logits: Any, top_k: int, slots: Any, experts: Any, weights: Any, more: list[Any],
           pdl: bool) -> None:
    plan = _plan(op, layout(logits), top_k, optional_layout(slots), layout(experts), layout(weights))
    launch("moe_routing.cu", op, plan.grid, plan.block, [logits, slots, experts, weights, *plan.numbers, *more],
           defines=plan.defines, pdl=pdl)


@remembered
def _plan(op: str, logits: Layout, top_k: int, slots: Layout | None, experts: Layout, weights: Layout) -> LaunchPlan:
    check_dtype(op, "logits", logits)
    check_axes(op, "logits", logits, "T, E")
    tokens, count = logits.shape
    check_array(op, "logits", logits, (tokens, count))
    check_top_k(count, top_k)
    if count > MAX_EXPERTS or top_k > MAX_TOP_K:
        raise ConfigError(f"{op}: {top_k} of {count} experts; at most {MAX_TOP_K} of {MAX_EXPERTS} can be chosen")
    if tokens > MAX_ROWS:
        raise ConfigError(f"{op}: logits of shape {logits.shape} is too large for one launch")
    if slots is not None:
        check_array(op, "slots", slots, (tokens,), np.int64)
    check_array(op, "experts", experts, (tokens, top_k), np.int32)
    check_array(op, "weights", weights, (tokens, top_k), np.float32)
    return LaunchPlan(-(-tokens // _TOKENS_PER_BLOCK), _THREADS, (f"DTYPE={DTYPE_DEFINES[logits.dtype.name]}",),
                      (np.int32(tokens), np.int32(count), np.int32(top_k)))
