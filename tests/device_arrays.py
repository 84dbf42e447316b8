"""Device memory without a GPU: arrays of a class of their own, which only kernels and copies may touch."""

import contextlib
import math

import numpy as np

from cutp.array import gemm
from cutp.array.kernel import use_backend
from cutp.errors import CapacityError
from tests.array.fake_cublaslt import FakeCublasLt
from tests.emulation.emulator import EmulatorBackend

# What the capture under way has recorded; None outside of captures, of which there is one at a time.
_recording: list | None = None


class DeviceArray(np.ndarray):
    """What `cutp.array.scratch.on_device` takes for a device array: no arithmetic, no NumPy function."""

    def __setitem__(self, key, value):
        assert type(value) is DeviceArray or np.isscalar(value), f"{type(value).__name__} assigned to device memory"
        _do(lambda: np.ndarray.__setitem__(self.view(np.ndarray), key,
                                           value.view(np.ndarray) if type(value) is DeviceArray else value))

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise AssertionError(f"{ufunc.__name__} on device arrays: this would allocate on a GPU")

    def __array_function__(self, function, types, args, kwargs):
        raise AssertionError(f"numpy.{function.__name__} on device arrays")

    def __bool__(self):
        raise AssertionError("a device value was read on the host")

    __int__ = __float__ = __index__ = __iter__ = tolist = __bool__

    @property
    def host(self):
        """The same memory as NumPy's own array."""
        return self.view(np.ndarray)


class _Mark:
    """What kernels have written to mapped memory is there no earlier than it is waited for."""

    def __init__(self, mapped):
        self._arrived = [(host, host.copy()) for host in mapped]
        for host in mapped:
            host[...] = 0xFF

    def synchronize(self):
        for host, arrived in self._arrived:
            host[...] = arrived


class EmulatedMemory:
    """`cutp.array.scratch.Memory` on the host; memory begins poisoned. size: bytes in all."""

    def __init__(self, size=4 << 30):
        self.size, self.used = size, 0
        self._mapped = []

    def empty(self, shape, dtype):
        assert _recording is None, "memory is taken inside a capture"
        dtype = np.dtype(dtype)
        shape = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(shape)
        count = math.prod(shape) * dtype.itemsize
        if self.used + count > self.size:
            raise CapacityError(f"the emulated device has no memory for {count} bytes")
        self.used += count
        raw = np.full(count + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        return raw[start : start + count].view(dtype).reshape(shape).view(DeviceArray)

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def pinned(self, size):
        return np.zeros(size, np.uint8)

    def mapped(self, size):
        host = np.full(size, 0xFF, np.uint8)
        self._mapped.append(host)
        return host, host.view(DeviceArray)

    def mark(self):
        assert _recording is None, "a mark inside a capture"
        return _Mark(self._mapped)

    def upload(self, target, host):
        assert _recording is None, "a copy from the host inside a capture"
        assert type(host) is np.ndarray and type(target) is DeviceArray and target.shape == host.shape, (target, host)
        assert target.dtype == host.dtype and target.flags.c_contiguous
        target.host[...] = host

    def numpy(self, x):
        assert _recording is None, "a copy to the host inside a capture"
        assert type(x) is DeviceArray
        return np.array(x.host)

    def synchronize(self):
        assert _recording is None, "waiting inside a capture"

    def free_bytes(self):
        return self.size - self.used, self.size

    def uploader(self, nbytes):
        return EmulatedUploader(self, nbytes)


class EmulatedUploader:
    """`cutp.array.scratch.Uploader`, whose copies are all made at the end: no buffer is used again too early."""

    def __init__(self, memory, nbytes):
        self._memory = memory
        self._buffers = [np.full(nbytes, 0xFF, np.uint8) for _ in range(2)]
        self._sent = [None, None]
        self._turn = 0

    def buffer(self):
        self._arrive(self._turn)
        return self._buffers[self._turn]

    def send(self, target, host):
        assert np.shares_memory(host, self._buffers[self._turn])
        self._sent[self._turn] = target, host
        self._turn = 1 - self._turn

    def close(self):
        for turn in (0, 1):
            self._arrive(turn)

    def _arrive(self, turn):
        if self._sent[turn] is not None:
            self._memory.upload(*self._sent[turn])
            self._sent[turn] = None


class RecordedGraph:
    """`cutp.array.graph.Graph`: launches and assignments, recorded with their arrays."""

    def __init__(self, calls):
        self.calls, self.launches = calls, 0

    def launch(self, stream=None):
        self.launches += 1
        for call in self.calls:
            call()

    def close(self):
        self.calls = []


@contextlib.contextmanager
def recorded(stream=None):
    """`cutp.array.graph.capture`: nothing in the body runs, all of it does when the graph is launched."""
    global _recording
    assert _recording is None
    _recording = []
    try:
        yield RecordedGraph(_recording)
    finally:
        _recording = None


def _do(call):
    """Runs `call`, or records it."""
    if _recording is None:
        call()
    else:
        _recording.append(call)


class _RecordingBackend(EmulatorBackend):
    def launch(self, *args, **kwargs):
        _do(lambda: super(_RecordingBackend, self).launch(*args, **kwargs))


@contextlib.contextmanager
def emulated_device(monkeypatch):
    """Kernels run in the emulation, matrix products in the stand-in for cuBLASLt, graphs replay what they recorded."""
    engine = gemm.LinearEngine(FakeCublasLt())

    def linear(x, w, out, bias=None, *, workspace, allow_tf32=False, row_invariant=False):
        rows = range(x.shape[0]) if row_invariant else [slice(None)]

        def start():
            for row in rows:
                row = slice(row, row + 1) if row_invariant else row
                # The stand-in knows one stream.
                engine.linear(x.host[row], w.host, out.host[row], bias if bias is None else bias.host, workspace.host,
                              allow_tf32, 5)

        _do(start)

    monkeypatch.setattr(gemm, "linear", linear)
    monkeypatch.setattr("cutp.engine.decode_graphs.capture", recorded)
    with use_backend(_RecordingBackend()):
        yield EmulatedMemory()
