"""Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864): frequencies and cos/sin tables.

Every variant is defined as in Hugging Face transformers' `modeling_rope_utils.py`, including the points where
that code rounds to float32: an angle is `position * inv_freq`, so at position 4000 one unit in the last place of
`inv_freq` is already visible in the cosine. Powers are the one exception: they are computed in float64 and rounded
once, which does not depend on the maths library of the machine.

Two variants depend on the length of the sequence. Here the table of a request is fixed when the request is admitted,
by the number of tokens it may reach: the prompt when scoring, prompt + max_tokens when generating. Cached keys then
never disagree with later queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cutp.errors import ModelConfigError, UnsupportedModelError
from cutp.nn.rope_parameters import ROPE_TYPES, RopeParameters
from cutp.ops.rotary import rotary_table

_F32 = np.float32


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """The rotary frequencies of one request.

    Fields:
        inv_freq: float32 [rotary_dim / 2], radians per position; read-only.
        attention_scaling: multiplies both cos and sin, so attention scores carry its square.
    """

    inv_freq: np.ndarray
    attention_scaling: float


class RotaryEmbedding:
    """Frequencies and cos/sin tables of one model's rotary embedding.

    Args:
        dim: head dimension.
        theta: base of the wavelengths; None takes `parameters.theta`.
        max_seq_len: the model's `max_position_embeddings`, in tokens. The `dynamic` type scales from it, and it stands
            in for a missing `original_max_position_embeddings`.
        parameters: the variant; None is the default RoPE.
        interleaved: rotated pairs are neighbours (2i, 2i + 1) instead of the halves (i, i + rotary_dim / 2). Says how
            the tables are to be applied; the tables themselves are the same.
        rotary_dim: number of rotated dimensions, even; None takes `int(dim * partial_rotary_factor)`.

    Raises:
        UnsupportedModelError: unknown `rope_type`.
        ModelConfigError: a parameter is missing, out of range, or a factor list has the wrong length.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_seq_len: int,
        theta: float | None = None,
        parameters: RopeParameters | None = None,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ):
        parameters = parameters or RopeParameters()
        if theta is not None:
            parameters = dataclasses.replace(parameters, theta=float(theta))
        if parameters.rope_type not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"rope_type {parameters.rope_type!r} is not implemented", hint=f"known types: {', '.join(ROPE_TYPES)}"
            )
        if max_seq_len < 1:
            raise ModelConfigError(f"rotary embedding: max_seq_len must be at least 1, got {max_seq_len}")
        if not 0.0 < parameters.partial_rotary_factor <= 1.0:
            raise ModelConfigError(f"partial_rotary_factor must be in (0, 1], got {parameters.partial_rotary_factor}")
        if rotary_dim is None:
            rotary_dim = int(dim * parameters.partial_rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > dim:
            raise ModelConfigError(
                f"rotary embedding: the rotated part of a head must be an even number of dimensions from 2 to {dim}, "
                f"got {rotary_dim}"
            )
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.parameters = parameters
        self.interleaved = interleaved
        self.rotary_dim = rotary_dim
        self.length_dependent = parameters.rope_type in ("dynamic", "longrope")
        _check(parameters, rotary_dim, max_seq_len)
        self._known: dict[int, RotaryFrequencies] = {}

    def frequencies(self, length: int) -> RotaryFrequencies:
        """The frequencies of a request that may reach `length` tokens (prompt, plus max_tokens when generating)."""
        regime = self._regime(length)
        known = self._known.get(regime)
        if known is None:
            known = _frequencies(self.parameters, self.rotary_dim, self.max_seq_len, regime)
            if len(self._known) >= 256:  # dynamic has as many regimes as lengths; a server must not collect them all
                self._known.clear()
            self._known[regime] = known
        return known

    def table(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, each float32 [T, rotary_dim / 2], at integer `positions` [T] for a request of `length` tokens.

        The attention scaling is already multiplied in.
        """
        frequencies = self.frequencies(length)
        return rotary_table(np.asarray(positions), frequencies.inv_freq, frequencies.attention_scaling, np.dtype(_F32))

    def _regime(self, length: int) -> int:
        """The length that stands for all lengths with the same frequencies."""
        p = self.parameters
        if p.rope_type == "dynamic":
            return max(int(length), self.max_seq_len)
        if p.rope_type == "longrope":
            original = _original_length(p, self.max_seq_len)
            return original + 1 if length > original else original
        return 0


def _frequencies(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> RotaryFrequencies:
    inv_freq, scaling = _FORMULAS[p.rope_type](p, dim, max_seq_len, length)
    if not (np.isfinite(inv_freq).all() and math.isfinite(scaling)):
        raise ModelConfigError(f"the parameters of rope_type {p.rope_type!r} give frequencies that are not finite: {p}")
    inv_freq.setflags(write=False)
    return RotaryFrequencies(inv_freq, scaling)


def _wavelengths(theta: float, dim: int) -> np.ndarray:
    """float32 [dim / 2]: theta ** (2i / dim), i.e. radians^-1; exponent and base are float32 values as in HF."""
    exponents = np.arange(0, dim, 2, dtype=_F32) / _F32(dim)
    return (np.float64(_F32(theta)) ** exponents.astype(np.float64)).astype(_F32)


def _original_length(p: RopeParameters, max_seq_len: int) -> int:
    return p.original_max_position_embeddings or max_seq_len


def _default(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    return _F32(1) / _wavelengths(p.theta, dim), 1.0


def _linear(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions are divided by `factor`."""
    return _F32(1) / _wavelengths(p.theta, dim) / _F32(p.factor), 1.0


def _dynamic(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    """Dynamic NTK: the base grows with the sequence beyond `max_seq_len`, by the NTK-aware rule.

    HF computes the initial base (up to `max_seq_len`) in float64 and a grown one in float32.
    """
    exponent = dim / (dim - 2)
    if length <= max_seq_len:
        return _F32(1) / _wavelengths(p.theta * (p.factor - (p.factor - 1)) ** exponent, dim), 1.0
    stretch = _F32(p.factor) * _F32(length) / _F32(max_seq_len) - _F32(p.factor - 1)
    growth = _F32(np.float64(stretch) ** exponent)
    return _F32(1) / _wavelengths(_F32(p.theta) * growth, dim), 1.0


def _llama3(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: short waves stay, long waves are stretched by `factor`, the band between is blended smoothly."""
    original = _original_length(p, max_seq_len)
    inv_freq = _F32(1) / _wavelengths(p.theta, dim)
    # A number divided by a tensor is reciprocal, then product, in torch; the order decides the last bit.
    wavelengths = _F32(1) / inv_freq * _F32(2 * math.pi)
    is_long = wavelengths > _F32(original / p.low_freq_factor)
    is_short = wavelengths < _F32(original / p.high_freq_factor)
    result = np.where(is_long, inv_freq / _F32(p.factor), inv_freq)
    if p.high_freq_factor == p.low_freq_factor:
        return result, 1.0
    turns = _F32(1) / wavelengths * _F32(original)
    smooth = (turns - _F32(p.low_freq_factor)) / _F32(p.high_freq_factor - p.low_freq_factor)
    blended = (_F32(1) - smooth) * inv_freq / _F32(p.factor) + smooth * inv_freq
    return np.where(is_long | is_short, result, blended), 1.0


def _yarn(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the dimensions from unscaled to interpolated."""
    original = _original_length(p, max_seq_len)
    factor = p.factor if p.factor is not None else max_seq_len / original

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.attention_factor is not None:
        scaling = float(p.attention_factor)
    elif p.mscale and p.mscale_all_dim:
        scaling = mscale(p.mscale) / mscale(p.mscale_all_dim)
    else:
        scaling = mscale(1.0)

    def dimension(turns: float) -> float:
        """The (fractional) dimension that makes this many turns within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(p.theta))

    low, high = dimension(p.beta_fast or 32), dimension(p.beta_slow or 1)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The end is clipped at dim - 1 although only dim / 2 frequencies exist; a table must agree with HF's on this.
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=_F32) - _F32(low)) / _F32(high - low), _F32(0), _F32(1))
    keep = _F32(1) - ramp
    wavelengths = _wavelengths(p.theta, dim)
    interpolated = _F32(1) / (_F32(factor) * wavelengths)
    return interpolated * (_F32(1) - keep) + _F32(1) / wavelengths * keep, scaling


def _longrope(p: RopeParameters, dim: int, max_seq_len: int, length: int) -> tuple[np.ndarray, float]:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): one list of divisors within the original length, one beyond."""
    original = _original_length(p, max_seq_len)
    factor = p.factor if p.factor is not None else max_seq_len / original
    if p.attention_factor is not None:
        scaling = float(p.attention_factor)
    else:
        scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = np.array(p.long_factor if length > original else p.short_factor, _F32)
    return _F32(1) / (divisors * _wavelengths(p.theta, dim)), scaling


_FORMULAS: dict[str, Callable[[RopeParameters, int, int, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}

# What each type cannot do without. `factor` of yarn and longrope has a default: max_seq_len / original length.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}


def _check(p: RopeParameters, dim: int, max_seq_len: int) -> None:
    """Raises ModelConfigError unless `p` gives finite, positive frequencies for `dim` rotated dimensions."""
    where = f"rope_type {p.rope_type!r}"
    if not (math.isfinite(p.theta) and p.theta > 0):
        raise ModelConfigError(f"rope theta must be a positive number, got {p.theta}")
    for name in _REQUIRED[p.rope_type]:
        if getattr(p, name) is None:
            raise ModelConfigError(f"{where} needs {name}, which is missing")
    if p.rope_type == "default":
        return
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        value = getattr(p, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ModelConfigError(f"{where}: {name} must be a positive number, got {value}")
    if p.rope_type == "dynamic" and (dim < 4 or p.factor < 1):
        raise ModelConfigError(f"{where} needs factor >= 1 and 4 or more rotated dimensions, got {p.factor} and {dim}")
    if p.rope_type == "llama3" and p.high_freq_factor < p.low_freq_factor:
        raise ModelConfigError(
            f"{where}: high_freq_factor {p.high_freq_factor} is below low_freq_factor {p.low_freq_factor}"
        )
    if p.rope_type == "yarn" and (p.theta <= 1 or min(p.beta_fast or 32, p.beta_slow or 1) <= 0):
        raise ModelConfigError(f"{where} needs theta > 1 and positive beta_fast and beta_slow, got {p}")
    if p.rope_type == "longrope":
        if _original_length(p, max_seq_len) < 2:
            raise ModelConfigError(f"{where}: original_max_position_embeddings must be at least 2")
        for name in ("short_factor", "long_factor"):
            values = getattr(p, name)
            if len(values) != dim // 2 or not all(math.isfinite(v) and v > 0 for v in values):
                raise ModelConfigError(
                    f"{where}: {name} must hold {dim // 2} positive numbers, one per pair of rotated dimensions, "
                    f"got {len(values)} values"
                )
