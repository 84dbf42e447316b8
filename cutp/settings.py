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
    text = os.environ.get("CUTP_MATMUL_ALLREDUCE", "")
    if text not in ("", "0", "1"):
        raise ConfigError(f"CUTP_MATMUL_ALLREDUCE={text!r} is neither 0 nor 1")
    return text == "1"


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
