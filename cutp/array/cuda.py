"""The GPU of this process, through CuPy: is there one, what is it, and if not, why not.

CuPy is imported on first use, never with cutp.
"""

from __future__ import annotations

import ctypes
import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cutp.errors import DeviceError

INSTALL_HINT = 'pip install "cutp[cuda13]" (driver 580 or newer) or "cutp[cuda12]" (driver 525 or newer)'


def is_available() -> bool:
    """Whether this process can use a GPU. Never raises; `unavailable_reason` says why not."""
    return unavailable_reason() is None


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver at all: asked without CuPy, whose import takes a while."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def unavailable_reason() -> str | None:
    """Why no GPU can be used, in a sentence; None if one can."""
    try:
        cupy()
    except DeviceError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def cupy() -> Any:
    """The CuPy module, once it is certain that it can use a GPU.

    Raises DeviceError if CuPy is not installed, or there is no driver, one too old, or no visible GPU.
    """
    module = import_cupy()
    runtime = module.cuda.runtime
    check_driver(runtime.driverGetVersion(), runtime.runtimeGetVersion())
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"no GPU can be used on host {socket.gethostname()}: {error}", hint=_VISIBLE) from error
    if count == 0:
        raise DeviceError(f"no GPU is visible on host {socket.gethostname()}", hint=_VISIBLE)
    return module


_VISIBLE = "nvidia-smi lists the GPUs of a node, and CUDA_VISIBLE_DEVICES or the job's allocation may hide them"


def import_cupy() -> Any:
    """The CuPy module, without a look at the GPU. DeviceError if it cannot be imported."""
    try:
        import cupy
        import cupy.cuda
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cupy":
            raise DeviceError(f"CuPy cannot be imported: {error}", hint=INSTALL_HINT) from error
        raise DeviceError("a GPU needs CuPy, which is not installed", hint=INSTALL_HINT) from error
    except ImportError as error:
        raise DeviceError(f"CuPy cannot be imported: {error}", hint=INSTALL_HINT) from error
    return cupy


def nccl() -> Any:
    """CuPy's module for NCCL, which CuPy does not import by itself. DeviceError if there is no CuPy or no NCCL."""
    cupy()
    module = _import_nccl()
    if not module.available:
        raise DeviceError("CuPy finds no NCCL (libnccl.so.2), which several GPUs need", hint=INSTALL_HINT)
    return module


def _import_nccl() -> Any:
    from cupy.cuda import nccl

    return nccl


def check_driver(driver: int, runtime: int) -> None:
    """Raise DeviceError if a driver for CUDA `driver` cannot run CUDA `runtime` code (13020 stands for 13.2; 0: none).

    Within a major version an older driver runs newer code, as long as it is compiled for the GPU itself.
    """
    host = socket.gethostname()
    if driver == 0:
        raise DeviceError(f"no NVIDIA driver was found on host {host}",
                          hint="run on a GPU node; in a container, pass the GPUs through; or use --device cpu")
    if driver // 1000 < runtime // 1000:
        raise DeviceError(
            f"the NVIDIA driver on host {host} is too old: it supports CUDA {_dotted(driver)}, "
            f"and CuPy was built for CUDA {_dotted(runtime)}",
            hint=INSTALL_HINT,
        )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU. `memory` and `shared_memory_per_block` in bytes; versions as (major, minor) of CUDA.

    `uuid` and `pci_bus_id` name the card whatever CUDA_VISIBLE_DEVICES makes of its index.
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    shared_memory_per_block: int
    uuid: str
    pci_bus_id: str
    driver_version: tuple[int, int]
    runtime_version: tuple[int, int]


# cudaDeviceAttr values which CuPy has no names for.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def current_device() -> int:
    """The index of this thread's current GPU."""
    return cupy().cuda.runtime.getDevice()


def device_info(index: int | None = None) -> DeviceInfo:
    """The GPU with this index, or the thread's current one. DeviceError if there is none."""
    return _device_info(current_device() if index is None else index)


@lru_cache(maxsize=64)
def _device_info(index: int) -> DeviceInfo:
    runtime = cupy().cuda.runtime
    count = runtime.getDeviceCount()
    if not 0 <= index < count:
        raise DeviceError(f"GPU {index} does not exist: {count} visible on host {socket.gethostname()}", hint=_VISIBLE)
    properties = runtime.getDeviceProperties(index)
    return DeviceInfo(
        index=index,
        name=_text(properties["name"]),
        capability=(
            runtime.deviceGetAttribute(_CAPABILITY_MAJOR, index),
            runtime.deviceGetAttribute(_CAPABILITY_MINOR, index),
        ),
        memory=int(properties["totalGlobalMem"]),
        multiprocessors=runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index),
        shared_memory_per_block=runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        uuid=_uuid(properties.get("uuid")),
        pci_bus_id=_text(runtime.deviceGetPCIBusId(index)),
        driver_version=_pair(runtime.driverGetVersion()),
        runtime_version=_pair(runtime.runtimeGetVersion()),
    )


def _pair(version: int) -> tuple[int, int]:
    return version // 1000, version % 1000 // 10


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _uuid(value: bytes | None) -> str:
    """As nvidia-smi writes it; "" if the runtime does not tell."""
    if not isinstance(value, bytes) or len(value) < 16:
        return ""
    digits = value[:16].hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
