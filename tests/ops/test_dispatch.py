"""Every op of layers gives on a device what it gives for NumPy arrays, in scratch memory or in place as it says."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import backend
from cutp.array.scratch import Scratch
from cutp.ops import dispatch, product_choice, skinny_gemm_cuda, stream_gemm_cuda
from tests.device_arrays import DeviceArray, emulated_device
from tests.emulation.emulator import needs_compiler

pytestmark = needs_compiler

float32, bfloat16, float16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = [float32, bfloat16, float16]
ROWS, WIDTH = 5, 64


@pytest.fixture
def memory(monkeypatch):
    with emulated_device(monkeypatch) as memory, Scratch(memory).use():
        yield memory


@pytest.fixture
def up(memory):
    def up(x):
        x = np.asarray(x)
        target = memory.empty(x.shape, x.dtype)
        memory.upload(target, np.ascontiguousarray(x))
        return target

    return up


def values(seed, *shape, dtype=float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def assert_close(got, expected, dtype):
    assert type(got) is DeviceArray and type(expected) is np.ndarray
    assert got.shape == expected.shape and got.dtype == expected.dtype
    step = {float32: 1e-6, bfloat16: 2.0**-7, float16: 2.0**-10}[dtype]
    a, b = got.host.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_allclose(a, b, rtol=step, atol=step * np.abs(b).max())


def check(op, arrays, up, dtype, **options):
    """The op's results for NumPy arrays and for the same ones on the device."""
    host = [None if a is None else a.copy() for a in arrays]
    device = [None if a is None else up(a) for a in arrays]
    expected, got = op(*host, **options), op(*device, **options)
    for one, other in zip(got if isinstance(got, tuple) else (got,),
                          expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert_close(one, other, dtype)
    return got, device


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_and_rows(up, dtype):
    table, tokens = values(0, 11, WIDTH, dtype=dtype), np.array([3, 13, 2, 3, 0], np.int64)
    got = dispatch.embedding(up(tokens), up(table), 3, dtype)
    assert_close(got, dispatch.embedding(tokens, table.astype(np.float32), 3, dtype), dtype)
    assert not got.host[2].any() and not got.host[4].any()  # of another rank's slice
    check(dispatch.take_rows, [table, np.array([4, 4, 0], np.int64)], up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("bias", [None, 24])
def test_linear(up, dtype, rows, bias):
    # NumPy multiplies float32 weights; rounded ones are the same numbers.
    x, w = values(1, rows, WIDTH, dtype=dtype), values(2, 24, WIDTH, dtype=dtype)
    b = None if bias is None else values(3, bias, dtype=dtype)
    expected = dispatch.linear(x, w.astype(np.float32), b if b is None else b.astype(np.float32))
    got = dispatch.linear(up(x), up(w), b if b is None else up(b))
    assert_close(got, expected, dtype)
    out = up(np.zeros((rows, 24), dtype))
    assert dispatch.linear(up(x), up(w), b if b is None else up(b), out) is out
    assert_close(out, expected, dtype)


def test_linear_takes_the_skinny_kernel_for_few_rows(up, monkeypatch):
    calls = []
    monkeypatch.setattr(skinny_gemm_cuda, "skinny_gemm", lambda x, *args, **kw: calls.append(x.shape[0]))
    for rows in (1, 8, 9):
        dispatch.linear(up(values(0, rows, WIDTH)), up(values(1, 8, WIDTH)))
    assert calls == [1, 8]
    monkeypatch.setattr(product_choice, "_SKINNY_BYTES", 8 * WIDTH * 4 - 1)
    dispatch.linear(up(values(0, 1, WIDTH)), up(values(1, 8, WIDTH)))
    assert calls == [1, 8]  # not for a large weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("options", [{}, {"name": "gelu_tanh"}, {"name": "gelu"}, {"limit": 4.0}, {"rows": 20},
                                     {"bias": True}])
def test_gated_linear(up, monkeypatch, dtype, hopper, options):
    monkeypatch.setattr(backend(), "capability", (9, 0) if hopper else None)
    rows, name, limit = options.get("rows", 3), options.get("name", "silu"), options.get("limit")
    x, w = values(1, rows, WIDTH, dtype=dtype), values(2, 48, WIDTH, dtype=dtype)
    b = values(3, 48, dtype=dtype) if "bias" in options else None
    expected = dispatch.gated_linear(x, w.astype(np.float32), b if b is None else b.astype(np.float32), name,
                                     limit=limit)
    assert_close(dispatch.gated_linear(up(x), up(w), b if b is None else up(b), name, limit=limit), expected, dtype)


