"""Which device a rank gets, with and without GPUs. None of this needs one."""

from types import SimpleNamespace

import pytest

from cutp.array import cuda
from cutp.array.device import DeviceRef, select_device
from cutp.errors import ConfigError, DeviceError


@pytest.fixture
def gpus(monkeypatch):
    """A machine with three GPUs; the list of those that were made current."""
    current = []

    def info(index):
        if index >= 3:
            raise DeviceError(f"GPU {index} does not exist")
        return SimpleNamespace(index=index)

    runtime = SimpleNamespace(getDeviceCount=lambda: 3, setDevice=current.append)
    monkeypatch.setattr(cuda, "has_driver", lambda: True)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(cuda, "device_info", info)
    return current


@pytest.fixture
def no_gpu(monkeypatch):
    def cupy():
        raise DeviceError("a GPU needs CuPy, which is not installed")

    monkeypatch.setattr(cuda, "has_driver", lambda: True)
    monkeypatch.setattr(cuda, "cupy", cupy)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_ranks_of_a_node_take_its_gpus_in_turn(gpus, name):
    assert [select_device(name, rank) for rank in range(5)] == [DeviceRef.GPU(i) for i in (0, 1, 2, 0, 1)]
    assert gpus == [0, 1, 2, 0, 1]


def test_a_gpu_by_its_number(gpus):
    assert select_device("cuda:2", 1) == DeviceRef.GPU(2) and gpus == [2]
    with pytest.raises(DeviceError, match="GPU 3 does not exist"):
        select_device("cuda:3")


def test_the_cpu_asks_for_nothing(gpus, monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: pytest.fail("asked"))
    assert select_device("cpu", 1) == DeviceRef.CPU() and gpus == []


def test_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: False)
    monkeypatch.setattr(cuda, "import_cupy", lambda: pytest.fail("CuPy takes a while to import"))
    assert select_device("auto") == select_device() == DeviceRef.CPU()


def test_a_gpu_that_cannot_be_used(no_gpu, caplog):
    assert select_device("auto", 0) == DeviceRef.CPU()
    assert "running on the CPU: a GPU needs CuPy, which is not installed" in caplog.text
    caplog.clear()
    assert select_device("auto", 1) == DeviceRef.CPU() and not caplog.text
    for name in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match="a GPU needs CuPy"):
            select_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "cpu:", "CUDA"])
def test_names_that_are_no_device(name):
    with pytest.raises(ConfigError, match="is not one of auto, cpu, cuda, cuda:N"):
        select_device(name)
