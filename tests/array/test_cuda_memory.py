"""Memory of a GPU, with a stand-in for CuPy whose copies are made only when somebody waits for them."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda
from cutp.array.cuda_memory import CudaMemory
from cutp.errors import CapacityError, DeviceError

BF16 = np.dtype(ml_dtypes.bfloat16)


class FakeArray:
    def __init__(self, shape, dtype, device):
        self.host = np.frombuffer(bytearray(b"\x5a" * (int(np.prod(shape)) * np.dtype(dtype).itemsize)),
                                  dtype).reshape(shape)
        self.data, self.device = SimpleNamespace(ptr=self.host.ctypes.data), device
        self.shape, self.dtype, self.nbytes = self.host.shape, self.host.dtype, self.host.nbytes
        self.flags = self.host.flags


class FakeStream:
    def __init__(self, non_blocking=False):
        self.ptr, self.non_blocking = id(self), non_blocking

    def synchronize(self):
        FakeCupy.finish(self.ptr)


class FakeEvent:
    def __init__(self, disable_timing=False):
        assert disable_timing
        self.stream = None

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        if self.stream is not None:
            self.stream.synchronize()


class FakeCupy:
    """Two GPUs of 1000 bytes, 300 of which are taken."""

    pending: list = []
    started: list = []

    def __init__(self):
        self.device, self.used, self.freed = 0, 300, 0
        self.pending.clear()
        self.started.clear()
        self.stream = FakeStream()
        pool = SimpleNamespace(free_all_blocks=self._free)
        self.get_default_pinned_memory_pool = lambda: pool
        runtime = SimpleNamespace(
            memcpyHostToDevice=1, memcpyDeviceToHost=2, getDevice=lambda: self.device, setDevice=self._set,
            memcpyAsync=self._copy, memsetAsync=self._set_memory, deviceSynchronize=lambda: self.finish(None),
            memGetInfo=lambda: (1000 - self.used - 100 * self.device, 1000))
        self.cuda = SimpleNamespace(
            runtime=runtime, Stream=FakeStream, Event=FakeEvent, Device=self._use, alloc_pinned_memory=self._pin,
            get_current_stream=lambda: self.stream)

    @classmethod
    def finish(cls, stream):
        for copy in [each for each in cls.pending if stream is None or each[0] == stream]:
            copy[1]()
            cls.pending.remove(copy)

    def empty(self, shape, dtype):
        array = FakeArray(shape, dtype, self.device)
        if self.used + array.nbytes > 1000:
            raise MemoryError("Out of memory allocating")
        self.used += array.nbytes
        return array

    def _free(self):
        self.freed += 1

    def _set(self, device):
        self.device = device

    @contextmanager
    def _use(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    def _pin(self, size):
        if size > 1 << 20:
            raise RuntimeError("cudaErrorMemoryAllocation")
        return memoryview(bytearray(512 + size))  # at least as much as was asked for

    def _copy(self, target, source, size, kind, stream):
        self.started.append((kind, size))
        self.pending.append((stream, lambda: ctypes.memmove(target, source, size)))

    def _set_memory(self, target, value, size, stream):
        self.pending.append((stream, lambda: ctypes.memset(target, value, size)))


@pytest.fixture
def fake(monkeypatch):
    cupy = FakeCupy()
    monkeypatch.setattr(cuda, "cupy", lambda: cupy)
    return cupy


def test_without_a_gpu(monkeypatch):
    def cupy():
        raise DeviceError("no GPU")

    monkeypatch.setattr(cuda, "cupy", cupy)
    with pytest.raises(DeviceError, match="no GPU"):
        CudaMemory()


def test_arrays_are_on_the_device_of_the_memory(fake):
    memory = CudaMemory(1)
    assert memory.empty((2, 3), BF16).device == 1 and fake.device == 0
    assert memory.empty(4, np.uint8).shape == (4,)
    fake.device = 1
    assert CudaMemory().device == 1
    assert CudaMemory(0).free_bytes() == (1000 - 316, 1000) and memory.free_bytes() == (1000 - 416, 1000)


def test_zeros(fake):
    memory = CudaMemory()
    zeros = memory.zeros((3, 2), np.float32)
    assert (zeros.host != 0).all()  # not yet
    memory.synchronize()
    assert (zeros.host == 0).all()
    assert memory.zeros((0, 4), np.float32).nbytes == 0 and fake.pending == []


def test_copies_in_the_order_of_the_stream(fake):
    memory = CudaMemory()
    target, values = memory.empty((3, 4), BF16), np.arange(12).reshape(3, 4).astype(BF16)
    memory.upload(target, values)
    assert fake.pending[0][0] == fake.stream.ptr
    found = memory.numpy(target)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == BF16 and fake.started == [(1, 24), (2, 24)]
    memory.upload(target, np.asfortranarray(values + values))
    np.testing.assert_array_equal(memory.numpy(target), values + values)
    empty = memory.empty((0, 4), BF16)
    memory.upload(empty, np.empty((0, 4), BF16))
    assert memory.numpy(empty).shape == (0, 4) and len(fake.started) == 4
    apart = SimpleNamespace(flags=SimpleNamespace(c_contiguous=False), get=lambda: "a copy by CuPy")
    assert memory.numpy(apart) == "a copy by CuPy"


def test_too_little_memory(fake):
    with pytest.raises(CapacityError, match=r"GPU 1 has no memory for an array of shape \(400,\) and dtype bfloat16: "
                                            r"0.0 of 0.0 GB are free .*--kv-memory"):
        CudaMemory(1).empty((400,), BF16)
    with pytest.raises(CapacityError):
        CudaMemory(1).zeros((400,), BF16)
    with pytest.raises(CapacityError, match="the host cannot pin 2 MB .*CUTP_LOAD_THREADS"):
        CudaMemory().uploader(1 << 21)
    assert CudaMemory().pinned(10).shape == (10,) and CudaMemory().pinned(10).dtype == np.uint8


def test_uploads_take_turns_between_two_buffers(fake):
    memory = CudaMemory(1)
    targets = [memory.empty((8,), np.uint8) for _ in range(5)]
    uploader = memory.uploader(8)
    assert fake.device == 1  # of this thread, from now on
    buffers = set()
    for number, target in enumerate(targets):
        buffer = uploader.buffer()
        assert uploader.buffer() is buffer and buffer.shape == (8,)
        buffers.add(buffer.ctypes.data)
        buffer[...] = number
        uploader.send(target, buffer)
        # The last two copies may be under way; older ones have been made, or their buffer would not be free.
        assert len(fake.pending) <= 2
    assert len(buffers) == 2 and fake.pending and all(stream != fake.stream.ptr for stream, _ in fake.pending)
    uploader.close()
    assert [set(target.host) for target in targets] == [{i} for i in range(5)]
    assert not fake.pending and fake.freed == 1
