"""MXFP4: blocks of 32 four-bit numbers that share a power of two (Open Compute Project, Microscaling Formats v1.0)."""

from __future__ import annotations

import numpy as np

BLOCK_SIZE = 32  # numbers that share a scale
BLOCK_BYTES = BLOCK_SIZE // 2

_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_E2M1, -_E2M1])
# Both numbers of a byte, the one in the low half first, as one 8-byte element: looked up at once.
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=1).view(np.uint64)[:, 0]
_NAN_SCALE = 255
_SCALES = np.ldexp(np.float32(1), np.minimum(np.arange(256), 254) - 127)
_SCALES[_NAN_SCALE] = np.nan


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., G, 16] and scales uint8 [..., G] -> float32 [..., G * 32].

    A number is its E2M1 value times 2^(scale - 127), NaN for the scale 255. Every result is exact in float32, and in
    bfloat16 unless it is below its normal range.
    """
    values = _PAIRS.take(blocks).view(np.float32)  # [..., G, 32]
    values *= _SCALES[scales][..., None]
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)
