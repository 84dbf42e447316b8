"""The experts' part of a mixture of experts: rows sorted by expert, a product with each expert's matrix, and the sum.

A token's result is the weighted sum of its experts' results, in the order of its slots. Every row is computed by
itself, so the bits of a token's result depend neither on the other tokens of a batch nor on their order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cutp.errors import ConfigError
from cutp.ops.rounding import as_float32, store


class ExpertRows(NamedTuple):
    """The S rows that a run of experts computes, sorted by expert, then by token and slot.

    tokens int32 [S]: the token of each row. offsets int32 [count + 1]: where each expert's rows start and end.
    positions int32 [T, k]: the row of each token's slot, -1 where another rank has the expert.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray


def expert_rows(experts: np.ndarray, first: int, count: int) -> ExpertRows:
    """The rows of experts first .. first + count - 1. experts: int32 [T, k], the choice of `cutp.ops.moe_routing`."""
    local = experts.ravel() - first
    slots = np.flatnonzero((local >= 0) & (local < count))
    slots = slots[np.argsort(local[slots], kind="stable")]
    offsets = np.zeros(count + 1, np.int32)
    np.cumsum(np.bincount(local[slots], minlength=count), out=offsets[1:])
    positions = np.full(experts.size, -1, np.int32)
    positions[slots] = np.arange(len(slots), dtype=np.int32)
    return ExpertRows((slots // experts.shape[1]).astype(np.int32), offsets, positions.reshape(experts.shape))


def grouped_linear(x: np.ndarray, weight: np.ndarray, offsets: np.ndarray, bias: np.ndarray | None = None, *,
                   tokens: np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """Row i times the matrix of its expert, [S, N] in the dtype of `x`.

    weight: [count, N, K]; bias: [count, N]. Rows offsets[e] .. offsets[e + 1] belong to expert e. x: [S, K], or
    [T, K] with `tokens` int32 [S], the row of `x` that each result takes. Products are summed in float32 and the bias
    is added before the one rounding.
    """
    count, out_dim, in_dim = weight.shape
    if x.shape[1] != in_dim or len(offsets) != count + 1:
        raise ConfigError(f"{count} experts with matrices of {out_dim} x {in_dim} cannot take rows of {x.shape[1]} and "
                          f"{len(offsets)} offsets")
    rows = as_float32(x if tokens is None else x[tokens])
    y = np.empty((len(rows), out_dim), np.float32)
    for expert in range(count):
        group = slice(offsets[expert], offsets[expert + 1])
        # One vector-matrix product a row: a matrix product would sum a row in another order next to other rows.
        np.matmul(rows[group, None, :], as_float32(weight[expert]).T, out=y[group, None, :])
        if bias is not None:
            y[group] += as_float32(bias[expert])
    return store(y, x.dtype, out)


def combine_experts(y: np.ndarray, positions: np.ndarray, weights: np.ndarray,
                    out: np.ndarray | None = None) -> np.ndarray:
    """The weighted sum of each token's rows, [T, H] in the dtype of `y`, rounded once.

    y: [S, H], the experts' results; positions: int32 [T, k] of `expert_rows`; weights: float32 [T, k]. Slots are added
    in order, each product rounded to float32 first; a slot at -1 adds nothing.
    """
    total = np.zeros((len(positions), y.shape[1]), np.float32)
    for slot in range(positions.shape[1]):
        tokens = np.flatnonzero(positions[:, slot] >= 0)
        total[tokens] += weights[tokens, slot, None] * as_float32(y[positions[tokens, slot]])
    return store(total, y.dtype, out)
