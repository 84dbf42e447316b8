"""The ops of layers, one call whatever the array type: NumPy's reference for NumPy arrays, kernels for device arrays.

On a device, results are taken from the scratch in use (`cutp.array.scratch`) unless `out` is given, and nothing here
allocates, waits, or reads a device value on the host.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cutp.array import gemm
from cutp.array.scratch import on_device, scratch
from cutp.ops import activation as host_activation
from cutp.ops import (
    activation_cuda,
    embedding_cuda,
    grouped_gemm_cuda,
    latent_cuda,
    linear_per_head_cuda,
    moe_cuda,
    moe_routing_cuda,
    residual_cuda,
    rms_norm_cuda,
    rotary_cuda,
    skinny_gemm_cuda,
    stream_gemm_cuda,
)
from cutp.ops import embedding as host_embedding
from cutp.ops import linear as host_linear
from cutp.ops import moe as host_moe
from cutp.ops import moe_routing as host_routing
from cutp.ops import residual as host_residual
from cutp.ops import rms_norm as host_norm
from cutp.ops import rotary as host_rotary
from cutp.ops.kv_write import kv_write
from cutp.ops.product_choice import Kernel, gates_in_product, kernel_for


class _Choices(threading.local):
    """What the operations of this thread must keep to."""

    row_invariant = False


_choices = _Choices()


@contextmanager
def row_invariant(wanted: bool) -> Iterator[None]:
    """Inside, with `wanted`, the bits of a row of a product on a device do not depend on the number of rows."""
    before, _choices.row_invariant = _choices.row_invariant, wanted
    try:
        yield
    finally:
        _choices.row_invariant = before


def embedding(tokens: Any, table: Any, vocab_start: int, dtype: np.dtype) -> Any:
    """See `cutp.ops.embedding.embedding`: [T, d]."""
    if not on_device(table):
        return host_embedding.embedding(tokens, table, vocab_start, dtype)
    out = scratch().empty((tokens.shape[0], table.shape[1]), table.dtype)
    embedding_cuda.embedding(tokens, table, vocab_start, out=out, pdl=True)
    return out


def take_rows(x: Any, rows: Any) -> Any:
    """x[rows]: x [T, d], rows int64 [R] -> [R, d]."""
    if not on_device(x):
        return x[rows]
    out = scratch().empty((rows.shape[0], x.shape[1]), x.dtype)
    embedding_cuda.embedding(rows, x, 0, out=out, pdl=True)
    return out


def linear(x: Any, weight: Any, bias: Any = None, out: Any = None) -> Any:
    """See `cutp.ops.linear.linear`: [T, N]."""
    if not on_device(x):
        return host_linear.linear(x, weight, bias, out)
    if out is None:
        out = scratch().empty((x.shape[0], weight.shape[0]), x.dtype)
    kernel = Kernel.LIBRARY if _choices.row_invariant else kernel_for(x, weight)
    if kernel is Kernel.STREAM:
        stream_gemm_cuda.stream_gemm(x, weight, bias, out=out, pdl=True)
    elif kernel is Kernel.SKINNY:
        skinny_gemm_cuda.skinny_gemm(x, weight, bias, out=out, pdl=True)
    else:
        gemm.linear(x, weight, out, bias, workspace=scratch().workspace, row_invariant=_choices.row_invariant)
    return out


def gated_linear(x: Any, weight: Any, bias: Any, name: str, *, limit: float | None = None) -> Any:
    """`gated_activation` of `linear`: x [T, K], weight [2F, K], the gate's rows first -> [T, F]."""
    if on_device(x) and not _choices.row_invariant and gates_in_product(x, weight, name):
        out = scratch().empty((x.shape[0], weight.shape[0] // 2), x.dtype)
        stream_gemm_cuda.stream_gemm_gated(x, weight, name, bias, limit=limit, out=out, pdl=True)
        return out
    return gated_activation(linear(x, weight, bias), name, limit=limit)


def rms_norm(x: Any, weight: Any, eps: float, *, weight_offset: float = 0.0, multiply_before_cast: bool = False,
             square_sums: Any = None, total_dim: int | None = None, out: Any = None) -> Any:
    """See `cutp.ops.rms_norm.rms_norm`; x may be a view whose tokens lie apart, and `out` may be `x`.

    square_sums: float32 [T, 1], over the `total_dim` channels that x [T, d] has some of; without it x has all of them.
    """
    if not on_device(x):
        mean_square = None if square_sums is None else square_sums / np.float32(total_dim)
        return host_norm.rms_norm(x, weight, eps, weight_offset=weight_offset,
                                  multiply_before_cast=multiply_before_cast, mean_square=mean_square, out=out)
    if out is None:
        out = scratch().empty(x.shape, x.dtype)
    rms_norm_cuda.rms_norm(x, weight, eps, weight_offset=weight_offset, multiply_before_cast=multiply_before_cast,
                           square_sums=square_sums, total_dim=None if square_sums is None else total_dim, out=out,
                           pdl=True)
    return out


def square_sums(*parts: Any) -> Any:
    """The sums of squares of the rows of several arrays [T, d], side by side: float32 [T, number of parts].

    A part that is None has a sum of 0.
    """
    first = next(part for part in parts if part is not None)
    device = on_device(first)
    out = (scratch().empty if device else np.empty)((first.shape[0], len(parts)), np.float32)
    for i, part in enumerate(parts):
        column = out[:, i : i + 1]
        if part is None:
            column[...] = 0
        elif device:
            rms_norm_cuda.square_sum(part, out=column, pdl=True)
        else:
            column[...] = host_norm.square_sum(part)
    return out


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """See `cutp.ops.rms_norm.layer_norm`."""
    if not on_device(x):
        return host_norm.layer_norm(x, weight, bias, eps)
    out = scratch().empty(x.shape, x.dtype)
    rms_norm_cuda.layer_norm(x, weight, bias, eps, out=out, pdl=True)
    return out


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *, weight_offset: float = 0.0,
                 multiply_before_cast: bool = False, out: Any = None) -> tuple[Any, Any]:
    """(residual + x, its norm). On a device the sum takes the place of `residual`."""
    if not on_device(x):
        total = host_residual.residual_add(residual, x)
        return total, host_norm.rms_norm(total, weight, eps, weight_offset=weight_offset,
                                         multiply_before_cast=multiply_before_cast, out=out)
    if out is None:
        out = scratch().empty(x.shape, x.dtype)
    rms_norm_cuda.add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset,
                               multiply_before_cast=multiply_before_cast, residual_out=residual, out=out, pdl=True)
    return residual, out


