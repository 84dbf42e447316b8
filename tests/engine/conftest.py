"""A GPU for `LLM(device="cuda")`: an emulated one, and with `-m gpu` a real one."""

import shutil
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.device_arrays import EmulatedMemory, emulated_device
from tests.wide_heads import write_checkpoint


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request, monkeypatch):
    """"emulated" or "gpu"; `LLM(device="cuda")` then runs there."""
    if request.param == "gpu":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("there is no GPU")
        yield "gpu"
        return
    if shutil.which("g++") is None:
        pytest.skip("the emulation of kernels needs g++")
    from cutp.array.device import DeviceRef
    from cutp.comm.device_mapping import Placement
    from cutp.engine import llm, loading
    from cutp.ops import product_choice

    with emulated_device(monkeypatch):
        monkeypatch.setattr(llm, "place_rank", lambda name, comm: Placement(
            DeviceRef.GPU() if name == "cuda" else DeviceRef.CPU()))
        # One each: ranks may be threads.
        monkeypatch.setattr(loading, "CudaMemory", lambda device: EmulatedMemory())
        monkeypatch.setattr(loading, "Stream", nullcontext)
        monkeypatch.setattr(loading, "device_info", lambda: SimpleNamespace(multiprocessors=2))
        # The kernel for few rows takes most of the time here; it has tests of its own.
        monkeypatch.setattr(product_choice, "_SKINNY_ROWS", 0)
        yield "emulated"


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """wide(**fields): the directory of a tiny Llama with heads of 64 (tests/wide_heads.py), written once."""
    root, lock, found = tmp_path_factory.mktemp("wide"), threading.Lock(), {}

    def directory(**fields):
        with lock:
            key = repr(sorted(fields.items()))
            if key not in found:
                found[key] = write_checkpoint(root / str(len(found)), **fields)
            return found[key]

    return directory
