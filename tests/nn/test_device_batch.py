"""Batches on a device: their arrays, rotary tables and attention are those of `RaggedBatch`."""

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import backend
from cutp.array.scratch import Scratch
from cutp.errors import ConfigError
from cutp.nn.device_batch import AttentionShape, DeviceBatch, RotaryTables, upload_batch
from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from tests.device_arrays import DeviceArray, emulated_device
from tests.emulation.emulator import needs_compiler

pytestmark = needs_compiler

float32, bfloat16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, MAX_PAGES = 4, 2, 64, 16, 14
# (new tokens, tokens in the cache): decoding first, then prompts, of which one has a single token.
MIXED = [(1, 70), (1, 0), (1, 200), (20, 0), (1, 64), (30, 50)]
BATCHES = {"mixed": MIXED, "decoding": MIXED[:3], "prompts": MIXED[3:], "one": MIXED[:1]}
ROPE = RotaryEmbedding(HEAD_DIM, max_seq_len=512, theta=1000.0)
LENGTH_ROPE = RotaryEmbedding(HEAD_DIM, max_seq_len=64, parameters=RopeParameters("dynamic", 1000.0, 4.0))
SHAPE = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, (None, 33), (ROPE, LENGTH_ROPE))


@pytest.fixture
def memory(monkeypatch):
    with emulated_device(monkeypatch) as memory, Scratch(memory).use():
        yield memory


def both(memory, requests, dtype=float32):
    """(NumPy's batch, the device's) of the same requests, on shuffled pages."""
    lengths, cached = np.array(requests).T
    rng = np.random.default_rng(0)
    width = -(-int((lengths + cached).max()) // PAGE_SIZE)
    table = rng.permutation(len(requests) * width).reshape(len(requests), width).astype(np.int32)
    tokens, reach = rng.integers(0, 100, lengths.sum()), lengths + cached + np.arange(len(requests)) * 40
    host = RaggedBatch(tokens, np.concatenate([[0], np.cumsum(lengths)]), cached, table, PAGE_SIZE, reach)
    workspace = SHAPE.workspace(memory, 8, MAX_PAGES, PAGE_SIZE, 2, dtype)
    device = upload_batch(memory, SHAPE, workspace, tokens.tolist(), lengths, cached, table, PAGE_SIZE, reach)
    device.prepare(RotaryTables(memory), dtype)
    return host, device


@pytest.mark.parametrize("name", BATCHES)
def test_arrays(memory, name):
    host, device = both(memory, BATCHES[name])
    for field in ("tokens", "positions", "slots"):
        got = getattr(device, field)
        assert type(got) is DeviceArray and got.dtype == np.int64
        np.testing.assert_array_equal(got.host, getattr(host, field))
    np.testing.assert_array_equal(device.lookup_table.host, host.lookup_table)
    assert device.decode_count == {"mixed": 3, "decoding": 3, "prompts": 0, "one": 1}[name]
    np.testing.assert_array_equal(device.kv_lengths.host, host.cache_lengths[: device.decode_count] + 1)
    if device.decode_count == len(host.lengths):
        assert device.work_list is None
        return
    np.testing.assert_array_equal(device.input_row_offsets.host, host.input_row_offsets)
    np.testing.assert_array_equal(device.cache_lengths.host, host.cache_lengths)
    # Every request is in one list of work only.
    assert set(device.work_list.host[:, 0].tolist()) == set(range(device.decode_count, len(host.lengths)))


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("rope", [ROPE, LENGTH_ROPE])
def test_rotary_tables(memory, rope, dtype):
    host, device = both(memory, MIXED, dtype)
    for got, expected in zip(device.rotary(rope, dtype), host.rotary(rope, dtype), strict=True):
        assert got.dtype == float32
        step = 2e-6 if dtype == float32 else 2.0**-8
        np.testing.assert_allclose(got.host, expected.astype(float32), rtol=0, atol=step)


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("options", [{}, {"window": 33}, {"softcap": 4.0, "sinks": True}])
def test_attention(memory, name, options, dtype):
    check_attention(memory, name, options, dtype, 2)


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("name", ["mixed", "prompts"])
def test_attention_on_hopper(memory, monkeypatch, name, dtype):
    monkeypatch.setattr(backend(), "capability", (9, 0))
    check_attention(memory, name, {"window": 33}, dtype, 2 if dtype == float32 else 4)


def check_attention(memory, name, options, dtype, work_list_width):
    host, device = both(memory, BATCHES[name], dtype)
    assert device.work_list is None or device.work_list.shape[1] == work_list_width
    rng = np.random.default_rng(1)
    q = rng.standard_normal((len(host.tokens), HEADS, HEAD_DIM)).astype(dtype)
    pages = rng.standard_normal((host.lookup_table.size, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)).astype(dtype)
    sinks = np.linspace(-1, 2, HEADS, dtype=float32)
    up = _uploader(memory)
    arguments = {"scale": 0.2, "window": options.get("window"), "softcap": options.get("softcap")}
    expected = host.attention(q, pages, sinks=sinks if "sinks" in options else None, **arguments)
    for _ in range(2):  # the counters are as they were
        got = device.attention(up(q), up(pages), sinks=up(sinks) if "sinks" in options else None, **arguments)
        np.testing.assert_allclose(got.host.astype(float32), expected.astype(float32), rtol=0,
                                   atol=2e-6 if dtype == float32 else 0.02)
    assert not device.workspace.counters.host.any()


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("rope", "interleaved"), [(ROPE, False), (ROPE, True), (None, False)])
def test_rotary_attention(memory, monkeypatch, name, rope, interleaved, dtype):
    """In one kernel where all requests decode and whole heads are turned by halves, else in two."""
    host, device = both(memory, BATCHES[name], dtype)
    rng = np.random.default_rng(3)
    qkv = rng.standard_normal((len(host.tokens), (HEADS + 2 * KV_HEADS) * HEAD_DIM)).astype(dtype)
    pages = rng.standard_normal((host.lookup_table.size, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)).astype(dtype)
    up, launched = _uploader(memory), []
    launch = backend().launch
    monkeypatch.setattr(backend(), "launch", lambda source, *rest: (launched.append(source), launch(source, *rest)))
    got_pages, (cos, sin) = up(pages), device.rotary(rope, dtype) if rope else (None, None)
    got = device.rotary_attention(up(qkv), HEADS, cos, sin, got_pages, 0.2, interleaved=interleaved, window=33)
    cos, sin = host.rotary(rope, dtype) if rope else (None, None)
    expected = host.rotary_attention(qkv, HEADS, cos, sin, pages, 0.2, interleaved=interleaved, window=33)
    tolerance = 4e-6 if dtype == float32 else 0.03
    np.testing.assert_allclose(got.host.astype(float32), expected.astype(float32), rtol=0, atol=tolerance)
    np.testing.assert_allclose(got_pages.host.astype(float32), pages.astype(float32), rtol=0, atol=tolerance)
    together = name in ("decoding", "one") and rope is not None and not interleaved
    assert (launched == ["decode_attention.cu"]) == together and ("rotary.cu" in launched) == (not together)


