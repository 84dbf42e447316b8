"""Weights on a device: their dtypes, the zeros that fill up rows and columns, and that these change no result."""

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.nn.attention import AttentionWithRope
from cutp.nn.linear import FusedLinear, Linear, StackedLinear, qkv_linear, stack_weights
from cutp.nn.mlp import MLP
from cutp.nn.module import Weight
from cutp.nn.moe import Experts
from cutp.nn.moe_router import GroupLimitedRouter
from cutp.nn.sharding import EvenSegment, ShardingStrategy
from cutp.nn.storage import DeviceStorage, HostStorage, Padding, storage
from tests.device_arrays import DeviceArray, EmulatedMemory
from tests.nn.building import random_values

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
HIDDEN, WIDTH = 16, 100  # over 3 ranks: 34, 33 and 33 channels


@pytest.fixture
def device():
    with DeviceStorage(EmulatedMemory()).use() as found:
        yield found


def loaded(module, values, where=None):
    """`module` with its weights loaded, on a device or on the host."""
    if where is None:
        module.load(values)
        return module
    with DeviceStorage(EmulatedMemory()).use():
        module.load(values)
    return module


def on_host(module):
    """Turns the device arrays of `module` into NumPy's own, in float32, so that the host's ops compute with them."""
    def host(value):
        if isinstance(value, (tuple, list)):
            return type(value)(host(each) for each in value)
        return value.host.astype(F32) if type(value) is DeviceArray else value

    for each in module.modules():
        for key, value in vars(each).items():
            if isinstance(value, Weight):
                value.data = host(value.data)
            elif key in ("_weight", "_bias", "_stacked"):
                setattr(each, key, host(value))
    return module


def test_the_storage_in_use_is_that_of_the_host():
    weight = Weight((3, 5), BF16, padding=Padding(1))
    assert isinstance(storage(), HostStorage)
    assert (weight.held_dtype, weight.held_shape, weight.held_bytes, weight.local_bytes) == (F32, (3, 5), 60, 30)
    weight.store(np.ones((3, 5), F32))
    assert type(weight.data) is np.ndarray and weight.data.dtype == F32


def test_a_device_holds_weights_in_their_own_dtype(device):
    for dtype in (BF16, F16, F32):
        weight = Weight((3, 5), dtype)
        assert weight.held_bytes == 15 * dtype.itemsize
        weight.store(np.full((3, 5), 1 / 3, np.float64))
        assert type(weight.data) is DeviceArray and weight.data.dtype == dtype
        np.testing.assert_array_equal(weight.data.host, np.full((3, 5), 1 / 3, F32).astype(dtype))
    assert storage() is device


def test_bytes_are_those_of_what_is_there():
    weight = Weight((3, 5), BF16, padding=Padding(1))
    with DeviceStorage(EmulatedMemory()).use():
        weight.store(np.ones((3, 5), F32))
    assert weight.held_bytes == 3 * 8 * 2  # on a device, although the storage in use is the host's again


def test_the_storage_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), DeviceStorage(EmulatedMemory()).use():
        raise ZeroDivisionError
    assert isinstance(storage(), HostStorage)


def test_what_kernels_need_in_float32(device):
    """Rounded to the model's dtype all the same."""
    attention = AttentionWithRope(HIDDEN, 4, 2, 64, BF16, None, has_sinks=True)
    router = GroupLimitedRouter(HIDDEN, 8, 2, BF16)
    share = attention._shard(ShardingStrategy.tensor_parallel(2), 1)
    values = np.array([1 / 3, 2, 3, 1 / 7], F32)
    share.sinks.store(values[2:])
    router.e_score_correction_bias.store(np.linspace(0, 1, 8, dtype=F32) / 3)
    assert share.sinks.data.dtype == F32 and share.sinks.held_bytes == 8 and share.sinks.dtype == BF16
    np.testing.assert_array_equal(share.sinks.data.host, values[2:].astype(BF16).astype(F32))
    np.testing.assert_array_equal(router.e_score_correction_bias.data.host, np.linspace(0, 1, 8, dtype=F32) / 3)


def test_clipped_values_on_a_device(device):
    weight = Weight((2, 2), BF16, clip=1.5)
    weight.store(np.array([[-9, 1], [1.25, 9]], F32))
    np.testing.assert_array_equal(weight.data.host.astype(F32), [[-1.5, 1], [1.25, 1.5]])


