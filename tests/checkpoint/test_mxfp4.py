"""MXFP4 numbers, each code and scale by the formula of the format."""

import math

import ml_dtypes
import numpy as np
import pytest

from cutp.checkpoint.mxfp4 import dequantize_mxfp4

pytestmark = pytest.mark.filterwarnings("error")


def e2m1(code):
    """Sign, two exponent bits (bias 1), one mantissa bit."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def test_every_byte_and_scale():
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    for scale in (0, 1, 100, 127, 128, 252):
        values = dequantize_mxfp4(blocks, np.full((16, 1), scale, np.uint8))
        assert values.shape == (16, 32) and values.dtype == np.float32
        expected = [[e2m1(code) * 2.0 ** (scale - 127) for byte in row[0] for code in (byte & 15, byte >> 4)]
                    for row in blocks.tolist()]
        assert values.tolist() == expected
        assert (values.astype(ml_dtypes.bfloat16).astype(np.float32) == values).all() or scale < 2


def test_negative_zero_and_the_scale_that_is_no_number():
    value = dequantize_mxfp4(np.full((1, 16), 0x88, np.uint8), np.array([127], np.uint8))
    assert (value == 0).all() and np.signbit(value).all()
    assert np.isnan(dequantize_mxfp4(np.zeros((1, 16), np.uint8), np.array([255], np.uint8))).all()


def test_each_block_has_its_own_scale():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 4, 16), dtype=np.uint8)
    scales = rng.integers(110, 140, (2, 3, 4), dtype=np.uint8)
    values = dequantize_mxfp4(blocks, scales)
    assert values.shape == (2, 3, 128)
    for index in np.ndindex(2, 3, 128):
        byte = blocks[(*index[:2], index[2] // 32, index[2] % 32 // 2)]
        code = int(byte >> 4 if index[2] % 2 else byte & 15)
        assert values[index] == math.ldexp(e2m1(code), int(scales[(*index[:2], index[2] // 32)]) - 127)


def test_no_blocks():
    assert dequantize_mxfp4(np.zeros((5, 0, 16), np.uint8), np.zeros((5, 0), np.uint8)).shape == (5, 0)
