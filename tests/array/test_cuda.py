"""Why there is no GPU: each reason in a sentence. None of this needs one."""

import sys
import warnings
from types import SimpleNamespace

import pytest

from cutp.array import cuda, graph
from cutp.errors import DeviceError


@pytest.fixture(autouse=True)
def forget_cupy():
    cuda.cupy.cache_clear()
    yield
    cuda.cupy.cache_clear()


class FakeError(RuntimeError):
    pass


def fake_cupy(driver=13000, runtime=13020, devices=1):
    def device_count():
        if isinstance(devices, Exception):
            raise devices
        return devices

    api = SimpleNamespace(
        driverGetVersion=lambda: driver, runtimeGetVersion=lambda: runtime, getDeviceCount=device_count,
        CUDARuntimeError=FakeError,
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=api))


@pytest.mark.parametrize(("fake", "message"), [
    (fake_cupy(driver=0), "no NVIDIA driver was found on host .*use --device cpu"),
    (fake_cupy(driver=12040), r"driver on host .* is too old: it supports CUDA 12.4, and CuPy was built for CUDA 13.2 "
                              r'\(pip install "cutp\[cuda13\]" \(driver 580 or newer\) or "cutp\[cuda12\]"'),
    (fake_cupy(devices=0), "no GPU is visible on host .*CUDA_VISIBLE_DEVICES"),
    (fake_cupy(devices=FakeError("cudaErrorNoDevice")), "no GPU can be used on host .*: cudaErrorNoDevice"),
])
def test_the_reasons(monkeypatch, fake, message):
    monkeypatch.setattr(cuda, "import_cupy", lambda: fake)
    with pytest.raises(DeviceError, match=message):
        cuda.cupy()
    assert not cuda.is_available() and cuda.unavailable_reason()


def test_a_driver_of_the_same_major_version_will_do(monkeypatch):
    monkeypatch.setattr(cuda, "import_cupy", lambda: fake_cupy(driver=13000, runtime=13020))
    assert cuda.is_available() and cuda.unavailable_reason() is None
    cuda.check_driver(14000, 13020)


def test_a_device_that_does_not_exist(monkeypatch):
    monkeypatch.setattr(cuda, "import_cupy", lambda: fake_cupy(devices=2))
    with pytest.raises(DeviceError, match="GPU 2 does not exist: 2 visible on host"):
        cuda.device_info(2)


def test_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r'a GPU needs CuPy, which is not installed \(pip install "cutp\[cuda13\]"'):
        cuda.cupy()
    assert not cuda.is_available()


def test_cupy_is_broken(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(DeviceError, match="CuPy"):
        cuda.import_cupy()


def test_with_cupy_but_no_driver():
    module = pytest.importorskip("cupy")
    if module.cuda.is_available():
        pytest.skip("there is a GPU")
    for use in (cuda.current_device, graph.Stream, cuda.device_info):
        with pytest.raises(DeviceError, match="no NVIDIA driver was found on host|no GPU"):
            use()


def test_names_the_code_relies_on_are_in_cupy():
    module = pytest.importorskip("cupy")
    runtime = module.cuda.runtime
    for name in ("cudaDevAttrMultiProcessorCount", "cudaDevAttrMaxSharedMemoryPerBlockOptin", "deviceGetAttribute",
                 "deviceGetPCIBusId", "getDeviceProperties", "streamCaptureModeRelaxed", "getDevice", "free"):
        assert hasattr(runtime, name), name
    from cupy_backends.cuda.api import driver

    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == 8 and driver.funcSetAttribute
    assert issubclass(driver.CUDADriverError, RuntimeError) and issubclass(runtime.CUDARuntimeError, RuntimeError)
    assert issubclass(module.cuda.memory.OutOfMemoryError, MemoryError)
    for name in ("begin_capture", "end_capture", "__enter__", "__exit__", "synchronize"):
        assert hasattr(module.cuda.Stream, name), name
    for name in ("launch", "upload", "debug_dot_str"):
        assert hasattr(module.cuda.graph.Graph, name), name
    assert callable(module.cuda.using_allocator) and callable(module.cuda.get_current_stream)
    assert hasattr(module.cuda.function.Module, "load") and hasattr(module.cuda.function.Function, "ptr")


def test_nccl(monkeypatch):
    module = pytest.importorskip("cupy")
    monkeypatch.setattr(cuda, "cupy", lambda: module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's, where there is no NCCL
        if cuda._import_nccl().available:
            assert cuda.nccl().get_version() > 20000 and issubclass(cuda.nccl().NcclError, RuntimeError)
            for name in ("abort", "destroy", "check_async_error", "allReduce", "allGather", "reduceScatter"):
                assert hasattr(cuda.nccl().NcclCommunicator, name), name
    monkeypatch.setattr(cuda, "_import_nccl", lambda: SimpleNamespace(available=False))
    with pytest.raises(DeviceError, match="finds no NCCL"):
        cuda.nccl()


def test_a_uuid_reads_as_nvidia_smi_writes_it():
    assert cuda._uuid(bytes(range(16))) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert cuda._uuid(b"cut") == cuda._uuid(None) == ""