def test_the_streaming_kernel_is_for_hopper(up, monkeypatch):
    calls = []
    monkeypatch.setattr(stream_gemm_cuda, "stream_gemm", lambda x, *args, **kw: calls.append(("plain", *x.shape)))
    monkeypatch.setattr(stream_gemm_cuda, "stream_gemm_gated", lambda x, *args, **kw: calls.append(("gated", *x.shape)))

    def run(x, w=None, name="silu"):
        calls.clear()
        w = up(values(1, 16, x.shape[1], dtype=x.dtype)) if w is None else w
        dispatch.linear(x, w)
        dispatch.gated_linear(x, w, None, name)
        return list(calls)

    def x(rows, width=WIDTH, dtype=bfloat16):
        return up(values(0, rows, width, dtype=dtype))

    assert run(x(3)) == []
    monkeypatch.setattr(backend(), "capability", (9, 0))
    assert run(x(3)) == [("plain", 3, WIDTH), ("gated", 3, WIDTH)]
    assert run(x(3, dtype=float16)) == [("plain", 3, WIDTH), ("gated", 3, WIDTH)]
    assert run(x(3), name="gelu") == [("plain", 3, WIDTH)] * 2
    assert run(x(16)) == [("plain", 16, WIDTH), ("gated", 16, WIDTH)]
    assert run(x(17)) == [("plain", 17, WIDTH)] * 2 and run(x(96)) == [("plain", 96, WIDTH)] * 2
    with monkeypatch.context() as many:
        many.setattr(stream_gemm_cuda, "splits_of", lambda rows: 1)  # as if the weight had many rows
        assert run(x(128)) == [("plain", 128, WIDTH)] * 2 and run(x(129)) == []
    for other in (x(97), x(3, dtype=float32), x(3, width=WIDTH + 8)):
        assert run(other) == [], (other.shape, other.dtype)
    with dispatch.row_invariant(True):
        assert run(x(3)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"weight_offset": 1.0}, {"multiply_before_cast": True}])
def test_norms(up, dtype, options):
    x, residual, weight = (values(i, *shape, dtype=dtype) for i, shape in enumerate(
        [(ROWS, WIDTH), (ROWS, WIDTH), (WIDTH,)]))
    check(lambda a, w: dispatch.rms_norm(a, w, 1e-5, **options), [x, weight], up, dtype)
    (total, _), (_, on_device, _) = check(lambda a, r, w: dispatch.add_rms_norm(a, r, w, 1e-5, **options),
                                          [x, residual, weight], up, dtype)
    assert total is on_device  # in the residual's place
    own = up(x)
    assert dispatch.rms_norm(own, up(weight), 1e-5, out=own, **options) is own
    assert_close(own, dispatch.rms_norm(x, weight, 1e-5, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(up, dtype):
    x, y = values(0, ROWS, WIDTH, dtype=dtype), values(1, ROWS, WIDTH, dtype=dtype)
    for multiplier in (1.0, 0.22):
        total, (first, _) = check(lambda a, b, m=multiplier: dispatch.residual_add(a, b, m), [x, y], up, dtype)
        assert total is first
    for factor in (1.0, 3.5):
        scaled, (own,) = check(lambda a, f=factor: dispatch.scale(a, f), [x], up, dtype)
        assert scaled is own
    for name in ("silu", "gelu", "gelu_pytorch_tanh"):
        check(lambda a, n=name: dispatch.gated_activation(a, n), [values(2, ROWS, 2 * WIDTH, dtype=dtype)], up, dtype)
    copy, (original,) = check(dispatch.copied, [x], up, dtype)
    assert not np.shares_memory(copy.host, original.host)
    assert dispatch.copied(x) is x


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_finished_in_float32(up, dtype):
    logits = 20 * values(0, ROWS, 30, dtype=dtype)
    for scaling, cap in ((1.0, None), (4.0, None), (1.0, 15.0), (2.0, 5.0)):
        expected = dispatch.finish_logits(logits.copy(), scaling, cap)
        got = dispatch.finish_logits(up(logits), scaling, cap)
        assert expected.dtype == float32
        assert_close(got, expected, float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_to_draw_from(up, dtype):
    """On a device those that need neither scaling nor a cap themselves; else those of `finish_logits`."""
    logits = 20 * values(0, ROWS, 30, dtype=dtype)
    there = up(logits)
    assert dispatch.logits_to_draw_from(there, 1.0, None) is there and there.dtype == dtype
    np.testing.assert_array_equal(there.host, logits)
    for scaling, cap in ((1.0, None), (4.0, None), (1.0, 15.0), (2.0, 5.0)):
        expected = dispatch.finish_logits(logits.copy(), scaling, cap)
        host = dispatch.logits_to_draw_from(logits.copy(), scaling, cap)
        assert host.dtype == float32
        np.testing.assert_array_equal(host, expected)
        if (scaling, cap) != (1.0, None):
            assert_close(dispatch.logits_to_draw_from(up(logits), scaling, cap), expected, float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [None, False, True])
def test_rotary_kv_write(up, dtype, turned):
    """turned: None for no rotation, else whether pairs are interleaved."""
    heads, kv_heads, head_dim, page_size = 4, 2, 64, 16
    qkv = values(0, ROWS, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = values(1, ROWS, head_dim // 2)
    cos, sin = (None, None) if turned is None else (np.cos(angles), np.sin(angles))
    slots = np.array([17, 3, -1, 40, 16], np.int64)
    pages = values(2, 3, 2, kv_heads, page_size, head_dim, dtype=dtype)
    real = slots >= 0  # NumPy knows no padding rows
    expected_pages, got_pages = pages.copy(), up(pages)
    expected = dispatch.rotary_kv_write(qkv[real], heads, *(c if c is None else c[real] for c in (cos, sin)),
                                        slots[real], expected_pages, interleaved=bool(turned))
    got = dispatch.rotary_kv_write(up(qkv), heads, *(c if c is None else up(c) for c in (cos, sin)), up(slots),
                                   got_pages, interleaved=bool(turned))
    assert got.shape == (ROWS, heads, head_dim)
    assert_close(got.host[real].view(DeviceArray), expected, dtype)
    assert_close(got_pages, expected_pages, dtype)
