"""Every error cutp raises on purpose: one tree, each with a stable code, a hint and an exit code.

The message says what is wrong and where; `hint` says what to do about it. `str(error)` gives both.
An error raised on one rank can be turned into a dict, sent as JSON and rebuilt on the other ranks
(`to_dict` / `from_dict`), so that all ranks report the same sentence.
"""

from __future__ import annotations

from typing import Any


class CutpError(Exception):
    """Base of all errors raised on purpose.

    `rank` is the rank where the error arose when that is known to matter, else None.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, rank: int | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank = rank

    def __str__(self) -> str:
        where = f"rank {self.rank}: " if self.rank is not None else ""
        todo = f" ({self.hint})" if self.hint else ""
        return f"{where}{self.message}{todo}"

    def __reduce__(self):
        return _rebuild, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe description: {"code", "message", "hint", "rank"}."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "rank": self.rank}

    @staticmethod
    def from_dict(d: dict[str, Any]) -> CutpError:
        """The error that `to_dict` described; an unknown code gives a plain CutpError."""
        return _rebuild(d)


class ConfigError(CutpError, ValueError):
    """An option, environment variable or constructor argument that cannot work."""

    code = "config"
    exit_code = 2


class CheckpointError(CutpError):
    """The model directory or one of its files is missing, damaged or inconsistent."""

    code = "checkpoint"
    exit_code = 3


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint would have to execute code to be loaded (pickle, remote code)."""

    code = "unsafe_checkpoint"


class MissingTensorError(CheckpointError):
    code = "missing_tensor"


class ShapeMismatchError(CheckpointError):
    code = "shape_mismatch"


class TruncatedFileError(CheckpointError):
    code = "truncated_file"


class ModelConfigError(CheckpointError):
    """config.json holds a value that cannot describe a model."""

    code = "model_config"


class UnsupportedModelError(CheckpointError):
    """A well-formed checkpoint of a kind cutp does not implement."""

    code = "unsupported_model"


class RequestError(CutpError, ValueError):
    """A prompt or a sampling parameter that cannot be served; the engine stays usable."""

    code = "request"
    exit_code = 2


class PromptTooLongError(RequestError):
    code = "prompt_too_long"


class InvalidTokenError(RequestError):
    code = "invalid_token"


class InputMismatchError(RequestError):
    """Ranks passed different inputs to a collective call."""

    code = "input_mismatch"


class CapacityError(CutpError, MemoryError):
    """The model or the requests do not fit into memory."""

    code = "capacity"
    exit_code = 4


class OutputError(CutpError):
    """A file of results cannot be written: no space, no permission, or another job writes there."""

    code = "output"


class CommError(CutpError):
    """Communication between ranks failed."""

    code = "comm"
    exit_code = 5


class CommTimeoutError(CommError):
    """A peer did not arrive at an operation before the deadline."""

    code = "comm_timeout"


class PeerFailedError(CommError):
    """Another rank raised an error and told this one."""

    code = "peer_failed"


class LauncherMismatchError(CommError):
    """The launcher started N ranks but MPI sees only one."""

    code = "launcher_mismatch"


class DeviceMappingError(CommError):
    """Two ranks have the same GPU, or some ranks have a GPU and others have none."""

    code = "device_mapping"


class ClosedError(CutpError):
    """The object was closed."""

    code = "closed"


class DeviceError(CutpError):
    """A GPU, its driver or a CUDA library is missing, too old, of an unsupported kind, or reported an error."""

    code = "device"
    exit_code = 4


class KernelCompileError(DeviceError):
    """A kernel does not compile. `log` is the compiler's whole output (on the rank that compiled)."""

    code = "kernel_compile"
    log = ""


def _tree(cls: type[CutpError]):
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def _rebuild(d: dict[str, Any]) -> CutpError:
    cls = next((c for c in _tree(CutpError) if c.code == d.get("code")), CutpError)
    error = BaseException.__new__(cls)  # cls.__new__ may be MemoryError's, which refuses CapacityError
    CutpError.__init__(error, str(d.get("message")), hint=d.get("hint"), rank=d.get("rank"))
    return error
