"""Environment variables: one typed table. A bad value is an error, never ignored."""

from __future__ import annotations

import os

from cutp.errors import ConfigError

COMM_TIMEOUT_DEFAULT = 600.0


def comm_timeout() -> float:
    """Seconds any rank waits for another (`CUTP_COMM_TIMEOUT`, default 600)."""
    return _positive_float("CUTP_COMM_TIMEOUT", COMM_TIMEOUT_DEFAULT)


def matmul_allreduce() -> bool:
    """Whether row-parallel products overlap their all-reduces (`CUTP_MATMUL_ALLREDUCE`, 0 or 1, default 0)."""
    return _flag("CUTP_MATMUL_ALLREDUCE")


def moe() -> str:
    """How ranks divide the experts of a mixture (`CUTP_MOE`): "tensor", the default, cuts every expert along its
    width; "expert" gives each rank whole experts."""
    text = os.environ.get("CUTP_MOE", "")
    if text not in ("", "tensor", "expert"):
        raise ConfigError(f"CUTP_MOE={text!r} is neither 'tensor' nor 'expert'")
    return text or "tensor"


def kernel_cache() -> str | None:
    """The directory where compiled kernels are kept (`CUTP_KERNEL_CACHE`); None, the default, for one in $TMPDIR."""
    return os.environ.get("CUTP_KERNEL_CACHE") or None


def load_threads() -> int:
    """Reads of weights that a rank has in flight (`CUTP_LOAD_THREADS`, default 8)."""
    text = os.environ.get("CUTP_LOAD_THREADS", "")
    if text and not (text.isascii() and text.isdigit() and 1 <= int(text) <= 256):
        raise ConfigError(f"CUTP_LOAD_THREADS={text!r} is not a number of threads from 1 to 256")
    return int(text or 8)


def share_gpu() -> bool:
    """Whether several ranks may use one GPU (`CUTP_SHARE_GPU`, 0 or 1, default 0), for tests: it is slow."""
    return _flag("CUTP_SHARE_GPU")


def _flag(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ConfigError(f"{name}={text!r} is neither 0 nor 1")
    return text == "1"


def _positive_float(name: str, default: float) -> float:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{name}={text!r} is not a positive number of seconds")
    return value
