"""Programmatic dependent launch: what is handed to the driver."""

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp.array import programmatic_launch
from cutp.array.cuda_backend import _argument
from cutp.errors import ConfigError, DeviceError


def on_gpu(pointer):
    return SimpleNamespace(dtype=np.dtype(np.float32), data=SimpleNamespace(ptr=pointer))


def bytes_of(args):
    given = [_argument(a) for a in args]
    buffer, addresses = programmatic_launch.pack_arguments(given)
    assert all(int(a) % 16 == 0 for a in addresses)
    sizes = [a.nbytes if isinstance(a, (np.generic, np.ndarray)) else 8 for a in given]
    assert int(addresses[-1]) + sizes[-1] <= buffer.ctypes.data + buffer.nbytes
    return [ctypes.string_at(int(a), size) for a, size in zip(addresses, sizes, strict=True)]


def test_arguments_are_passed_by_value():
    pair = np.dtype([("a", np.int32), ("b", np.float32)])
    args = [
        on_gpu(0x7F0000001000), np.int32(-2), np.float32(1.5), np.uint8(7), None, ml_dtypes.bfloat16(1.0),
        np.zeros(1, pair), np.array([(1, 2.0)], pair)[0], np.full(1, b"\1" * 128, "V128"), np.bool_(True),
    ]
    plain = (np.ndarray, np.int32, np.float32, np.uint8, np.uint64, np.bool_, SimpleNamespace)  # what CuPy takes, too
    assert all(isinstance(_argument(a), plain) for a in args)
    assert bytes_of(args) == [
        (0x7F0000001000).to_bytes(8, "little"), b"\xfe\xff\xff\xff", b"\0\0\xc0\x3f", b"\7", bytes(8), b"\x80\x3f",
        bytes(8), b"\1\0\0\0\0\0\0\x40", b"\1" * 128, b"\1",
    ]
    assert programmatic_launch.pack_arguments([])[1].size == 1


def test_a_numpy_array_is_not_taken_for_a_pointer():
    with pytest.raises(ConfigError, match=r"a NumPy array of shape \(2,\) cannot be passed"):
        _argument(np.zeros(2))


def test_the_launch_configuration():
    driver = pytest.importorskip("cuda.bindings.driver")
    config = programmatic_launch.launch_config(driver, (1, 2, 3), (32, 4, 5), 999, 0x55)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (1, 2, 3)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (32, 4, 5)
    assert config.sharedMemBytes == 999 and int(config.hStream) == 0x55 and config.numAttrs == 1
    assert int(config.attrs[0].id) == 6 and config.attrs[0].value.programmaticStreamSerializationAllowed == 1


def test_when_it_is_used(monkeypatch):
    monkeypatch.setattr(programmatic_launch, "_driver", lambda: None)
    assert not programmatic_launch.is_supported((9, 0))
    monkeypatch.setattr(programmatic_launch, "_driver", lambda: object())
    assert [programmatic_launch.is_supported(c) for c in ((8, 9), (9, 0), (10, 3))] == [False, True, True]


def test_a_failed_launch_is_an_error(monkeypatch):
    real = pytest.importorskip("cuda.bindings.driver")
    seen = []

    class Driver:
        def __getattr__(self, name):
            return getattr(real, name)

        def cuLaunchKernelEx(self, config, function, params, extra):
            seen.append((function, ctypes.c_int32.from_address(ctypes.c_uint64.from_address(params).value).value))
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)

    monkeypatch.setattr(programmatic_launch, "_driver", Driver)
    with pytest.raises(DeviceError, match="cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE"):
        programmatic_launch.launch(77, (1, 1, 1), (32, 1, 1), [np.int32(42)], 0, 0)
    assert seen == [(77, 42)]
