"""The ops of layers, one call whatever the array type: NumPy's reference for NumPy arrays, kernels for device arrays.

On a device, results are taken from the scratch in use (`cutp.array.scratch`) unless `out` is given, and nothing here
allocates, waits, or reads a device value on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cutp.array import gemm
from cutp.array.scratch import on_device, scratch
from cutp.errors import ConfigError
from cutp.ops import activation as host_activation
from cutp.ops import (
    activation_cuda,
    embedding_cuda,
    residual_cuda,
    rms_norm_cuda,
    rotary_cuda,
    skinny_gemm_cuda,
)
from cutp.ops import embedding as host_embedding
from cutp.ops import linear as host_linear
from cutp.ops import residual as host_residual
from cutp.ops import rms_norm as host_norm
from cutp.ops import rotary as host_rotary
from cutp.ops.kv_write import kv_write

# Up to this many rows a product runs in the skinny kernel where its weight is below this size: there it is as fast as
# cuBLASLt or faster (cutp.bench.kernels), and a row's bits do not depend on the number of rows.
_SKINNY_ROWS = 8
_SKINNY_BYTES = 150 << 20


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
    if x.shape[0] <= _SKINNY_ROWS and weight.nbytes <= _SKINNY_BYTES:
        skinny_gemm_cuda.skinny_gemm(x, weight, bias, out=out, pdl=True)
    else:
        gemm.linear(x, weight, out, bias, workspace=scratch().workspace)
    return out


def rms_norm(x: Any, weight: Any, eps: float, *, weight_offset: float = 0.0, multiply_before_cast: bool = False,
             mean_square: Any = None, out: Any = None) -> Any:
    """See `cutp.ops.rms_norm.rms_norm`; x may be a view whose tokens lie apart, and `out` may be `x`."""
    if not on_device(x):
        return host_norm.rms_norm(x, weight, eps, weight_offset=weight_offset,
                                  multiply_before_cast=multiply_before_cast, mean_square=mean_square, out=out)
    if mean_square is not None:
        raise ConfigError("a norm over heads of several ranks does not run on a GPU in this version")
    if out is None:
        out = scratch().empty(x.shape, x.dtype)
    rms_norm_cuda.rms_norm(x, weight, eps, weight_offset=weight_offset, multiply_before_cast=multiply_before_cast,
                           out=out, pdl=True)
    return out


def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, *, weight_offset: float = 0.0,
                 multiply_before_cast: bool = False) -> tuple[Any, Any]:
    """(residual + x, its norm). On a device the sum takes the place of `residual`."""
    if not on_device(x):
        total = host_residual.residual_add(residual, x)
        return total, host_norm.rms_norm(total, weight, eps, weight_offset=weight_offset,
                                         multiply_before_cast=multiply_before_cast)
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


def scale(x: Any, factor: float) -> Any:
    """See `cutp.ops.residual.scale`. On a device the result takes the place of `x`."""
    if not on_device(x):
        return host_residual.scale(x, factor)
    if factor != 1.0:
        residual_cuda.scale(x, factor, out=x, pdl=True)
    return x


def finish_logits(logits: Any, scaling: float, softcapping: float | None) -> Any:
    """logits / scaling in float32, then softcapping * tanh(that / softcapping) unless it is None."""
    if on_device(logits):
        out = logits if logits.dtype == np.float32 else scratch().empty(logits.shape, np.float32)
        residual_cuda.finish_logits(logits, scaling, softcapping, out=out, pdl=True)
        return out
    return host_residual.finish_logits(logits, scaling, softcapping)


def gated_activation(gate_up: Any, name: str, *, limit: float | None = None) -> Any:
    """See `cutp.ops.activation.gated_activation`: [T, 2F] -> [T, F]."""
    if not on_device(gate_up):
        return host_activation.gated_activation(gate_up, name, limit=limit)
    out = scratch().empty((gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)
    activation_cuda.gated_activation(gate_up, name, limit=limit, out=out, pdl=True)
    return out


def rotary_kv_write(qkv: Any, n_heads: int, cos: Any, sin: Any, slots: Any, pages: Any, *, interleaved: bool) -> Any:
    """Queries turned by their angles, [T, n_heads, D]; keys, turned as well, and values go into their slots of `pages`.

    qkv: [T, (n_heads + 2 * n_kv_heads) * D]; cos, sin: [T, R/2], None to turn nothing; pages: [P, 2, n_kv_heads, S, D].
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
