"""Where a kernel test runs: in the emulation, and again on a GPU where there is one (`-m gpu`)."""

import shutil

import numpy as np
import pytest


class EmulatedArrays:
    """Kernels run in the CPU emulation; their arrays are NumPy arrays."""

    emulated = True

    def array(self, x):
        """`x` where kernels can use it."""
        return np.array(x, order="C")

    def poisoned(self, shape, dtype):
        """An array to be written, full of NaN (or of the greatest integers)."""
        dtype = np.dtype(dtype)
        return np.full(shape, np.iinfo(dtype).max if dtype.kind in "iu" else np.nan, dtype)

    def numpy(self, x):
        """`x` as a NumPy array, once the kernels launched so far have finished."""
        return np.asarray(x)


class GpuArrays(EmulatedArrays):
    """Kernels run on the GPU; their arrays are CuPy arrays."""

    emulated = False

    def __init__(self, cupy):
        self._cupy = cupy

    def array(self, x):
        return self._cupy.asarray(np.array(x, order="C"))

    def poisoned(self, shape, dtype):
        return self.array(super().poisoned(shape, dtype))

    def numpy(self, x):
        return self._cupy.asnumpy(x)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The arrays and the backend of kernel launches: `device.array(x)`, `device.poisoned(shape, dtype)`,
    `device.numpy(x)`; `device.emulated` says which of the two it is."""
    if request.param == "emulated":
        if shutil.which("g++") is None:
            pytest.skip("the emulation of kernels needs g++")
        from cutp.array.kernel import use_backend
        from tests.emulation.emulator import EmulatorBackend

        with use_backend(EmulatorBackend()):
            yield EmulatedArrays()
    else:
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("there is no GPU")
        yield GpuArrays(cupy)
