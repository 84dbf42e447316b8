"""Tensor maps: what is handed to the driver, and what is refused before."""

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda, graph, programmatic_launch, tensor_map
from cutp.array.cuda_backend import CudaBackend
from cutp.array.kernel import launch, use_backend
from cutp.array.kernel_arguments import pack_arguments, plain_argument
from cutp.array.tensor_map import TensorMap
from cutp.errors import ConfigError, DeviceError

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


class OnGpu:
    """A device array: the shape and strides of a NumPy array, at another address."""

    def __init__(self, array, pointer=0x7F0000001000):
        self.shape, self.strides, self.dtype, self.ndim = array.shape, array.strides, array.dtype, array.ndim
        self.data = SimpleNamespace(ptr=pointer)


class Driver:
    """Writes the parameters it is given into the map."""

    def __init__(self):
        self.calls, self.status = [], 0

    def cuTensorMapEncodeTiled(self, out, data_type, rank, pointer, *rest):
        n = rank.value
        dims, strides, box, steps = (list(a)[:count] for a, count in zip(rest[:4], (n, n - 1, n, n), strict=True))
        assert out.value % 64 == 0
        self.calls.append((data_type.value, pointer.value, dims, strides, box, steps, *(a.value for a in rest[4:])))
        ctypes.memset(out.value, len(self.calls), 128)
        return self.status


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(tensor_map, "_driver", lambda: driver)
    tensor_map._encoded.cache_clear()
    yield driver
    tensor_map._encoded.cache_clear()


@pytest.mark.parametrize(("dtype", "number"), [(F16, 6), (BF16, 9)])
def test_what_the_driver_is_told(driver, dtype, number):
    pool = OnGpu(np.zeros((7, 3, 16, 128), dtype).transpose(0, 2, 1, 3))
    encoded = TensorMap(pool, (1, 16, 1, 64)).encoded()
    assert encoded.shape == (1,) and encoded.dtype == "V128" and encoded.tobytes() == b"\1" * 128
    # Innermost axis first; no interleaving, 128-byte swizzle, promotion to 256 bytes, zeros outside.
    assert driver.calls == [(number, 0x7F0000001000, [128, 3, 16, 7], [4096, 256, 12288], [64, 1, 16, 1], [1] * 4,
                             0, 3, 3, 0)]


def test_constants_are_those_of_the_driver():
    names = pytest.importorskip("cuda.bindings.driver")
    assert names.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 == 6
    assert names.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 == 9
    assert names.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE == 0
    assert names.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B == 3
    assert names.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B == 3
    assert names.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == 0


def test_axes_of_one_element_have_any_stride(driver):
    row = OnGpu(np.zeros((5, 3, 100), F16)[2:3, :1, :40])
    TensorMap(row, (1, 8, 64)).encoded()
    assert driver.calls[0][2:4] == ([40, 1, 1], [80, 80])
    TensorMap(OnGpu(np.zeros((4, 1, 40), F16)[:, :, ::-1][..., :1]), (1, 1, 64))


def test_equal_maps_are_encoded_once(driver):
    x = np.zeros((8, 64), BF16)
    first = TensorMap(OnGpu(x), (8, 64)).encoded()
    assert TensorMap(OnGpu(x), (8, 64), weight=True).encoded() is first
    others = [OnGpu(x, 0x1000), OnGpu(x[:7]), OnGpu(np.zeros((8, 128), BF16)[:, :64]), OnGpu(x.view(F16))]
    for n, other in enumerate(others, 2):
        assert TensorMap(other, (8, 64)).encoded()[0].tobytes() == bytes([n]) * 128
    TensorMap(OnGpu(x), (4, 64)).encoded()
    assert len(driver.calls) == 6
    with pytest.raises(ValueError, match="read-only"):
        first.view(np.uint8)[0] = 0


@pytest.mark.parametrize(("array", "box", "message"), [
    (np.zeros((8, 64), np.float32), (8, 64), "has dtype float32; it needs bfloat16 or float16"),
    (np.zeros(64, F16), (64,), "has 1 axes; it needs 2 to 5"),
    (np.zeros((1,) * 5 + (64,), F16), (1,) * 5 + (64,), "has 6 axes"),
    (np.zeros((8, 64), F16), (1, 8, 64), "has 2 axes, but the box is (1, 8, 64)"),
    (np.zeros((8, 64), F16), [8, 64], "the box is [8, 64], not a tuple"),
    (np.zeros((8, 64), F16), (8, 32), "the box is (8, 32); it needs 64 elements along the last axis"),
    (np.zeros((8, 64), F16), (257, 64), "the box is (257, 64); it needs 64 elements along the last axis and 1 to 256"),
    (np.zeros((8, 64), F16), (0, 64), "the box is (0, 64)"),
    (np.zeros((0, 64), F16), (8, 64), "needs 1 to 4294967296 elements along every axis"),
    (np.zeros((64, 8), F16).T, (8, 64), "is not contiguous along its last axis"),
    (np.zeros((8, 60), F16), (8, 64), "has strides of (120, 2) bytes; all but the last must be multiples of 16"),
    (np.broadcast_to(np.zeros(64, F16), (8, 64)), (8, 64), "has strides of (0, 2) bytes"),
    (np.zeros((8, 64), F16)[::-1], (8, 64), "has strides of (-128, 2) bytes"),
    (np.lib.stride_tricks.as_strided(np.zeros((2, 64), F16), (2, 64), (2**40, 2)), (8, 64), "below 2^40"),
])
def test_what_the_copy_engine_cannot_do(driver, array, box, message):
    with pytest.raises(ConfigError) as error:
        TensorMap(OnGpu(array), box)
    assert message in str(error.value)