def test_padding_rows_change_nothing(memory):
    """Rows of no request, as graphs have them: their results are zeros, whatever their tables hold."""
    host, device = both(memory, MIXED[:3])
    rng = np.random.default_rng(2)
    q = rng.standard_normal((8, HEADS, HEAD_DIM)).astype(float32)
    pages = rng.standard_normal((host.lookup_table.size, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM)).astype(float32)
    table = np.full((8, MAX_PAGES), 10**6, np.int32)
    table[:3, : host.lookup_table.shape[1]] = host.lookup_table
    up = _uploader(memory)
    padded = DeviceBatch(
        tokens=up(np.zeros(8, np.int64)), positions=up(np.zeros(8, np.int64)), slots=up(np.full(8, -1)),
        lookup_table=up(table), page_size=PAGE_SIZE, shape=AttentionShape(HEADS, KV_HEADS, HEAD_DIM, (None,), (ROPE,)),
        workspace=device.workspace, decode_count=8,
        kv_lengths=up(np.concatenate([host.cache_lengths + 1, np.zeros(5)]).astype(np.int32)))
    padded.prepare(RotaryTables(memory), float32)
    got = padded.attention(up(q), up(pages), 0.2).host
    np.testing.assert_allclose(got[:3], host.attention(q[:3], pages, 0.2), rtol=0, atol=2e-6)
    assert not got[3:].any()


def test_layers_of_different_shapes_are_refused():
    class Layer:
        n_heads, n_kv_heads, window, rope = 4, 2, None, None

    class Params:
        head_dim, latent = 64, None

    other = Layer()
    other.n_heads = 8
    assert AttentionShape.of([Layer(), Layer()], Params) == AttentionShape(4, 2, 64, (None,), ())
    with pytest.raises(ConfigError, match="2 different shapes"):
        AttentionShape.of([Layer(), other], Params)


def _uploader(memory):
    def up(x):
        target = memory.empty(x.shape, x.dtype)
        memory.upload(target, x)
        return target

    return up
