"""The GPU backend's and capture's own logic, with a stand-in for CuPy that records what it is asked."""

from contextlib import contextmanager
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp.array import cuda, cuda_backend, graph, programmatic_launch
from cutp.array.cuda_backend import CudaBackend
from cutp.array.graph import Stream, capture, is_capturing
from cutp.array.kernel import launch, use_backend
from cutp.array.kernel_cache import KernelCache
from cutp.errors import ClosedError, ConfigError, DeviceError
from tests.array.samples import needs_nvrtc, write_scale


class FakeCupy:
    """One GPU after the other: `device` is the current one, `log` what happened."""

    def __init__(self):
        self.log, self.device, self.fail, self.allocator = [], 0, None, None
        fake = self

        class Function:
            ptr = 1234

            def __init__(self, name):
                if name != "scale":
                    raise RuntimeError("CUDA_ERROR_NOT_FOUND")
                self.name = name

            def __call__(self, grid, block, args, shared):
                if fake.fail:
                    raise RuntimeError(fake.fail)
                fake.log.append(("plain", self.name, grid, block, args, shared))

        class Module:
            def load(self, cubin):
                fake.log.append(("load", fake.device, cubin[:4]))

            def get_function(self, name):
                return Function(name)

        class CupyStream:
            ptr = 55

            def __init__(self, non_blocking):
                assert non_blocking

            def __enter__(self):
                fake.log.append("enter")

            def __exit__(self, *_):
                fake.log.append("exit")

            def begin_capture(self, mode):
                fake.log.append(f"begin {mode}")

            def end_capture(self):
                fake.log.append("end")
                if fake.fail:
                    raise RuntimeError(fake.fail)
                return SimpleNamespace(launch=lambda stream: fake.log.append("graph"))

            def synchronize(self):
                pass

        @contextmanager
        def using_allocator(allocator):
            fake.allocator = allocator
            yield
            fake.allocator = None

        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(getDevice=lambda: fake.device, free=lambda p: None, streamCaptureModeRelaxed=2),
            function=SimpleNamespace(Module=Module), Stream=CupyStream, using_allocator=using_allocator,
            get_current_stream=lambda: SimpleNamespace(ptr=55),
        )

    def plain(self):
        return [entry for entry in self.log if entry[0] == "plain"]


@pytest.fixture
def fake(monkeypatch):
    cupy = FakeCupy()
    monkeypatch.setattr(cuda, "cupy", lambda: cupy)
    capabilities = [(9, 0), (8, 6), (12, 0)]
    monkeypatch.setattr(cuda, "device_info", lambda index: SimpleNamespace(
        capability=capabilities[index], shared_memory_per_block=100_000, driver_version=(13, 0), name="a GPU"))
    return cupy


@pytest.fixture
def source(tmp_path, fake):
    with use_backend(CudaBackend(KernelCache(tmp_path / "cache"))):
        yield write_scale(tmp_path)


def scale(source, **options):
    x = np.zeros(1, np.float32)
    launch(source, "scale", 1, 64, (x, x, np.int32(1)), **{"defines": ["FACTOR=2"], **options})


@needs_nvrtc
def test_a_kernel_is_loaded_once_per_gpu_and_variant(source, fake, monkeypatch):
    built, build = [], cuda_backend.build
    monkeypatch.setattr(cuda_backend, "build", lambda spec, cache: built.append(spec) or build(spec, cache))
    for device, factor in ((0, 2), (0, 2), (0, 3), (1, 2), (1, 2)):
        fake.device = device
        scale(source, defines=[f"FACTOR={factor}"])
    assert [(s.arch, s.defines) for s in built] == [
        ("sm_90a", ("FACTOR=2",)), ("sm_90a", ("FACTOR=3",)), ("sm_80", ("FACTOR=2",))]
    assert [e for e in fake.log if e[0] == "load"] == [("load", d, b"\x7fELF") for d in (0, 0, 1)]
    assert len(fake.plain()) == 5 and fake.plain()[0][2:4] == ((1, 1, 1), (64, 1, 1))


