"""The numbers that describe a model's rotary position embedding, free of any file format."""

from __future__ import annotations

from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeParameters:
    """Parameters of one rotary embedding, named as in Hugging Face's `rope_parameters`.

    A field that does not belong to `rope_type` is ignored; None means "not given" and takes the default that
    `cutp.nn.rotary_embedding` states for the type.

    Fields:
        rope_type: one of `ROPE_TYPES`.
        theta: base of the geometric series of wavelengths (`rope_theta`), > 0.
        factor: context extension factor (linear, dynamic, llama3, yarn, longrope).
        original_max_position_embeddings: context length of pretraining, in tokens (llama3, yarn, longrope).
        low_freq_factor, high_freq_factor: bounds of the blended band, in turns per original context (llama3).
        attention_factor: multiplies cos and sin (yarn, longrope); None derives it.
        beta_fast, beta_slow: bounds of the ramp, in turns per original context (yarn; 32 and 1 when None or 0).
        mscale, mscale_all_dim: when both are non-zero, the derived attention factor is their ratio (yarn). Multi-head
            latent attention reads `mscale_all_dim` of every type but default.
        truncate: round the ends of the ramp outwards to whole dimensions (yarn).
        short_factor, long_factor: one divisor per frequency, `rotary_dim / 2` of them (longrope).
        partial_rotary_factor: share of the head that is rotated, in (0, 1].
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0