def residual_add(x: Any, y: Any, multiplier: float = 1.0) -> Any:
    """See `cutp.ops.residual.residual_add`. On a device the sum takes the place of `x`."""
    if not on_device(x):
        return host_residual.residual_add(x, y, multiplier)
    residual_cuda.residual_add(x, y, multiplier, out=x, pdl=True)
    return x


def copied(x: Any) -> Any:
    """A copy on a device, where `x` will be written to; `x` itself otherwise."""
    if not on_device(x):
        return x
    out = scratch().empty(x.shape, x.dtype)
    out[...] = x
    return out


def outside_frames(x: Any) -> Any:
    """On a device, memory like `x` from the frame that is open now, for results of frames inside it; else None."""
    return scratch().empty(x.shape, x.dtype) if on_device(x) else None


def scale(x: Any, factor: float) -> Any:
    """See `cutp.ops.residual.scale`. On a device the result takes the place of `x`."""
    if not on_device(x):
        return host_residual.scale(x, factor)
    if factor != 1.0:
        residual_cuda.scale(x, factor, out=x, pdl=True)
    return x


def clip(x: Any, limit: float) -> Any:
    """See `cutp.ops.residual.clip`. On a device the result takes the place of `x`."""
    if not on_device(x):
        return host_residual.clip(x, limit)
    residual_cuda.clip(x, limit, out=x, pdl=True)
    return x


def scale_rows(x: Any, shares: Any) -> Any:
    """See `cutp.ops.residual.scale_rows`. On a device the result takes the place of `x`."""
    if not on_device(x):
        return host_residual.scale_rows(x, shares)
    residual_cuda.scale_rows(x, shares, out=x, pdl=True)
    return x


