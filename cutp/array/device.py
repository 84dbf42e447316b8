"""Device references: which device holds a shard, without touching it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cutp.array import cuda
from cutp.errors import ConfigError

log = logging.getLogger("cutp")

DEVICE_CHOICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class DeviceRef:
    """A device by kind ("cpu" or "cuda") and index; a name, so making one opens nothing."""

    kind: str = "cpu"
    id: int = 0

    @staticmethod
    def CPU(id: int = 0) -> DeviceRef:
        return DeviceRef("cpu", id)

    @staticmethod
    def GPU(id: int = 0) -> DeviceRef:
        return DeviceRef("cuda", id)

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_gpu(self) -> bool:
        return self.kind == "cuda"

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


def select_device(name: str = "auto", local_rank: int = 0) -> DeviceRef:
    """The device that rank `local_rank` of a node runs on for `name` = "auto", "cpu", "cuda" or "cuda:N".

    "cuda" takes GPU `local_rank` modulo the number of visible ones, "cuda:N" GPU N; either becomes the calling thread's
    current one. "auto" is "cuda" where a GPU can be used, else "cpu". Raises ConfigError for another name, DeviceError
    where no GPU can be used, with the reason.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICE_CHOICES or (index or name.endswith(":")) and not (kind == "cuda" and index.isdecimal()):
        raise ConfigError(f"device {name!r} is not one of {', '.join(DEVICE_CHOICES)}, cuda:N")
    if kind == "cpu" or (kind == "auto" and not cuda.has_driver()):
        return DeviceRef.CPU()
    if kind == "auto" and (reason := cuda.unavailable_reason()) is not None:
        if local_rank == 0:
            log.warning("running on the CPU: %s", reason)
        return DeviceRef.CPU()
    runtime = cuda.cupy().cuda.runtime
    device = cuda.device_info(int(index) if index else local_rank % runtime.getDeviceCount())
    runtime.setDevice(device.index)
    return DeviceRef.GPU(device.index)
