"""The kernels of rotary.cu and rotary_table.cu against their specification in NumPy."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import rotary as reference
from cutp.ops.kv_write import kv_write
from cutp.ops.rotary_cuda import narrow_heads, rotary_kv_write, rotary_table
from tests.emulation.emulator import needs_compiler
from tests.ops.kernel_results import (
    DTYPES,
    assert_few,
    assert_same_bits,
    bfloat16,
    distances,
    float16,
    float32,
    gpu_only,
    in_every_order,
    random_values,
    read_only,
)

# ---- the table


def frequencies(half, base=10000.0):
    return (base ** -(np.arange(half) / max(half, 1))).astype(np.float32)


def exact_table(positions, inv_freq, scaling, dtype):
    """The float32 angle's cosine and sine, computed in float64 and rounded at the end."""
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    factor = np.asarray(scaling, np.float64).reshape(-1, 1)
    return [(f(angles) * factor).astype(np.float32).astype(dtype) for f in (np.cos, np.sin)]


def table_on(device, positions, inv_freq, scaling, dtype, request_of_token=None):
    shape = (len(positions), inv_freq.shape[-1])
    cos, sin = (device.poisoned(shape, float32) for _ in range(2))
    arrays = read_only(device, positions, inv_freq)
    scaling = read_only(device, scaling)[0] if np.ndim(scaling) else scaling
    request = None if request_of_token is None else read_only(device, request_of_token)[0]
    rotary_table(*arrays, scaling, dtype, request_of_token=request, cos_out=cos, sin_out=sin, pdl=True)
    return device.numpy(cos), device.numpy(sin)


def assert_table(got, positions, inv_freq, scaling, dtype):
    """In float32 apart by 2 from the exact value, and by 4 from the reference, which has errors, too; the product with
    a scaling may double that. Other dtypes: nearly all equal."""
    exact = exact_table(positions, inv_freq, scaling, dtype)
    expected = reference.rotary_table(positions, inv_freq, scaling, dtype)
    most = 2 if np.all(scaling == 1) else 4
    for ours, truth, theirs in zip(got, exact, expected, strict=True):
        assert not np.isnan(ours).any()
        assert_same_bits(ours.astype(dtype).astype(np.float32), ours)
        apart = distances(ours.astype(dtype), truth)
        if dtype == float32:
            assert apart.max(initial=0) <= most and distances(ours, theirs).max(initial=0) <= 2 * most
        else:
            assert apart.max(initial=0) <= 1
            assert_few(apart, dtype)


