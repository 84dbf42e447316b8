"""Programmatic dependent launch: what is handed to the driver."""

import ctypes
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp.array import programmatic_launch
from cutp.array.kernel_arguments import pack_arguments, plain_argument
from cutp.comm import run_threads
from cutp.errors import ConfigError, DeviceError


def on_gpu(pointer):
    return SimpleNamespace(dtype=np.dtype(np.float32), data=SimpleNamespace(ptr=pointer))


PAIR = np.dtype([("a", np.int32), ("b", np.float32)])
# Arguments of each kind, and the bytes that the kernel gets.
ARGUMENTS = [
    (on_gpu(0x7F0000001000), (0x7F0000001000).to_bytes(8, "little")), (np.int32(-2), b"\xfe\xff\xff\xff"),
    (np.float32(1.5), b"\0\0\xc0\x3f"), (np.uint8(7), b"\7"), (None, bytes(8)),
    (ml_dtypes.bfloat16(1.0), b"\x80\x3f"), (np.zeros(1, PAIR), bytes(8)),
    (np.array([(1, 2.0)], PAIR)[0], b"\1\0\0\0\0\0\0\x40"), (np.full(1, b"\1" * 128, "V128"), b"\1" * 128),
    (np.bool_(True), b"\1"), (np.int64(-(2**40)), (-(2**40)).to_bytes(8, "little", signed=True)),
    (np.uint64(2**64 - 1), b"\xff" * 8), (np.float64(0.1), np.float64(0.1).tobytes()),
    (np.float32("-inf"), np.float32("-inf").tobytes()), (np.float32(-0.0), np.float32(-0.0).tobytes()),
    (np.float16(0.1), np.float16(0.1).tobytes()), (np.complex64(1 + 2j), np.complex64(1 + 2j).tobytes()),
    (np.zeros(1, "V24"), bytes(24)), (np.full((1, 1), 3, np.int16), b"\3\0"),
]


def passed(packed, sizes):
    """The bytes of the arguments where the driver looks for them."""
    addresses = (ctypes.c_uint64 * len(sizes)).from_address(packed.addresses)
    assert all(address % 16 == 0 for address in addresses)
    memory = ctypes.addressof(packed.memory), ctypes.addressof(packed.memory) + ctypes.sizeof(packed.memory)
    ends = [address + size for address, size in zip(addresses, sizes, strict=True)]
    assert memory[0] <= min(addresses) and packed.addresses + 8 * len(sizes) <= memory[1]
    assert max(ends) <= packed.addresses
    assert all(end <= address for i, end in enumerate(ends) for address in addresses[i + 1 :])
    return [ctypes.string_at(address, size) for address, size in zip(addresses, sizes, strict=True)]


def check_passed(chosen):
    packed = pack_arguments([argument for argument, _ in chosen])
    assert passed(packed, [len(expected) for _, expected in chosen]) == [expected for _, expected in chosen]
    packed.release()


def test_arguments_are_passed_by_value():
    check_passed(ARGUMENTS)
    check_passed(ARGUMENTS[::-1])
    plain = (np.ndarray, np.generic, SimpleNamespace)  # what CuPy takes
    assert all(isinstance(plain_argument(argument), plain) for argument, _ in ARGUMENTS)
    assert all(getattr(plain_argument(argument), "dtype", None) != ml_dtypes.bfloat16
               or isinstance(plain_argument(argument), np.ndarray) for argument, _ in ARGUMENTS)
    pack_arguments([]).release()


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4", "int2", "float4_e2m1fn"])
def test_scalars_of_other_types_are_passed_as_they_are(name):
    scalar = getattr(ml_dtypes, name)(1)
    check_passed([(scalar, np.array(scalar).tobytes()), (np.int32(3), b"\3\0\0\0")])


def test_memory_is_used_again_for_arguments_of_the_same_types():
    chosen = [ARGUMENTS[i] for i in (0, 1, 4)]
    places = set()
    for pointer, number in ((0x1000, 1), (0x2000, 2), (0x3000, 3)):
        packed = pack_arguments([on_gpu(pointer), np.int32(number), None])
        places.add(packed.addresses)
        assert passed(packed, [8, 4, 8]) == [pointer.to_bytes(8, "little"), number.to_bytes(4, "little"), bytes(8)]
        packed.release()
    assert len(places) == 1
    # While one launch uses it, another of the same types, in whatever thread, gets its own.
    first, second = (pack_arguments([argument for argument, _ in chosen]) for _ in range(2))
    assert first.addresses != second.addresses and {first.addresses, second.addresses} & places
    assert passed(first, [8, 4, 8]) == passed(second, [8, 4, 8])
    first.release()
    second.release()


def test_structs_of_one_type_may_have_any_size():
    for size in (4, 128, 4, 200, 1):
        check_passed([(np.full(1, bytes([size]) * size, f"V{size}"), bytes([size]) * size), (np.int32(9), b"\t\0\0\0")])
        check_passed([(np.full(1, bytes([size]) * size, f"V{size}")[0], bytes([size]) * size), (None, bytes(8))])


def test_threads_do_not_disturb_each_other():
    def work(comm):
        for i in range(2000):
            chosen = ARGUMENTS[(i + comm.rank) % 3 :: 3]
            number = 1000 * comm.rank + i
            packed = pack_arguments([np.int32(number), *(argument for argument, _ in chosen)])
            got = passed(packed, [4, *(len(expected) for _, expected in chosen)])
            assert got == [number.to_bytes(4, "little"), *(expected for _, expected in chosen)]
            packed.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run_threads(4, work)
    finally:
        sys.setswitchinterval(interval)


def test_a_numpy_array_is_not_taken_for_a_pointer():
    for refuse in (plain_argument, lambda argument: pack_arguments([np.int32(1), argument])):
        with pytest.raises(ConfigError, match=r"a NumPy array of shape \(2,\) cannot be passed"):
            refuse(np.zeros(2))


def test_the_launch_configuration():
    pytest.importorskip("cuda.bindings.driver")
    config = programmatic_launch.launch_config((1, 2, 3), (32, 4, 5), 999, 0x55)
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
            assert (config.gridDimX, config.blockDimY, config.sharedMemBytes, int(config.hStream)) == (7, 2, 96, 0x55)
            seen.append((function, ctypes.c_int32.from_address(ctypes.c_uint64.from_address(params).value).value))
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)

    monkeypatch.setattr(programmatic_launch, "_driver", Driver)
    with pytest.raises(DeviceError, match="cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE"):
        programmatic_launch.launch(77, (7, 1, 1), (32, 2, 1), [np.int32(42)], 96, 0x55)
    assert seen == [(77, 42)]
