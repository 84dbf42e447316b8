"""Device references: which device holds a shard, without touching it."""

from __future__ import annotations

from dataclasses import dataclass

from cutp.errors import ConfigError

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


def select_device(name: str = "auto") -> DeviceRef:
    """The device a rank runs on for `name` = "auto", "cpu" or "cuda".

    Models run on the CPU only: "auto" gives the CPU, and "cuda" raises ConfigError.
    """
    if name not in DEVICE_CHOICES:
        raise ConfigError(f"device {name!r} is not one of {', '.join(DEVICE_CHOICES)}")
    if name == "cuda":
        raise ConfigError("device 'cuda': this version runs models on the CPU only", hint="use --device cpu")
    return DeviceRef.CPU()
