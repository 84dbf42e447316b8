"""Device memory without a GPU: arrays of a class of their own, which only kernels and copies may touch."""

import contextlib

import numpy as np

from cutp.array import gemm
from cutp.array.kernel import use_backend
from tests.array.fake_cublaslt import FakeCublasLt
from tests.emulation.emulator import EmulatorBackend


class DeviceArray(np.ndarray):
    """What `cutp.array.scratch.on_device` takes for a device array."""


class EmulatedMemory:
    """`cutp.array.scratch.Memory` on the host; memory begins poisoned."""

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        raw = np.full(count * dtype.itemsize + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape).view(DeviceArray)

    def pinned(self, size):
        return np.zeros(size, np.uint8)

    def upload(self, target, host):
        assert type(host) is np.ndarray and type(target) is DeviceArray and target.shape == host.shape, (target, host)
        assert target.dtype == host.dtype
        target[...] = host

    def numpy(self, x):
        return np.array(x, copy=True)


@contextlib.contextmanager
def emulated_device(monkeypatch):
    """Kernels run in the emulation, matrix products in the stand-in for cuBLASLt."""
    engine = gemm.LinearEngine(FakeCublasLt())
    monkeypatch.setattr(gemm, "linear", lambda x, w, out, bias=None, *, workspace, allow_tf32=False:
                        engine.linear(x, w, out, bias, workspace, allow_tf32, 5))  # the stand-in knows one stream
    with use_backend(EmulatorBackend()):
        yield EmulatedMemory()