def test_where_the_array_begins(driver):
    with pytest.raises(ConfigError, match="begins at an address that is not a multiple of 16"):
        TensorMap(OnGpu(np.zeros((8, 64), F16), 0x1008), (8, 64))


def test_the_driver_refuses(driver):
    driver.status = 1
    x = OnGpu(np.zeros((8, 64), F16))
    for _ in range(2):  # which is not remembered
        with pytest.raises(DeviceError, match=r"failed with status 1 for an array of shape \(8, 64\)"):
            TensorMap(x, (8, 64)).encoded()
    assert len(driver.calls) == 2


def test_a_driver_without_tensor_maps(monkeypatch):
    tensor_map._driver.cache_clear()

    def refuse(name):
        raise OSError(f"{name}: no such file")

    for library in (refuse, lambda name: object()):
        monkeypatch.setattr(tensor_map.ctypes, "CDLL", library)
        with pytest.raises(DeviceError, match="the NVIDIA driver has no tensor maps"):
            TensorMap(OnGpu(np.zeros((8, 64), F16), 0x2000), (8, 64)).encoded()


def test_as_an_argument(driver):
    described = TensorMap(OnGpu(np.zeros((8, 64), F16)), (8, 64))
    passed = plain_argument(described)
    assert isinstance(passed, np.ndarray) and passed.size == 1  # which CuPy passes by value
    packed = pack_arguments([np.int32(1), described, np.int32(2)])
    addresses = (ctypes.c_uint64 * 3).from_address(packed.addresses)
    assert ctypes.string_at(addresses[1], 128) == b"\1" * 128
    assert addresses[1] - addresses[0] == 16 and addresses[2] - addresses[1] == 128
    for refuse in (plain_argument, lambda argument: pack_arguments([argument])):
        with pytest.raises(ConfigError, match=r"a TensorMap of a NumPy array of shape \(8, 64\) cannot be passed"):
            refuse(TensorMap(np.zeros((8, 64), F16), (8, 64)))


@pytest.mark.parametrize("pdl", [False, True])
def test_a_launch_and_the_graph_that_captures_it(driver, monkeypatch, pdl):
    launches, kept = [], []
    function = SimpleNamespace(pdl=True, pointer=7, cupy_function=lambda *given: launches.append(given[2]))
    backend = CudaBackend.__new__(CudaBackend)
    backend._cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: 0),
                                                         get_current_stream=lambda: SimpleNamespace(ptr=5)))
    backend._functions = {("some.cu", (), "some", 0): function}

    def launch_with_driver(pointer, grid, block, args, shared_bytes, stream):
        packed = pack_arguments(args)
        where = ctypes.c_uint64.from_address(packed.addresses).value
        launches.append([np.frombuffer(ctypes.string_at(where, 128), "V128")])
        packed.release()

    monkeypatch.setattr(programmatic_launch, "launch", launch_with_driver)
    capturing = SimpleNamespace(keep=lambda *args: kept.extend(args))
    monkeypatch.setattr(graph._this_thread, "graph", capturing, raising=False)
    array = OnGpu(np.zeros((8, 64), F16))
    with use_backend(backend):
        launch("some.cu", "some", 1, 32, [TensorMap(array, (8, 64))], pdl=pdl)
    assert launches[0][0].tobytes() == b"\1" * 128
    assert [argument.array for argument in kept] == [array]


@pytest.mark.gpu
def test_the_real_driver_takes_every_kind():
    if reason := cuda.unavailable_reason():
        pytest.skip(reason)
    cupy = cuda.cupy()
    if cuda.device_info().capability < (9, 0):
        pytest.skip("tensor maps need compute capability 9.0")
    for dtype in (BF16, F16):
        x = cupy.empty((6, 4, 32, 128), dtype)
        maps = [
            TensorMap(x, (1, 1, 32, 64)), TensorMap(x.transpose(0, 2, 1, 3), (1, 16, 2, 64)),
            TensorMap(x[0, 0], (256, 64)),
            TensorMap(x[1:2, 1:2, :1, 8:], (1, 1, 8, 64)), TensorMap(x[..., :1], (1, 1, 1, 64)),
            TensorMap(x[None, :, ::2], (1, 1, 2, 8, 64)), TensorMap(x[2, 1, :, 64:72], (8, 64)),
        ]
        encoded = [m.encoded().tobytes() for m in maps]
        assert len(set(encoded)) == len(maps) and all(any(e) for e in encoded)