def finish_logits(logits: Any, scaling: float, softcapping: float | None) -> Any:
    """logits / scaling in float32, then softcapping * tanh(that / softcapping) unless it is None."""
    if on_device(logits):
        out = logits if logits.dtype == np.float32 else scratch().empty(logits.shape, np.float32)
        residual_cuda.finish_logits(logits, scaling, softcapping, out=out, pdl=True)
        return out
    return host_residual.finish_logits(logits, scaling, softcapping)


def logits_to_draw_from(logits: Any, scaling: float, softcapping: float | None) -> Any:
    """`finish_logits`, [.., V] float32, for what only draws tokens. On a device, logits that are neither scaled nor
    capped are returned as they are, in their own dtype: `sampling_cuda` draws the same tokens from them."""
    if on_device(logits) and scaling == 1.0 and softcapping is None:
        return logits
    return finish_logits(logits, scaling, softcapping)


def gated_activation(gate_up: Any, name: str, *, limit: float | None = None) -> Any:
    """See `cutp.ops.activation.gated_activation`: [T, 2F] -> [T, F]."""
    if not on_device(gate_up):
        return host_activation.gated_activation(gate_up, name, limit=limit)
    out = scratch().empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    activation_cuda.gated_activation(gate_up, name, limit=limit, out=out, pdl=True)
    return out


def activation(x: Any, name: str) -> Any:
    """See `cutp.ops.activation.activation`. On a device the result takes the place of `x`."""
    if not on_device(x):
        return host_activation.activation(x, name)
    activation_cuda.activation(x, name, out=x, pdl=True)
    return x


def clamped_swiglu(gate_up: Any, *, alpha: float, limit: float) -> Any:
    """See `cutp.ops.activation.clamped_swiglu`: [T, 2F] -> [T, F]."""
    if not on_device(gate_up):
        return host_activation.clamped_swiglu(gate_up, alpha=alpha, limit=limit)
    out = scratch().empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    activation_cuda.clamped_swiglu(gate_up, alpha=alpha, limit=limit, out=out, pdl=True)
    return out


def route(name: str, logits: Any, *arguments: Any, top_k: int, slots: Any = None, **options: Any) -> tuple[Any, Any]:
    """Function `name` of `cutp.ops.moe_routing`, with `top_k` after the other `arguments`.

    slots: the cache slots of the tokens on a device, where one with a negative slot gets no experts.
    """
    if not on_device(logits):
        return getattr(host_routing, name)(logits, *arguments, top_k, **options)
    shape = logits.shape[0], top_k
    experts, weights = scratch().empty(shape, np.int32), scratch().empty(shape, np.float32)
    getattr(moe_routing_cuda, name)(logits, *arguments, top_k, slots=slots, experts=experts, weights=weights, pdl=True,
                                    **options)
    return experts, weights


def linear_by_row(x: Any, weight: Any, bias: Any = None, dtype: Any = None) -> Any:
    """`linear`, but the bits of a row are the same in every batch: [T, N], in `dtype` (default: that of `x`)."""
    bias = None if bias is None else bias[None]
    if not on_device(x):
        x = x if dtype is None else x.astype(dtype, copy=False)
        return host_moe.grouped_linear(x, weight[None], np.array([0, len(x)], np.int32), bias)
    out = scratch().empty((x.shape[0], weight.shape[0]), x.dtype if dtype is None else dtype)
    grouped_gemm_cuda.grouped_linear(x, weight[None], None, bias, out=out, pdl=True)
    return out


def expert_rows(experts: Any, first: int, count: int) -> host_moe.ExpertRows:
    """See `cutp.ops.moe.expert_rows`. On a device there is room for all slots, and what is behind the rows of the
    experts may be anything."""
    if not on_device(experts):
        return host_moe.expert_rows(experts, first, count)
    rows = host_moe.ExpertRows(tokens=scratch().empty(experts.size, np.int32),
                               offsets=scratch().empty(count + 1, np.int32),
                               positions=scratch().empty(experts.shape, np.int32))
    moe_cuda.expert_rows(experts, first, count, **rows._asdict(), pdl=True)
    return rows


