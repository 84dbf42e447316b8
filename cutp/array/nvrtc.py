"""NVRTC, NVIDIA's CUDA C++ compiler as a library, bound with ctypes.

It needs neither a GPU nor a driver nor CuPy, so a kernel can be built wherever the wheel can be installed.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from cutp.errors import DeviceError

INSTALL_HINT = 'pip install "cutp[cuda13]" (or "cutp[cuda12]"), or load a CUDA toolkit and set CUDA_PATH'


class Nvrtc:
    """The loaded library: `version` is (major, minor), `identity` tells two builds of one version apart."""

    def __init__(self, library: ctypes.CDLL, path: str, include_dir: Path | None):
        self._lib = library
        self.path = path
        self.include_dir = include_dir
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)
        # NVRTC does not report its build number; the size of the library changes with practically every build.
        self.identity = f"nvrtc {major.value}.{minor.value} {os.path.getsize(path)} {_header_version(include_dir)}"

    def supported_archs(self) -> tuple[int, ...]:
        """The numbers NN of the architectures sm_NN this library compiles for."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        numbers = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
        return tuple(numbers)

    def compile(
        self, source: str, label: str, options: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes | None, str]:
        """(cubin, log); the cubin is None if the source does not compile. Other threads run meanwhile."""
        _compile_once_alone(self)
        return self._compile(source, label, options, headers)

    def _compile(
        self, source: str, label: str, options: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes | None, str]:
        program = ctypes.c_void_p()
        names = list(headers)
        created = self._lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), label.encode(), len(names),
            _strings([headers[n] for n in names]), _strings(names),
        )
        self._check(created, "nvrtcCreateProgram")
        try:
            status = self._lib.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            if status == _COMPILATION_FAILED or (status != 0 and log.strip()):
                return None, log
            self._check(status, "nvrtcCompileProgram")
            return self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, size_name: str, get_name: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, size_name)(program, ctypes.byref(size)), size_name)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, get_name)(program, buffer), get_name)
        return buffer.raw[: size.value]

    def _text(self, program: ctypes.c_void_p, size_name: str, get_name: str) -> str:
        return self._bytes(program, size_name, get_name).rstrip(b"\0").decode(errors="replace")

    def _check(self, status: int, call: str) -> None:
        if status != 0:
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise DeviceError(f"{call} failed: {self._lib.nvrtcGetErrorString(status).decode()} ({self.path})")


_COMPILATION_FAILED = 6
_first_compile = threading.Lock()
_compiled_before = False


def _compile_once_alone(library: Nvrtc) -> None:
    """NVRTC loads its builtins in a process's first compilation; two threads at once have been seen to fail in that."""
    global _compiled_before
    with _first_compile:
        if not _compiled_before:
            library._compile("", "first.cu", (), {})
            _compiled_before = True


@cache
def nvrtc() -> Nvrtc:
    """The library, loaded on first use. DeviceError with what to install if it is not there."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory, load_nvidia_dynamic_lib
    except ImportError as error:
        raise DeviceError(
            "CUDA kernels cannot be compiled: the package cuda-pathfinder, which finds NVRTC, is not installed",
            hint=INSTALL_HINT,
        ) from error
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
        library = ctypes.CDLL(path)
    except (RuntimeError, OSError) as error:
        raise DeviceError(
            f"CUDA kernels cannot be compiled: NVRTC was not found ({_first_line(error)})", hint=INSTALL_HINT
        ) from error
    include = find_nvidia_header_directory("cudart")
    return Nvrtc(library, path, Path(include) if include else None)


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None if they can."""
    try:
        nvrtc()
    except DeviceError as error:
        return str(error)
    return None


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*[t.encode() for t in texts])


def _header_version(include_dir: Path | None) -> str:
    """The version of the CUDA headers, which need not be that of NVRTC."""
    if include_dir is None:
        return "no headers"
    try:
        text = (include_dir / "cuda_runtime_api.h").read_text(errors="replace")
    except OSError:
        return "no headers"
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return f"headers {found.group(1) if found else '?'}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
