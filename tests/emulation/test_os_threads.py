"""Emulated kernels from several OS threads: each has a machine of its own, for as long as it lives."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tests.emulation.emulator import EmulatedKernel, EmulationError, needs_compiler

pytestmark = needs_compiler
HERE = Path(__file__).resolve().parent


def test_launches_from_several_os_threads():
    def reduce(seed):
        values = np.random.default_rng(seed).standard_normal((2, 256)).astype(np.float32)
        sums, maxima = np.full_like(values, np.nan), np.full_like(values, np.nan)
        kernel = EmulatedKernel(HERE / "probes.cu", "reductions", ["DTYPE=BF16"])
        kernel.launch(2, 256, [values, sums, maxima], order_seed=seed)
        np.testing.assert_array_equal(maxima, np.broadcast_to(values.max(1, keepdims=True), values.shape))
        with pytest.raises(EmulationError, match="has left the kernel"):
            EmulatedKernel(HERE / "faults.cu", "leave_before_barrier").launch(1, 64, [], order_seed=seed)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(reduce, range(20)))


def test_memory_of_os_threads_goes_with_them():
    """Each leaves a range for a fiber's stack and one for its guard otherwise, of which a process has so many."""

    def ranges():
        return len(Path("/proc/self/maps").read_text().splitlines())

    def launch_elsewhere():
        args = [np.zeros(1, np.uint32), np.zeros(4, np.uint32), np.zeros((4, 64), np.uint32)]
        thread = Thread(target=EmulatedKernel(HERE / "faults.cu", "order").launch, args=(4, 64, args))
        thread.start()
        thread.join()

    launch_elsewhere()
    before = ranges()
    for _ in range(20):
        launch_elsewhere()
    end = time.monotonic() + 10
    while ranges() >= before + 5 * 2 * 64 and time.monotonic() < end:
        time.sleep(0.01)  # a thread's destructors may run behind its join
    assert ranges() < before + 5 * 2 * 64