def grouped_linear(x: Any, weight: Any, rows: host_moe.ExpertRows, bias: Any = None, *, gather: bool = False,
                   share: float = 1.0) -> Any:
    """See `cutp.ops.moe.grouped_linear`: [rows, N]. gather: x has the tokens, not the rows. share: of all slots that
    belong to these experts as a rule; it decides about speed only."""
    tokens = rows.tokens if gather else None
    if not on_device(x):
        return host_moe.grouped_linear(x, weight, rows.offsets, bias, tokens=tokens)
    out = scratch().empty((rows.tokens.shape[0], weight.shape[1]), x.dtype)
    expected = math.ceil(out.shape[0] * share)
    grouped_gemm_cuda.grouped_linear(x, weight, rows.offsets, bias, tokens=tokens, out=out, expected_rows=expected,
                                     pdl=True)
    return out


def combine_experts(y: Any, positions: Any, weights: Any) -> Any:
    """See `cutp.ops.moe.combine_experts`: [T, H]."""
    if not on_device(y):
        return host_moe.combine_experts(y, positions, weights)
    out = scratch().empty((positions.shape[0], y.shape[1]), y.dtype)
    moe_cuda.combine_experts(y, positions, weights, out=out, pdl=True)
    return out


def latent_rotary_write(compressed: Any, latent: Any, q: Any, cos: Any, sin: Any, slots: Any, pages: Any, *,
                        interleaved: bool) -> Any:
    """See `cutp.ops.latent_cuda.latent_rotary_write`, on a device: queries [T, H, C] whose last channels are set."""
    q_out = scratch().empty((*q.shape[:2], compressed.shape[1]), q.dtype)
    latent_cuda.latent_rotary_write(compressed, latent, q, cos, sin, slots, pages, q_out=q_out,
                                    interleaved=interleaved, pdl=True)
    return q_out


def linear_per_head(x: Any, weight: Any, out: Any = None) -> Any:
    """See `cutp.ops.linear.linear_per_head`: [T, H, N]."""
    if not on_device(x):
        return host_linear.linear_per_head(x, weight)
    if out is None:
        out = scratch().empty((*x.shape[:2], weight.shape[1]), x.dtype)
    linear_per_head_cuda.linear_per_head(x, weight, out=out, pdl=True)
    return out


def rotary_kv_write(qkv: Any, n_heads: int, cos: Any, sin: Any, slots: Any, pages: Any, *, interleaved: bool) -> Any:
    """Queries turned by their angles, [T, n_heads, W]; keys, turned as well, and values go into their slots of `pages`.

    qkv: [T, (n_heads + 2 * n_kv_heads) * D]; cos, sin: [T, R/2], None to turn nothing; pages: [P, 2, n_kv_heads, S, W].
    W is D; on a device it may be larger, and then heads end with zeros.
    """
    n_kv_heads, _, head_dim = pages.shape[2:]
    if on_device(qkv):
        q = scratch().empty((qkv.shape[0], n_heads, head_dim), qkv.dtype)
        if cos is None:
            cos = sin = scratch().empty((qkv.shape[0], 0), np.float32)
        rotary_cuda.rotary_kv_write(qkv, cos, sin, slots, pages, q_out=q, interleaved=interleaved, pdl=True)
        return q
    heads = qkv.reshape(len(qkv), n_heads + 2 * n_kv_heads, head_dim)
    q, k, v = np.split(heads, [n_heads, n_heads + n_kv_heads], axis=1)
    if cos is not None:
        q = host_rotary.apply_rotary(q, cos, sin, interleaved=interleaved)
        k = host_rotary.apply_rotary(k, cos, sin, interleaved=interleaved)
    kv_write(k, v, pages, slots)
    return q


def joined_heads(x: Any, head_dim: int) -> Any:
    """The first `head_dim` channels of all heads side by side: [T, H, W] -> [T, H * head_dim]."""
    n_tokens, n_heads, width = x.shape
    if width != head_dim:
        out = scratch().empty((n_tokens, n_heads, head_dim), x.dtype)
        rotary_cuda.narrow_heads(x, out=out, pdl=True)
        x = out
    return x.reshape(n_tokens, n_heads * head_dim)