@needs_nvrtc
def test_a_plain_launch_gets_what_cupy_takes(source, fake):
    x, half = np.zeros(1, np.float32), ml_dtypes.bfloat16(1.5)
    launch(source, "scale", 1, 64, (x, None, half, np.int32(7)), defines=["FACTOR=2"])
    args = fake.plain()[0][4]
    assert args[0] is x and type(args[1]) is np.uint64 and args[1] == 0 and args[3] == 7
    assert type(args[2]) is np.ndarray and args[2].tobytes() == np.array(half).tobytes()


@needs_nvrtc
def test_programmatic_launches_only_where_they_exist(source, fake, monkeypatch):
    calls = []
    monkeypatch.setattr(programmatic_launch, "_driver", lambda: object())
    monkeypatch.setattr(programmatic_launch, "launch", lambda *args: calls.append(args))
    scale(source, pdl=True, shared_bytes=100)
    assert [(c[0], c[1], c[4], c[5]) for c in calls] == [(1234, (1, 1, 1), 100, 55)] and fake.plain() == []
    fake.device = 1
    scale(source, pdl=True)
    assert len(calls) == 1 and len(fake.plain()) == 1


@needs_nvrtc
def test_large_shared_memory_is_asked_for_once(source, fake, monkeypatch):
    driver = pytest.importorskip("cupy_backends.cuda.api.driver")
    asked = []
    monkeypatch.setattr(driver, "funcSetAttribute", lambda *args: asked.append(args))
    for size in (1000, 32768, 49152, 60_000, 49153, 100_000):
        scale(source, shared_bytes=size)
    assert asked == [(1234, 8, 49152), (1234, 8, 60_000), (1234, 8, 100_000)]
    with pytest.raises(DeviceError, match="scale wants 100001 bytes of shared memory per block, the GPU has 100000"):
        scale(source, shared_bytes=100_001)


@needs_nvrtc
def test_errors_name_the_kernel(source, fake):
    with pytest.raises(ConfigError, match="scale.cu has no kernel other"):
        launch(source, "other", 1, 1, (), defines=["FACTOR=2"])
    with pytest.raises(ConfigError, match="declares no variant with FACTOR=9 for sm_90a"):
        scale(source, defines=["FACTOR=9"])
    fake.fail = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(DeviceError, match=r"kernel scale of .*\(FACTOR=2\) cannot be launched .*INVALID_VALUE"):
        scale(source)
    fake.device = 2
    with pytest.raises(DeviceError, match=r"scale.cu has no code for a GPU of compute capability 12.0"):
        scale(source)


@needs_nvrtc
def test_a_graph_holds_what_its_kernels_were_given(source, fake):
    stream, x = Stream(), np.zeros(1, np.float32)
    scale(source)
    with capture(stream) as captured:
        assert is_capturing() and fake.allocator is graph._refuse_allocation
        launch(source, "scale", 1, 64, (x, x, np.int32(1)), defines=["FACTOR=2"])
    assert not is_capturing() and any(kept is x for kept in captured._kept)
    scale(source)
    assert len(captured._kept) == 3
    captured.launch()
    assert fake.log[-1] == "graph"
    captured.close()
    assert captured._kept == []
    with pytest.raises(ClosedError):
        captured.launch()


def test_a_capture_that_fails_is_ended(fake):
    stream = Stream()
    with pytest.raises(ZeroDivisionError), capture(stream) as captured:
        raise ZeroDivisionError
    assert fake.log == ["enter", "begin 2", "end", "exit"] and not is_capturing()
    with pytest.raises(ClosedError, match="was not captured to its end"):
        captured.launch()
    fake.fail = "cudaErrorStreamCaptureInvalidated"
    with pytest.raises(ZeroDivisionError), capture(stream):
        raise ZeroDivisionError
    with pytest.raises(DeviceError, match="the graph cannot be captured: cudaError"), capture(stream):
        pass
    assert not is_capturing()
