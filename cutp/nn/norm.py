"""Normalisation layers. They are replicated on every rank, but for `ShardedRMSNorm`."""

from __future__ import annotations

import numpy as np

from cutp.errors import ConfigError
from cutp.nn.module import ShardableModule, Weight
from cutp.nn.sharding import ShardingStrategy
from cutp.ops.dispatch import add_rms_norm, layer_norm, rms_norm, square_sums


class _Norm(ShardableModule):
    """What both norms share: a weight [dim] that every rank holds whole."""

    def __init__(self, dim: int, dtype: np.dtype, eps: float):
        self.dim, self.eps = dim, eps
        self.weight = Weight((dim,), dtype)

    def _check(self, x: np.ndarray) -> None:
        if x.shape[-1] != self.dim:
            raise ConfigError(f"{type(self).__name__} of dimension {self.dim} was given an array of shape {x.shape}")

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.is_replicate

    def _shard(self, strategy: ShardingStrategy, rank: int):
        part = self._copy()
        for name, value in vars(self).items():
            if isinstance(value, Weight):
                setattr(part, name, value.share(strategy, rank))
        return part


class RMSNorm(_Norm):
    """x / rms(x) * (weight + weight_offset) over the last axis (see `cutp.ops.rms_norm.rms_norm`).

    weight_offset 1.0 and multiply_before_cast True are Gemma's choices; 0.0 and False are Llama's.
    """

    def __init__(self, dim: int, dtype: np.dtype, eps: float = 1e-6, weight_offset: float = 0.0,
                 multiply_before_cast: bool = True):
        super().__init__(dim, dtype, eps)
        self.weight_offset, self.multiply_before_cast = weight_offset, multiply_before_cast

    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x [..., dim] -> the same shape and dtype, in `out` if given, which may be `x`.

        ConfigError when the last axis is not `dim`.
        """
        self._check(x)
        return rms_norm(x, self.weight.value, self.eps, weight_offset=self.weight_offset,
                        multiply_before_cast=self.multiply_before_cast, out=out)

    def after_add(self, x: np.ndarray, residual: np.ndarray,
                  out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(residual + x, its norm) in one pass; on a device the sum takes the place of `residual`.

        out: for the norm; it may be neither `x` nor `residual`.
        """
        self._check(x)
        return add_rms_norm(x, residual, self.weight.value, self.eps, weight_offset=self.weight_offset,
                            multiply_before_cast=self.multiply_before_cast, out=out)


class ShardedRMSNorm(RMSNorm):
    """An `RMSNorm` over channels that are divided among ranks: the mean square is that of all of them (Olmo2).

    Accepts replicate and the strategies of axis 0. A shard normalises its own channels, once it is told the sum of
    squares over all ranks; `square_sum` is what it adds to that sum.
    """

    def __call__(self, x: np.ndarray, total: np.ndarray | None = None,
                 out: np.ndarray | None = None) -> np.ndarray:
        """x [T, channels of this shard] -> the same shape and dtype.

        total: float32 [T, 1], the sum of squares over all `dim` channels; a shard that holds all of them needs none.
        ConfigError when the last axis is not this shard's, or without a total that is needed.
        """
        self._check(x)
        if total is None:
            if x.shape[-1] != self.dim:
                raise ConfigError(f"a shard of {x.shape[-1]} of {self.dim} channels was called without the sum of "
                                  "squares over all of them")
            total = self.square_sum(x)
        return rms_norm(x, self.weight.value, self.eps, weight_offset=self.weight_offset,
                        multiply_before_cast=self.multiply_before_cast, square_sums=total, total_dim=self.dim, out=out)

    def square_sum(self, x: np.ndarray) -> np.ndarray:
        """The sum of squares of this shard's channels, float32 [T, 1]."""
        return square_sums(x)

    def _check(self, x: np.ndarray) -> None:
        if x.shape[-1:] != self.weight.local_shape:
            raise ConfigError(f"a shard of {self.weight.local_shape[0]} of {self.dim} channels was given an array of "
                              f"shape {x.shape}")

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.is_replicate or strategy.axis == 0


class LayerNorm(_Norm):
    """(x - mean) / std * weight + bias over the last axis."""

    def __init__(self, dim: int, dtype: np.dtype, eps: float = 1e-5, use_bias: bool = True):
        super().__init__(dim, dtype, eps)
        self.bias = Weight((dim,), dtype) if use_bias else None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [..., dim] -> the same shape and dtype. ConfigError when the last axis is not `dim`."""
        self._check(x)
        return layer_norm(x, self.weight.value, None if self.bias is None else self.bias.value, self.eps)
