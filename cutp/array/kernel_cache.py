"""Compiled kernels, kept on disk and in memory.

A file is found by a hash of everything that went into it, is written under another name and renamed, and carries a
checksum: a reader sees a whole file of the right content or none, whatever other processes do or wherever they die.
The directory belongs to this user alone, because what lies there is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from cutp import settings
from cutp.array.compile import CompiledKernel, build_options, canonical_defines, compile_cubin
from cutp.array.nvrtc import nvrtc

_FORMAT = "cutp kernel 1"


class KernelCache:
    """Compiles what it does not have. May be used by many threads and, through its directory, many processes.

    A directory that cannot be used (not writable, disk full, owned by somebody else, writable by others) is
    reported by one RuntimeWarning, and kernels are kept in memory only. `compiled` counts compilations.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None):
        """`directory` defaults to `CUTP_KERNEL_CACHE`, or else `cutp-kernels-<uid>` in $TMPDIR or /tmp."""
        chosen = directory if directory is not None else settings.kernel_cache()
        self.directory = Path(chosen).expanduser() if chosen is not None else default_directory()
        self.compiled = 0
        self._is_default = chosen is None
        self._memory: dict[str, CompiledKernel] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._readable: bool | None = None  # not known before the first use
        self._writable = True

    def get(
        self, source_text: str, label: str, arch: str, defines: Iterable[str] = (),
        include: Mapping[str, str] | None = None,
    ) -> CompiledKernel:
        """The compiled kernel, from memory, disk or the compiler. Arguments and errors: see `compile_cubin`."""
        defines = canonical_defines(tuple(defines))
        include = dict(include or {})
        key = kernel_key(source_text, label, arch, defines, include)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        # Two threads that want the same kernel compile it once; those that want others do not wait.
        with lock:
            kernel = self._memory.get(key) or self._read(key)
            if kernel is None:
                kernel = compile_cubin(source_text, label, arch, defines, include)
                with self._lock:
                    self.compiled += 1
                self._write(key, kernel, label, arch, defines)
            self._memory[key] = kernel
        return kernel

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.kernel"

    def _read(self, key: str) -> CompiledKernel | None:
        """The kernel on disk; None if there is none or the file is damaged."""
        if not self._prepare():
            return None
        try:
            return unpack(self.path(key).read_bytes())
        except (OSError, ValueError):
            return None

    def _write(self, key: str, kernel: CompiledKernel, label: str, arch: str, defines: tuple[str, ...]) -> None:
        if not (self._prepare() and self._writable):
            return
        temporary = None
        try:
            # mkstemp makes a name of its own for every process and thread, readable by this user only.
            handle, temporary = tempfile.mkstemp(prefix=f".{key[:16]}-", dir=self.directory)
            with os.fdopen(handle, "wb") as file:
                file.write(pack(kernel, label=label, arch=arch, defines=list(defines)))
            os.replace(temporary, self.path(key))
        except OSError as error:
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)
            self._give_up(f"{error.strerror or error}")

    def _prepare(self) -> bool:
        """Whether files in the directory may be loaded; the first call creates or examines it."""
        with self._lock:
            readable = self._readable
        if readable is None:
            problem = self._open_directory()
            if problem:
                self._give_up(problem)
            with self._lock:
                readable = self._readable = not problem
        return readable

    def _open_directory(self) -> str | None:
        try:
            self.directory.mkdir(mode=0o700, parents=not self._is_default, exist_ok=True)
            # In a world-writable /tmp anybody could have put a link of our name to a place of his choice.
            status = os.stat(self.directory, follow_symlinks=not self._is_default)
        except OSError as error:
            return error.strerror or str(error)
        return directory_problem(status)

    def _give_up(self, problem: str) -> None:
        with self._lock:
            first, self._writable = self._writable, False
        if first:
            warnings.warn(
                f"compiled kernels cannot be kept in {self.directory} ({problem}), so that every process compiles "
                "them again: set CUTP_KERNEL_CACHE to a directory of your own, with mode 700, on a local disk",
                RuntimeWarning, stacklevel=3,
            )


def default_directory() -> Path:
    """Local to the node, since a parallel file system is slow for many small files, and one for each user."""
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"cutp-kernels-{os.geteuid()}"


def directory_problem(status: os.stat_result) -> str | None:
    """Why code must not be loaded from a directory with this owner and mode, or None."""
    if (status.st_mode & 0o170000) != 0o040000:
        return "it is not a directory"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"others may write to it, its mode is {status.st_mode & 0o777:o}"
    return None


def kernel_key(
    source_text: str, label: str, arch: str, defines: tuple[str, ...], include: Mapping[str, str]
) -> str:
    """A hash of all that determines the cubin: texts, options, and the compiler's and CUDA headers' versions."""
    parts = [nvrtc().identity, label, source_text, *build_options(arch, defines)]
    for name in sorted(include):
        parts += [name, include[name]]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # the length, so that no two lists run together alike
    return digest.hexdigest()


def pack(kernel: CompiledKernel, **about: object) -> bytes:
    """One line of JSON, then the cubin. `about` is for people who look at the file."""
    body = json.dumps({**about, "log": kernel.log}).encode() + b"\n" + kernel.cubin
    return f"{_FORMAT} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def unpack(data: bytes) -> CompiledKernel:
    """What `pack` packed. ValueError if a byte of it is different."""
    head, _, body = data.partition(b"\n")
    if head != f"{_FORMAT} {hashlib.sha256(body).hexdigest()}".encode():
        raise ValueError("the checksum does not match")
    about, _, cubin = body.partition(b"\n")
    return CompiledKernel(cubin, json.loads(about)["log"])
