"""latent.cu against rotary.py, kv_write.py and latent_attention.py, in the emulation and on a GPU."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.kv_write import latent_write
from cutp.ops.latent_attention import latent_attention as reference
from cutp.ops.latent_cuda import latent_attention, latent_rotary_write, max_channels
from cutp.ops.rotary import apply_rotary
from tests.ops.kernel_results import (
    DTYPES,
    assert_same_bits,
    bfloat16,
    emulated_only,
    float16,
    float32,
    in_every_order,
    random_values,
    read_only,
)

# ---- rotation and write


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", [(5, 3, 32, 16, 8), (2, 8, 40, 2, 24), (3, 4, 512, 64, 128), (0, 1, 8, 8, 8)],
                         ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_write(device, dtype, sizes, interleaved):
    tokens, heads, rank, rope, nope = sizes
    compressed, latent = (random_values(i, (tokens, n), dtype) for i, n in ((1, rank + rope), (2, rank)))
    q = random_values(3, (tokens, heads, nope + rope), dtype)
    rng = np.random.default_rng(4)
    angles = rng.uniform(-9, 9, (tokens, rope // 2))
    cos, sin = (f(angles).astype(dtype).astype(np.float32) for f in (np.cos, np.sin))
    slots = rng.permutation(32)[:tokens]
    slots[2:3] = -1
    pages = device.poisoned((2, 1, 1, 16, rank + rope), dtype)
    q_out = device.poisoned((tokens, heads, rank + rope), dtype)
    inputs = read_only(device, compressed, latent, q, cos, sin, slots)
    latent_rotary_write(*inputs, pages, q_out=q_out, interleaved=interleaved, pdl=True)
    real = slots >= 0
    key = apply_rotary(compressed[:, None, rank:], cos, sin, interleaved=interleaved)[:, 0]
    expected_pages = np.full((2, 1, 1, 16, rank + rope), np.nan, dtype)
    latent_write(np.concatenate([latent, key], axis=1)[real], expected_pages, slots[real])
    assert_same_bits(device.numpy(pages), expected_pages)
    expected_q = np.full((tokens, heads, rank + rope), np.nan, dtype)
    expected_q[real, :, rank:] = apply_rotary(q[..., nope:], cos, sin, interleaved=interleaved)[real]
    assert_same_bits(device.numpy(q_out), expected_q)


# ---- attention


class Case:
    """Two requests; rows of queries at positions of them, and one that is padding. All else in the cache is NaN."""

    def __init__(self, dtype, heads, channels, value_dim, page_size=16):
        rng = np.random.default_rng(channels)
        self.value_dim, self.scale = value_dim, 0.2
        self.lengths = np.array([1, 2, 19, 0, 38, 39, 16, 17], np.int32)
        self.rows = np.array([1, 0, 0, 0, 1, 1, 0, 1])
        self.q = rng.standard_normal((len(self.rows), heads, channels)).astype(dtype)
        pages = np.full((7, 1, 1, page_size, channels), np.nan, np.float32)
        self.table = np.array([[5, 2, 2**30], [3, 0, 6]], np.int32)
        for request, length in ((0, 19), (1, 39)):
            positions = np.arange(length)
            pages[self.table[request, positions // page_size], 0, 0, positions % page_size] = \
                rng.standard_normal((length, channels))
        self.pages = pages.astype(dtype)

    def expected(self):
        out = np.zeros((*self.q.shape[:2], self.value_dim), np.float32)
        for t in np.flatnonzero(self.lengths):
            out[t] = reference(self.q[t : t + 1].astype(np.float32), self.pages.astype(np.float32),
                               self.table[self.rows[t]][None], np.array([0, 1]), self.lengths[t : t + 1] - 1,
                               self.scale, self.value_dim)[0]
        return out

    def run(self, device, which=slice(None), own_rows=False):
        out = device.poisoned((*self.q[which].shape[:2], self.value_dim), self.q.dtype)
        table, rows = (self.table[self.rows[which]], None) if own_rows else (self.table, device.array(self.rows[which]))
        q, pages, table, lengths = read_only(device, self.q[which], self.pages, table, self.lengths[which])
        latent_attention(q, pages, table, lengths, self.scale, table_rows=rows, out=out, pdl=True)
        return device.numpy(out)


@pytest.mark.parametrize("heads, channels, value_dim", [(1, 8, 8), (3, 48, 32), (5, 576, 512), (4, 640, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(device, dtype, heads, channels, value_dim):
    case = Case(dtype, heads, channels, value_dim)
    got, expected = case.run(device).astype(np.float32), case.expected()
    unit = {bfloat16: 2.0**-8, float16: 2.0**-11, float32: 2.0**-18}[dtype]
    np.testing.assert_allclose(got, expected, rtol=unit, atol=unit)
    assert not got[3].any()


def test_rows_do_not_depend_on_others_nor_on_how_their_request_is_found(device):
    case = Case(bfloat16, 3, 48, 32)
    together = case.run(device)
    assert_same_bits(case.run(device, own_rows=True), together)
    for t in (1, 5):
        assert_same_bits(case.run(device, slice(t, t + 1))[0], together[t])


@emulated_only
def test_the_result_does_not_depend_on_the_order_of_threads(device):
    case = Case(float16, 5, 48, 32)
    in_every_order(lambda: (case.run(device),))


@emulated_only
@pytest.mark.parametrize(("change", "message"), [
    ({"q": np.zeros((2, 3, 50), np.float32), "pages": np.zeros((1, 1, 1, 16, 50), np.float32)}, "multiples of 4"),
    ({"q": np.zeros((2, 3, 644), np.float32), "pages": np.zeros((1, 1, 1, 16, 644), np.float32)}, "at most 640"),
    ({"out": np.zeros((2, 3, 56), np.float32)}, "56 of 48 float32 channels"),
    ({"pages": np.zeros((1, 2, 1, 16, 48), np.float32)}, "pages has shape"),
    ({"lookup_table": np.zeros((1, 1), np.int32)}, r"lookup_table has shape \(1, 1\); it needs \(2, 1\)"),
    ({"lengths": np.zeros(2, np.int64)}, "lengths has dtype int64"),
    ({"table_rows": np.zeros(2, np.int32)}, "table_rows has dtype int32"),
    ({"scale": -1.0}, "scale is -1.0"),
])
def test_arguments_that_do_not_fit(device, change, message):
    given = {"q": np.zeros((2, 3, 48), np.float32), "pages": np.zeros((1, 1, 1, 16, 48), np.float32),
             "lookup_table": np.zeros((2, 1), np.int32), "lengths": np.ones(2, np.int32), "scale": 1.0,
             "out": np.zeros((2, 3, 32), np.float32), **change}
    with pytest.raises(ConfigError, match=f"latent_attention: .*{message}"):
        latent_attention(**given)


def test_channels_that_there_can_be():
    assert [max_channels(dtype) for dtype in (bfloat16, float32)] == [768, 640]