@pytest.mark.parametrize("dtype, width", [(BF16, 8), (F16, 8), (F32, 4)])
def test_padded_columns_and_rows_are_zeros(device, dtype, width):
    columns, rows = Weight((3, 9), dtype, padding=Padding(1)), Weight((9, 3), dtype, padding=Padding(0))
    both = Weight((18, 3), dtype, padding=Padding(0, 2))
    held = -(-9 // width) * width
    for weight, shape in ((columns, (3, held)), (rows, (held, 3)), (both, (2 * held, 3))):
        assert weight.held_shape == shape and weight.held_bytes == np.prod(shape) * dtype.itemsize
        values = np.arange(1, np.prod(weight.shape) + 1).reshape(weight.shape)
        weight.store(values)
        found = weight.data.host.astype(F32)
        if weight is columns:
            assert (found[:, 9:] == 0).all() and (found[:, :9] == values).all()
        else:
            parts = found.reshape(weight.padding.parts, held, 3)
            assert (parts[:, 9:] == 0).all() and (parts[:, :9].reshape(-1, 3) == values).all()
    exact = Weight((8, 3), dtype, padding=Padding(0, 1))
    assert exact.held_shape == (8, 3)


def test_pieces_have_no_padding_inside(device):
    weight = Weight((18, 2), BF16, padding=Padding(0, 2))
    weight.allocate()
    assert list(weight.pieces()) == [(0, 9), (9, 18)]
    assert list(weight.pieces(4)) == [(0, 4), (4, 8), (8, 9), (9, 13), (13, 17), (17, 18)]
    assert weight.rows(13, 17).ctypes.data - weight.data.ctypes.data == (16 + 4) * 2 * 2
    even = Weight((16, 2), BF16, padding=Padding(0, 2))
    even.allocate()
    assert list(even.pieces()) == [(0, 16)] and list(even.pieces(10)) == [(0, 10), (10, 16)]
    none = Weight((0, 2), BF16)
    none.allocate()
    assert list(none.pieces()) == [] == list(none.pieces(4))


def test_stacked_weights_keep_their_places(device):
    layers = StackedLinear(HIDDEN, ("a", "b"), [EvenSegment(9), EvenSegment(3)], BF16, padding=Padding(0))
    layers.a.weight.store(np.full((9, HIDDEN), 2, F32))  # before the buffer is there
    layers.materialize()
    layers.b.weight.store(np.full((3, HIDDEN), 3, F32))
    assert layers._weight.shape == (24, HIDDEN) and layers._weight.dtype == BF16
    np.testing.assert_array_equal(layers._weight.host[:, 0].astype(F32), [2] * 9 + [0] * 7 + [3] * 3 + [0] * 5)
    plain = stack_weights([Weight((3, 2), F32), Weight((1, 2), F32)])
    assert plain.shape == (4, 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_padding_changes_no_feed_forward_result(fused, activation):
    whole = MLP(HIDDEN, WIDTH, BF16, activation=activation, has_bias=True, fused=fused)
    values = random_values(whole)
    x = np.random.default_rng(1).standard_normal((3, HIDDEN)).astype(F32)
    for size in (1, 3):
        for rank in range(size):
            strategy = ShardingStrategy.tensor_parallel(size)
            padded = loaded(whole._shard(strategy, rank), values, "device")
            width = -(-len(range(rank, WIDTH, size)) // 8) * 8
            assert padded.down_proj.weight.data.shape == (HIDDEN, width)
            exact = loaded(whole._shard(strategy, rank), values)
            on_host(padded)
            hidden = padded.activated(x)
            assert hidden.shape == (3, width)
            np.testing.assert_allclose(hidden[:, : exact.down_proj.in_dim], exact.activated(x), rtol=1e-6, atol=1e-6)
            assert (hidden[:, exact.down_proj.in_dim:] == 0).all()
            np.testing.assert_allclose(padded(x), exact(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"fused": True, "has_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}, {"has_bias": True}])
@pytest.mark.parametrize("kind", ["replicate", "tensor_parallel", "expert_parallel"])
def test_padding_changes_no_result_of_experts(options, kind):
    whole = Experts(4, HIDDEN, 25, BF16, **options)
    values = random_values(whole)
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((5, HIDDEN)).astype(F32), rng.random((5, 2), F32)
    experts = np.array([[0, 1], [2, 3], [1, 0], [3, 0], [2, 1]], np.int32)
    size = 1 if kind == "replicate" else 5 if kind == "expert_parallel" else 3
    for rank in range(size):
        strategy = getattr(ShardingStrategy, kind)(size)
        padded = loaded(whole._shard(strategy, rank), values, "device")
        gate_up, _, down, _ = padded._stacked
        assert gate_up.shape[1] % 16 == 0 == down.shape[2] % 8 and gate_up.shape[1] == 2 * down.shape[2]
        assert gate_up.dtype == down.dtype == BF16
        exact = loaded(whole._shard(strategy, rank), values)
        np.testing.assert_allclose(on_host(padded)(x, experts, weights), exact(x, experts, weights), rtol=1e-5,
                                   atol=1e-5)


def test_attention_heads_are_not_padded(device):
    for layer in (qkv_linear(HIDDEN, 6, 3, 12, BF16), qkv_linear(HIDDEN, 6, 3, 12, BF16, fused=True)):
        layer = layer._shard(ShardingStrategy.tensor_parallel(3), 0)
        layer.materialize()
        assert sum(weight.held_shape[0] for _, weight in layer.named_weights()) == 4 * 12


def test_names_and_shapes_are_those_of_the_whole(device):
    layer = FusedLinear(HIDDEN, [EvenSegment(9)] * 2, BF16, padding=Padding(0, 2))
    assert layer.weight.shape == layer.weight.local_shape == (18, HIDDEN) and layer.out_dims == [9, 9]
    with pytest.raises(ConfigError, match="before it was loaded"):
        Linear(3, 4, BF16).weight.value  # noqa: B018