@pytest.mark.parametrize("scaling", [1.0, 0.8731])
@pytest.mark.parametrize("half", [1, 10, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(device, dtype, half, scaling):
    # Both sides of the border of the slow range reduction, and positions that float32 does not hold.
    positions = np.array([0, 1, 2, 127, 4095, 4097, 65001, 105614, 105616, 131071, 1048577, 2**24 + 1, 2**31 + 129])
    inv_freq = frequencies(half)
    inv_freq[-1] = 0.7317
    got = table_on(device, positions, inv_freq, scaling, dtype)
    assert_table(got, positions, inv_freq, scaling, dtype)


def test_angles_between_multiples_of_a_right_angle(device):
    positions, inv_freq = np.arange(200), np.array([np.pi / 2, np.pi, 0.011], np.float32)
    assert_table(table_on(device, positions, inv_freq, 1.0, float32), positions, inv_freq, 1.0, float32)


@pytest.mark.parametrize("own_frequencies", [False, True])
@pytest.mark.parametrize("own_scaling", [False, True])
def test_frequencies_and_scaling_of_each_request(device, own_frequencies, own_scaling):
    positions, requests = np.array([7, 0, 1, 2, 500, 9]), np.array([2, 0, 0, 1, 1, 2])
    inv_freq = np.stack([frequencies(16), frequencies(16, 5e5), frequencies(16) / 8]) if own_frequencies else \
        frequencies(16)
    scaling = np.array([1.0, 0.5, 1.25], np.float32) if own_scaling else 0.75
    got = table_on(device, positions, inv_freq, scaling, bfloat16, requests)
    assert_table(got, positions, inv_freq[requests] if own_frequencies else inv_freq,
                 scaling[requests] if own_scaling else scaling, bfloat16)


@pytest.mark.parametrize("marked_by", ["position", "request"])
def test_padded_rows_of_the_table_are_not_written(device, marked_by):
    positions, requests = np.array([3, 4, 5, 6]), np.array([0, 1, 0, 1])
    (positions if marked_by == "position" else requests)[[1, 3]] = -1
    inv_freq = np.stack([frequencies(8), frequencies(8) / 2])
    cos, sin = (device.array(np.full((4, 8), 7, np.float32)) for _ in range(2))
    inputs = read_only(device, positions, inv_freq, requests)
    rotary_table(*inputs[:2], 1.0, float32, request_of_token=inputs[2], cos_out=cos, sin_out=sin)
    real, got = [0, 2], [device.numpy(part) for part in (cos, sin)]
    assert_table([part[real] for part in got], positions[real], inv_freq[requests[real]], 1.0, float32)
    for part in got:
        np.testing.assert_array_equal(part[[1, 3]], np.full((2, 8), 7))


@pytest.mark.parametrize("n_tokens", [0, 1, 7, 8, 9])
def test_table_of_any_number_of_tokens(device, n_tokens):
    positions = np.arange(n_tokens) * 3
    got = table_on(device, positions, frequencies(4), 1.0, bfloat16)
    assert_table(got, positions, frequencies(4), 1.0, bfloat16)
    for t in range(n_tokens):
        alone = table_on(device, positions[t : t + 1], frequencies(4), 1.0, bfloat16)
        assert_same_bits(np.stack([part[t] for part in got]), np.concatenate(alone))


@pytest.mark.parametrize(("change", "message"), [
    ({"positions": np.zeros(3, np.int32)}, "positions has dtype int32; it needs int64"),
    ({"positions": np.zeros((3, 1), np.int64)}, r"positions has shape \(3, 1\); it needs \[T\]"),
    ({"inv_freq": np.zeros(8)}, "inv_freq has dtype float64; it needs float32"),
    ({"inv_freq": np.zeros((1, 2, 8), np.float32)}, r"inv_freq has shape \(1, 2, 8\)"),
    ({"inv_freq": np.zeros((2, 8), np.float32)}, "inv_freq has a row for each request, so request_of_token is needed"),
    ({"attention_scaling": np.ones(2, np.float32)}, "attention_scaling has a row for each request"),
    ({"attention_scaling": np.ones(3, np.float32), "inv_freq": np.zeros((2, 8), np.float32)},
     r"attention_scaling has shape \(3,\); it needs \(2,\)"),
    ({"attention_scaling": np.ones(2)}, "attention_scaling has dtype float64; it needs float32"),
    ({"request_of_token": np.zeros(2, np.int64)}, r"request_of_token has shape \(2,\); it needs \(3,\)"),
    ({"request_of_token": np.zeros(3, np.int32)}, "request_of_token has dtype int32; it needs int64"),
    ({"cos_out": np.zeros((3, 9), np.float32)}, r"cos_out has shape \(3, 9\); it needs \(3, 8\)"),
    ({"sin_out": np.zeros((3, 8), np.float16)}, "sin_out has dtype float16; it needs float32"),
    ({"sin_out": np.zeros((3, 16), np.float32)[:, ::2]}, "sin_out of shape .* is not contiguous"),
    ({"dtype": np.float64}, "dtype is float64; it needs to be one of bfloat16, float16, float32"),
])
def test_arguments_that_do_not_fit_the_table(change, message):
    given = {"positions": np.zeros(3, np.int64), "inv_freq": np.zeros(8, np.float32), "attention_scaling": 1.0,
             "dtype": bfloat16, "cos_out": np.zeros((3, 8), np.float32), "sin_out": np.zeros((3, 8), np.float32)}
    with pytest.raises(ConfigError, match=f"rotary_table: {message}"):
        rotary_table(**{**given, **change})


# ---- rotation and cache write


class Case:
    """Inputs of rotary_kv_write for T tokens, with slots all over the cache, and what must come out."""

    def __init__(self, seed, dtype, n_tokens, q_heads, kv_heads, head_dim, rotary_dim, interleaved=False, page_size=16):
        rng = np.random.default_rng(seed)
        self.q_heads, self.kv_heads, self.head_dim, self.interleaved = q_heads, kv_heads, head_dim, interleaved
        self.qkv = random_values(seed, (n_tokens, (q_heads + 2 * kv_heads) * head_dim), dtype, spread=1)
        positions = rng.integers(0, 10000, n_tokens)
        self.cos, self.sin = reference.rotary_table(positions, frequencies(rotary_dim // 2, 100), 1.1, dtype)
        n_pages = -(-2 * n_tokens // page_size) + 1
        self.slots = rng.permutation(n_pages * page_size)[:n_tokens].astype(np.int64)
        self.pages_shape = (n_pages, 2, kv_heads, page_size, head_dim)

    def expected(self):
        """q_out and pages, NaN where nothing is written."""
        n_tokens, real = len(self.qkv), self.slots >= 0
        heads = self.qkv.reshape(n_tokens, self.q_heads + 2 * self.kv_heads, self.head_dim)
        turned = reference.apply_rotary(heads[:, : self.q_heads + self.kv_heads], self.cos, self.sin,
                                        interleaved=self.interleaved)
        q_out = np.where(real[:, None, None], turned[:, : self.q_heads], np.nan).astype(self.qkv.dtype)
        pages = np.full(self.pages_shape, np.nan, self.qkv.dtype)
        kv_write(turned[real, self.q_heads :], heads[real, self.q_heads + self.kv_heads :], pages, self.slots[real])
        return q_out, pages

    def run(self, device, **options):
        q_out = device.poisoned((len(self.qkv), self.q_heads, self.head_dim), self.qkv.dtype)
        pages = device.poisoned(self.pages_shape, self.qkv.dtype)
        inputs = read_only(device, self.qkv, self.cos, self.sin, self.slots)
        rotary_kv_write(*inputs, pages, q_out=q_out, interleaved=self.interleaved, **options)
        return device.numpy(q_out), device.numpy(pages)

    def rows(self, chosen):
        """The case with these tokens alone, in the same cache."""
        part = Case.__new__(Case)
        part.__dict__.update(self.__dict__)
        part.qkv, part.cos, part.sin, part.slots = (a[chosen] for a in (self.qkv, self.cos, self.sin, self.slots))
        return part


def assert_right(device, case, **options):
    for got, expected in zip(case.run(device, **options), case.expected(), strict=True):
        assert_same_bits(got, expected)


# Hq, Hkv, D, R: all channels turned, some, a number that is no multiple of 16 bytes, none.
HEADS = [
    (4, 1, 64, 64), (2, 2, 80, 80), (3, 1, 96, 96), (8, 2, 128, 128), (5, 1, 256, 256), (32, 8, 64, 64), (1, 1, 8, 8),
    (2, 1, 128, 64), (3, 3, 64, 16), (1, 1, 128, 96), (2, 1, 80, 20), (2, 1, 96, 24), (1, 2, 16, 10), (3, 1, 64, 0),
]


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "-".join(map(str, heads)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(device, dtype, heads, interleaved):
    assert_right(device, Case(sum(heads), dtype, 1 + sum(heads) % 3, *heads, interleaved), pdl=True)


@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
def test_page_sizes_and_padded_rows(device, page_size):
    case = Case(1, bfloat16, 9, 2, 1, 64, 64, page_size=page_size)
    case.slots[[0, 3, 4, 8]] = [-1, -5, -page_size - 1, np.iinfo(np.int64).min]
    assert_right(device, case)


def test_special_values(device):
    case = Case(2, bfloat16, 4, 2, 1, 16, 16)
    case.qkv[0, :7] = [np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38, 1e-40]
    case.qkv[1] = -0.0
    with np.errstate(all="ignore"):
        assert_right(device, case)


def test_no_tokens(device):
    assert_right(device, Case(3, bfloat16, 0, 2, 1, 64, 64))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_row_does_not_depend_on_the_others(device, interleaved):
    case = Case(4, bfloat16, 5, 3, 1, 64, 32, interleaved)
    q_out, pages = case.run(device)
    for t in range(5):
        alone_q, alone_pages = case.rows(slice(t, t + 1)).run(device)
        assert_same_bits(alone_q[0], q_out[t])
        page, row = divmod(int(case.slots[t]), pages.shape[3])
        assert_same_bits(alone_pages[page, :, :, row], pages[page, :, :, row])


@needs_compiler
@pytest.mark.parametrize("case", [
    Case(5, bfloat16, 3, 8, 2, 128, 128), Case(6, float16, 3, 5, 1, 80, 20), Case(7, float32, 2, 3, 2, 64, 32, True),
], ids=["halves", "any", "interleaved"])
def test_the_result_does_not_depend_on_the_order_of_threads(case):
    def run():
        q_out = np.full((len(case.qkv), case.q_heads, case.head_dim), np.nan, case.qkv.dtype)
        pages = np.full(case.pages_shape, np.nan, case.qkv.dtype)
        rotary_kv_write(case.qkv, case.cos, case.sin, case.slots, pages, q_out=q_out, interleaved=case.interleaved)
        return q_out, pages

    for got, expected in zip(in_every_order(run), case.expected(), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("heads", [(32, 8, 128, 128), (8, 1, 128, 128), (71, 71, 64, 64), (16, 16, 256, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 33, 257])
@gpu_only
def test_real_sizes(device, n_tokens, interleaved, heads):
    assert_right(device, Case(n_tokens, bfloat16, n_tokens, *heads, interleaved, page_size=64))


@gpu_only
def test_a_cache_of_more_than_2_to_the_31_elements(device):
    import cupy

    case = Case(8, float16, 2, 4, 2, 128, 128, page_size=64)
    pages = cupy.zeros((2**31 // (2 * 2 * 64 * 128) + 2, 2, 2, 64, 128), np.float16)
    case.slots = np.array([pages.shape[0] * 64 - 1, 70])
    inputs = [cupy.asarray(a) for a in (case.qkv, case.cos, case.sin, case.slots)]
    rotary_kv_write(*inputs, pages, q_out=cupy.empty((2, 4, 128), np.float16))
    case.slots, case.pages_shape = np.array([127, 70]), (2, *pages.shape[1:])
    expected = case.expected()[1]
    assert_same_bits(cupy.asnumpy(pages[-1, :, :, -1]), expected[1, :, :, 63])
    assert_same_bits(cupy.asnumpy(pages[1, :, :, 6]), expected[1, :, :, 6])


@pytest.mark.parametrize(("change", "message"), [
    ({"qkv": np.zeros((3, 256), np.float64)}, "qkv has dtype float64; it needs bfloat16, float16, float32"),
    ({"qkv": np.zeros((3, 255), np.float32)}, r"qkv has shape \(3, 255\); it needs \(3, 252\)"),
    ({"qkv": np.zeros((3, 512), np.float32)[:, ::2]}, "qkv of shape .* is not contiguous"),
    ({"qkv": np.zeros((3, 4, 64), np.float32)}, r"qkv has shape \(3, 4, 64\); it needs \[T, \(Hq"),
    ({"cos": np.zeros(32, np.float32)}, r"cos has shape \(32,\); it needs \[T, R/2\]"),
    ({"cos": np.zeros((3, 32), np.float16)}, "cos has dtype float16; it needs float32"),
    ({"cos": np.zeros((2, 32), np.float32)}, r"cos has shape \(2, 32\); it needs \(3, 32\)"),
    ({"sin": np.zeros((3, 16), np.float32)}, r"sin has shape \(3, 16\); it needs \(3, 32\)"),
    ({"cos": np.zeros((3, 40), np.float32), "sin": np.zeros((3, 40), np.float32)},
     r"cos of shape \(3, 40\) turns 80 channels, but heads have 64"),
    ({"slots": np.zeros(3, np.int32)}, "slots has dtype int32; it needs int64"),
    ({"slots": np.zeros(4, np.int64)}, r"slots has shape \(4,\); it needs \(3,\)"),
    ({"pages": np.zeros((2, 1, 16, 64), np.float32)}, r"pages has shape \(2, 1, 16, 64\); it needs \[P, 2"),
    ({"pages": np.zeros((2, 2, 1, 16, 32), np.float32)}, "pages has shape .*; it needs .*64"),
    ({"pages": np.zeros((2, 3, 1, 16, 64), np.float32)}, "pages has shape .*; it needs "),
    ({"pages": np.zeros((2, 2, 1, 16, 64), np.float16)}, "pages has dtype float16; it needs float32"),
    ({"pages": np.zeros((4, 2, 1, 16, 64), np.float32)[::2]}, "pages of shape .* is not contiguous"),
    ({"pages": np.broadcast_to(np.zeros(64, np.float32), (2**28, 2, 1, 16, 64))}, "is not contiguous"),
    ({"q_out": np.zeros((3, 128), np.float32)}, r"q_out has shape \(3, 128\); it needs \[T, Hq, W\]"),
    ({"q_out": np.zeros((2, 2, 64), np.float32)}, r"q_out has shape \(2, 2, 64\); it needs \(3, 2, 64\)"),
    ({"q_out": np.zeros((3, 2, 64), np.float16)}, "q_out has dtype float16; it needs float32"),
])
def test_arguments_that_do_not_fit(change, message):
    given = {"qkv": np.zeros((3, 256), np.float32), "cos": np.zeros((3, 32), np.float32),
             "sin": np.zeros((3, 32), np.float32), "slots": np.zeros(3, np.int64),
             "pages": np.zeros((2, 2, 1, 16, 64), np.float32), "q_out": np.zeros((3, 2, 64), np.float32)}
    with pytest.raises(ConfigError, match=f"rotary_kv_write: .*{message}"):
        rotary_kv_write(**{**given, **change})


@pytest.mark.parametrize(("head_dim", "dtype"), [(12, bfloat16), (6, float32)])
def test_head_sizes_that_are_refused(head_dim, dtype):
    case = Case(9, dtype, 1, 1, 1, head_dim, 2)
    with pytest.raises(ConfigError, match=f"heads of {head_dim} {dtype} elements; they need a multiple of 16 bytes"):
        rotary_kv_write(case.qkv, case.cos, case.sin, case.slots, np.zeros(case.pages_shape, dtype),
                        q_out=np.zeros((1, 1, head_dim), dtype))


# ---- heads that become longer by zeros, and shorter again


@pytest.mark.parametrize("rotary_dim", [0, 20, 32])
@pytest.mark.parametrize("head_dim, width", [(32, 64), (48, 64), (112, 128), (192, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_longer_heads(device, dtype, head_dim, width, rotary_dim):
    case = Case(8, dtype, 4, 3, 2, head_dim, rotary_dim)
    case.slots[1] = -1
    short_q, short_pages = case.run(device)
    q_out = device.poisoned((4, 3, width), dtype)
    pages = device.poisoned((*short_pages.shape[:4], width), dtype)
    inputs = read_only(device, case.qkv, case.cos, case.sin, case.slots)
    rotary_kv_write(*inputs, pages, q_out=q_out, interleaved=case.interleaved, pdl=True)
    for got, short in ((device.numpy(q_out), short_q), (device.numpy(pages), short_pages)):
        assert_same_bits(np.ascontiguousarray(got[..., :head_dim]), short)
        written = ~np.isnan(short[..., 0].astype(np.float32))
        assert not got[written][:, head_dim:].any() and np.isnan(got[~written].astype(np.float32)).all()


@pytest.mark.parametrize("head_dim, width", [(8, 64), (112, 128), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_heads(device, dtype, head_dim, width):
    for shape in ((3, 5, width), (40, 2, width), (0, 2, width)):
        x, out = random_values(9, shape, dtype), device.poisoned((*shape[:2], head_dim), dtype)
        narrow_heads(*read_only(device, x), out=out, pdl=True)
        assert_same_bits(device.numpy(out), np.ascontiguousarray(x[..., :head_dim]))


@pytest.mark.parametrize("head_dim, width", [(72, 64), (6, 64), (0, 64)])
def test_heads_that_cannot_be_narrowed(head_dim, width):
    with pytest.raises(ConfigError, match="narrow_heads: .*multiple of 16 bytes"):
        narrow_heads(np.zeros((2, 3, width), np.float32), out=np.zeros((2, 3, head_dim), np.float32))
