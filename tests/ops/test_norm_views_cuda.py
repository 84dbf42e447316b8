"""rms_norm.cu where tokens lie apart, sums of squares over several ranks, and layer_norm, against NumPy."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import rms_norm as reference
from cutp.ops.rms_norm_cuda import layer_norm, rms_norm, square_sum
from tests.ops.kernel_results import DTYPES, assert_same_bits, bfloat16, distances, emulated_only, float32
from tests.ops.test_rms_norm_cuda import assert_equals_reference, random_rows, random_weight

# Tokens, columns before, heads, head size, columns behind: all multiples of 16 bytes.
VIEWS = [(5, 0, 3, 64, 192), (4, 192, 2, 128, 64), (1, 8, 7, 72, 8), (3, 64, 1, 2048, 16), (0, 0, 2, 64, 64)]


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_inside_a_projection_in_place(device, dtype, view):
    tokens, before, heads, dim, behind = view
    whole = random_rows(1, max(1, tokens), before + heads * dim + behind, dtype=dtype)[:tokens]
    weight, middle = random_weight(1, dim, dtype, 0), slice(before, before + heads * dim)
    there = device.array(whole)
    x = there[:, middle].reshape(tokens, heads, dim)
    rms_norm(x, device.array(weight), 1e-5, out=x, pdl=True)
    got = device.numpy(there)
    expected = reference.rms_norm(whole[:, middle].reshape(tokens, heads, dim), weight, 1e-5)
    assert_equals_reference(np.ascontiguousarray(got[:, middle]).reshape(expected.shape), expected) if tokens else None
    untouched = np.ones(whole.shape[1], bool)
    untouched[middle] = False
    assert_same_bits(got[:, untouched], whole[:, untouched])


def test_from_a_view_to_memory_of_its_own(device):
    whole, weight = random_rows(2, 4, 96, dtype=bfloat16), random_weight(2, 64, bfloat16, 1)
    options = {"weight_offset": 1.0, "multiply_before_cast": True}
    out = device.poisoned((4, 64), bfloat16)
    rms_norm(device.array(whole)[:, :64], device.array(weight), 1e-6, **options, out=out)
    assert_equals_reference(device.numpy(out), reference.rms_norm(whole[:, :64], weight, 1e-6, **options))


@pytest.mark.parametrize("dim", [64, 1024, 4104])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_longer_vectors(device, dtype, dim):
    """Two ranks' parts give what one norm of both gives."""
    whole, weight = random_rows(3, 5, 3 * dim, dtype=dtype), random_weight(3, 3 * dim, dtype, 0)
    there, sums = device.array(whole), device.poisoned((5, 4), float32)
    parts = [slice(0, dim), slice(dim, 3 * dim)]
    for i, part in enumerate(parts):
        square_sum(there[:, part], out=sums[:, 2 * i : 2 * i + 1], pdl=True)
    got = device.numpy(sums)
    assert np.isnan(got[:, 1::2]).all()
    for i, part in enumerate(parts):
        expected = reference.square_sum(whole[:, part])
        np.testing.assert_allclose(got[:, 2 * i : 2 * i + 1], expected, rtol=1e-6)
    total = np.full((5, 2), np.nan, np.float32)
    total[:, 1] = got[:, 0] + got[:, 2]
    for part in parts:
        x = there[:, part]
        rms_norm(x, device.array(weight[part]), 1e-5, square_sums=device.array(total)[:, 1:], total_dim=3 * dim, out=x,
                 pdl=True)
    assert_equals_reference(device.numpy(there), reference.rms_norm(whole, weight, 1e-5))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dim", [8, 264, 2048, 8200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(device, dtype, dim, biased):
    x = random_rows(dim, 5, dim, dtype=dtype)
    x = (x.astype(np.float32) + np.float32(3)).astype(dtype)  # a mean that matters
    weight, bias = random_weight(4, dim, dtype, 0), random_weight(5, dim, dtype, 1) if biased else None
    expected = reference.layer_norm(x, weight, bias, 1e-5)
    there = device.array(x)
    layer_norm(there, device.array(weight), None if bias is None else device.array(bias), 1e-5, out=there, pdl=True)
    got = device.numpy(there)
    if dtype == float32:
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    else:
        apart = distances(got, expected)
        large = np.abs(expected.astype(np.float32)) > 1e-2
        assert apart[large].max(initial=0) <= 1 and np.count_nonzero(apart) <= max(2, apart.size * 0.02)


@emulated_only
@pytest.mark.parametrize(("arguments", "message"), [
    ({"x": np.zeros((2, 3, 128), np.float32)[:, :, :64]}, "x of shape .* is not contiguous, but for its first axis"),
    ({"x": np.zeros((3, 66), np.float32)[:, :64]}, "a multiple of 16 bytes apart"),
    ({"x": np.zeros((3, 64), np.float32)[::-1]}, "x of shape .* is not contiguous"),
    ({"square_sums": np.zeros((3, 1), np.float32)}, "given together"),
    ({"square_sums": np.zeros((3, 1), np.float32), "total_dim": 32}, "no part of 32"),
    ({"square_sums": np.zeros(3, np.float32), "total_dim": 128}, "needs one float32 a row"),
    ({"square_sums": np.zeros((3, 1)), "total_dim": 128}, "needs one float32 a row"),
])
def test_views_that_do_not_fit(device, arguments, message):
    x = arguments.pop("x", np.zeros((3, 64), np.float32))
    with pytest.raises(ConfigError, match=message):
        rms_norm(x, np.ones(64, np.float32), 1e-5, **arguments, out=np.zeros(x.shape, np.float32))
