"""Runs the kernels of cutp/ops/*.cu on the CPU: compiled by g++ against emulation.h, one fiber per CUDA thread.

    kernel = EmulatedKernel(OPS_DIRECTORY / "rms_norm.cu", "rms_norm", ["DTYPE=BF16", "VECTORS_PER_THREAD=1"])
    kernel.launch(grid=4, block=64, args=[x, weight, out, np.int32(4), ...])

NumPy arrays stand for device arrays. During a launch each lies in memory of its own that ends at an unmapped page,
so that reading or writing outside it is an `EmulationError` naming kernel, block, thread, array and byte; so are a
collective that not all threads reach, a misaligned vector, an endless loop, a store to a read-only array and an
argument of the wrong size. `EmulatorBackend` is the same as a backend of `cutp.array.kernel`, for launcher functions.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest

from cutp.array.compile import canonical_defines
from cutp.array.kernel_source import OPS_DIRECTORY, read_source
from cutp.array.tensor_map import TensorMap, byte_strides

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
# No contraction: a fused multiply-add is one more way in which two right results may differ in the last bit.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
         "-ftls-model=initial-exec", "-Wno-psabi", "-DCUTP_EMULATION"]
MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 * 1024

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or any(shutil.which(tool) is None for tool in (shlex.split(CXX)[0], "nm")),
    reason=f"kernels are emulated by compiling them with {CXX} on Linux",
)

# Either order of "void" and the launch bounds, whose arguments may contain one level of parentheses.
_BOUNDS = r"(?:__launch_bounds__\s*\(\s*((?:[^()]|\([^()]*\))*)\)\s*)?"
_KERNEL = re.compile(rf"__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(")
_compiling = threading.Lock()


class EmulationError(Exception):
    """What a kernel did wrong and where, or why it could not be run."""


# ---- compilation


@cache
def _build_directory() -> Path:
    directory = tempfile.mkdtemp(prefix="cutp-emulation-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _compile(text: str, label: str, options: Sequence[str], libraries: Sequence[str],
             depends_on: Iterable[Path]) -> Path:
    """The shared library of a C++ text, compiled once per session for the same text, options and dependencies."""
    command = [*shlex.split(CXX), *FLAGS, f"-I{HERE}", *options]
    digest = hashlib.sha256("\0".join([text, *command]).encode())
    for path in sorted(depends_on):
        digest.update(path.read_bytes())
    stem = _build_directory() / f"{label}-{digest.hexdigest()[:24]}"
    library = stem.with_suffix(".so")
    if not library.exists():
        source = stem.with_suffix(".cpp")
        source.write_text(text)
        made = stem.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([*command, str(source), "-o", str(made), *libraries], capture_output=True, text=True)
        if done.returncode:
            raise EmulationError(f"{label} does not compile with {CXX}:\n{done.stderr}")
        made.rename(library)
    return library


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_runtime_path()))
    library.emulation_buffer_new.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(_Buffer)]
    for name in ("free", "read_only", "damaged"):
        getattr(library, f"emulation_buffer_{name}").argtypes = [ctypes.POINTER(_Buffer)]
    library.emulation_launch.argtypes = [ctypes.POINTER(_Launch)]
    return library


@cache
def _runtime_path() -> Path:
    parts = [HERE / f"{name}.cpp" for name in ("runtime", "runtime_hopper", "runtime_wgmma")]
    text = "".join(f'#include "{part}"\n' for part in parts)
    return _compile(text, "runtime", ["-O3"], ["-lrt"], [*parts, *HERE.glob("*.h")])


@dataclass
class _Module:
    """A compiled kernel file: its library and where its __shared__ variables lie."""

    library: ctypes.CDLL
    max_threads: dict[str, int]  # of each kernel
    statics: ctypes.Array
    # __shared__ variables exist once, so the file's kernels run on one OS thread at a time.
    lock: AbstractContextManager

    def symbol(self, name: str):
        return getattr(self.library, name)


@lru_cache(maxsize=256)
def _load_module(source: Path, defines: tuple[str, ...]) -> _Module:
    text = source.read_text()
    kernels = {name: first or second for first, second, name in _KERNEL.findall(text)}
    if not kernels:
        raise EmulationError(f"{source.name} has no 'extern \"C\" __global__ void name(...)'")
    # An unnamed namespace gives every symbol of the file internal linkage, so that equal names of two libraries stay
    # apart, and makes them visible to `nm`.
    wrapper = "\n".join(['#include "runtime_hopper.h"', "namespace {", f'#include "{source}"', "}",
                         *(f"EMULATED_KERNEL({name})" for name in kernels), ""])
    runtime = _runtime_path()
    headers = {source, *source.parent.glob("*.cuh"), *OPS_DIRECTORY.glob("*.cuh"), *HERE.glob("*.h")}
    path = _compile(wrapper, source.stem, [f"-D{d}" for d in defines], [str(runtime)], headers)
    _runtime()
    library = ctypes.CDLL(str(path))
    statics = _shared_variables(path, library, next(iter(kernels)))
    max_threads = {name: _launch_bound(bounds) for name, bounds in kernels.items()}
    return _Module(library, max_threads, statics, threading.Lock() if len(statics) else nullcontext())


def _launch_bound(bounds: str) -> int:
    """The first argument of __launch_bounds__ where it is a number."""
    first = bounds.split(",")[0].strip()
    return int(first) if first.isdigit() else MAX_THREADS


def _shared_variables(path: Path, library: ctypes.CDLL, kernel: str) -> ctypes.Array:
    """The `__shared__` variables of a library by address: the writable static variables of its functions."""
    listing = subprocess.run(["nm", "-S", str(path)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listing.splitlines()]
    offsets = {words[3]: (int(words[0], 16), int(words[1], 16)) for words in symbols if len(words) == 4}
    writable = {words[3] for words in symbols if len(words) == 4 and words[2] in "bBdD"}
    base = ctypes.cast(getattr(library, f"call_{kernel}"), ctypes.c_void_p).value - offsets[f"call_{kernel}"][0]
    found = sorted(offsets[name] for name in writable if name.startswith("_ZZ"))
    return (_Region * len(found))(*(_Region(base + start, size, 0) for start, size in found))


# ---- arguments


class _Region(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("argument", ctypes.c_int32)]


class _Buffer(ctypes.Structure):
    _fields_ = [("pages", ctypes.c_void_p), ("page_bytes", ctypes.c_uint64), ("data", ctypes.c_void_p),
                ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [("call", ctypes.c_void_p), ("arguments", ctypes.POINTER(ctypes.c_void_p)),
                ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
                ("shared_bytes", ctypes.c_uint64), ("order_seed", ctypes.c_uint64), ("seconds", ctypes.c_double),
                ("pdl", ctypes.c_int32), ("n_buffers", ctypes.c_int32), ("n_statics", ctypes.c_int32),
                ("buffers", ctypes.POINTER(_Region)), ("statics", ctypes.POINTER(_Region)),
                ("message", ctypes.c_char_p), ("message_bytes", ctypes.c_uint64)]


class _Parameter(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("bytes", ctypes.c_uint32)]

    def __str__(self) -> str:
        return {b"p": "a pointer", b"i": "an integer", b"f": "a float", b"t": "a TensorMap",
                b"s": "a struct"}[self.kind]


def _check_argument(where: str, parameter: _Parameter, value: object) -> None:
    kind = parameter.kind
    if kind == b"p":
        if value is None:
            return
        if not isinstance(value, np.ndarray):
            raise EmulationError(f"{where} is {parameter}, but {type(value).__name__} was given")
        # Pointers to bytes, void or whole vectors fit arrays of any dtype.
        if 1 < parameter.bytes < 16 and parameter.bytes != value.dtype.itemsize:
            raise EmulationError(f"{where} points to elements of {parameter.bytes} bytes, "
                                 f"but the array has dtype {value.dtype}")
        return
    if kind == b"t":
        if not isinstance(value, TensorMap) or not isinstance(value.array, np.ndarray):
            raise EmulationError(f"{where} is {parameter}, but {type(value).__name__} was given")
        return
    by_value = isinstance(value, np.generic) or (
        kind == b"s" and isinstance(value, np.ndarray) and value.size == 1 and value.dtype.type is np.void)
    if not by_value:
        raise EmulationError(f"{where} is {parameter} of {parameter.bytes} bytes and needs a NumPy scalar of that "
                             f"size, but {type(value).__name__} was given")
    is_float = isinstance(value, np.floating)
    if value.dtype.itemsize != parameter.bytes or (kind != b"s" and is_float != (kind == b"f")):
        raise EmulationError(f"{where} is {parameter} of {parameter.bytes} bytes, but {value.dtype} was given")


class _TensorMapRecord(ctypes.Structure):
    _fields_ = [("magic", ctypes.c_uint64), ("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 5),
                ("sizes", ctypes.c_uint32 * 5), ("box", ctypes.c_uint16 * 5), ("rank", ctypes.c_uint8),
                ("weight", ctypes.c_uint8)]


def _tensor_map_bytes(tensor_map: TensorMap, address: int) -> bytes:
    """What stands for the 128 bytes that hardware knows an array by, the array being at this address."""
    array = tensor_map.array
    strides = byte_strides(array.shape, array.strides, array.dtype, tensor_map.box)
    record = _TensorMapRecord(0x70616D726F736E74, address, rank=array.ndim, weight=tensor_map.weight)
    for field, values in (("strides", strides), ("sizes", array.shape), ("box", tensor_map.box)):
        getattr(record, field)[: array.ndim] = values[::-1]
    return bytes(record)


def _aligned_bytes(data: bytes, alignment: int) -> tuple[ctypes.Array, int]:
    """A buffer, and the address in it where the data lies."""
    buffer = ctypes.create_string_buffer(len(data) + alignment)
    address = ctypes.addressof(buffer)
    address += -address % alignment
    ctypes.memmove(address, data, len(data))
    return buffer, address


class _GuardedArrays:
    """Copies of the arrays of one launch in guarded memory; arrays that overlap share one copy."""

    def __init__(self, arrays: Sequence[tuple[int, np.ndarray]]):
        self.runtime = _runtime()
        self.buffers: list[tuple[int, int, _Buffer, bool]] = []  # begin and end in NumPy's memory, copy, writable
        filled = [a for _, a in arrays if a.size]
        for span in _merged(sorted((*np.lib.array_utils.byte_bounds(a), a.flags.writeable) for a in filled)):
            self._copy_in(*span)
        if len(filled) < len(arrays):
            self._copy_in(0, 0, False)  # what pointers of empty arrays point to
        self.count = len(arrays)
        self.regions = (_Region * max(1, self.count))()
        for region, (index, array) in zip(self.regions, arrays, strict=False):
            region.begin, region.bytes, region.argument = self.address(array), _extent(array), index

    def _copy_in(self, begin: int, end: int, writable: bool) -> None:
        buffer = _Buffer()
        self.runtime.emulation_buffer_new(end - begin, begin % 16, ctypes.byref(buffer))
        ctypes.memmove(buffer.data, begin, end - begin)
        if not writable:
            self.runtime.emulation_buffer_read_only(ctypes.byref(buffer))
        self.buffers.append((begin, end, buffer, writable))

    def address(self, array: np.ndarray) -> int:
        data = array.ctypes.data if array.size else 0
        begin, _, buffer, _ = next(b for b in self.buffers if b[0] <= data < b[1] or b[0] == data)
        return buffer.data + data - begin

    def finish(self, where: str) -> None:
        """Copy the results back. Raises EmulationError if bytes next to an array have been written."""
        for begin, end, buffer, writable in self.buffers:
            if writable:
                ctypes.memmove(begin, buffer.data, end - begin)
        for region in self.regions[: self.count]:
            for *_, buffer, writable in self.buffers:
                inside = buffer.data <= (region.begin or 0) <= buffer.data + buffer.bytes
                if inside and writable and self.runtime.emulation_buffer_damaged(ctypes.byref(buffer)):
                    raise EmulationError(f"{where}: wrote next to argument {region.argument}, "
                                         f"which has {region.bytes} bytes")

    def free(self) -> None:
        for *_, buffer, _ in self.buffers:
            self.runtime.emulation_buffer_free(ctypes.byref(buffer))


def _extent(array: np.ndarray) -> int:
    """Bytes from the first element in memory to the end of the last one."""
    if not array.size:
        return 0
    begin, end = np.lib.array_utils.byte_bounds(array)
    return end - begin


def _merged(spans: Iterable[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Spans of memory in order, with those that share bytes joined; a joined one is writable if any part is."""
    merged: list[tuple[int, int, bool]] = []
    for begin, end, writable in spans:
        if merged and begin < merged[-1][1]:
            first, last, was_writable = merged[-1]
            merged[-1] = (first, max(last, end), was_writable or writable)
        else:
            merged.append((begin, end, writable))
    return merged


# ---- launches


def _three(size: int | Sequence[int], what: str) -> tuple[int, int, int]:
    values = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
    if not 1 <= len(values) <= 3 or any(int(v) < 1 for v in values):
        raise EmulationError(f"{what}: {what.split()[-1]} is {size!r}; it needs one to three positive sizes")
    return (*map(int, values), 1, 1)[:3]


class EmulatedKernel:
    """One kernel of one variant of a kernel file.

    source: the .cu file; headers are taken from its folder. defines: as for `cutp.array.kernel.launch`.
    """

    def __init__(self, source: Path | str, name: str, defines: Sequence[str] = ()):
        self.name = name
        with _compiling:
            self.module = _load_module(Path(source).resolve(), canonical_defines(tuple(defines)))
        if name not in self.module.max_threads:
            raise EmulationError(f"{Path(source).name} has no kernel {name}; "
                                 f"it has {', '.join(self.module.max_threads)}")
        parameters = (_Parameter * 64)()
        self.parameters = parameters[: self.module.symbol(f"describe_{name}")(parameters)]

    def launch(self, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[object],
               shared_bytes: int = 0, order_seed: int = 0, *, pdl: bool = False, seconds: float = 60.0) -> None:
        """Run the kernel; arrays in `args` change as they would on a GPU.

        Scalars are NumPy scalars of the exact size, structs arrays of one element of a void dtype, None a null
        pointer. order_seed 0 runs
        threads and blocks in order, others permute them; the seed also selects what uninitialised shared memory holds.
        Under `pdl` touching activations before `pdl_wait` is an error. EmulationError also after `seconds` of CPU time.
        """
        grid, block = _three(grid, f"{self.name}: grid"), _three(block, f"{self.name}: block")
        self._check(block, args, shared_bytes)
        arrays = ((i, p, a.array if p.kind == b"t" else a)
                  for i, (p, a) in enumerate(zip(self.parameters, args, strict=True)))
        guarded = _GuardedArrays([(i, a) for i, p, a in arrays if p.kind in b"pt" and a is not None])
        try:
            message = ctypes.create_string_buffer(1024)
            launch, keep = self._launch_record(guarded, args, message)
            launch.grid, launch.block = grid, block
            launch.shared_bytes, launch.order_seed = shared_bytes, order_seed
            launch.pdl, launch.seconds = pdl, seconds
            with self.module.lock:
                failed = _runtime().emulation_launch(ctypes.byref(launch))
            if failed:
                raise EmulationError(f"{self.name}: {message.value.decode()}")
            guarded.finish(self.name)
            del keep
        finally:
            guarded.free()

    def _check(self, block: tuple[int, int, int], args: Sequence[object], shared_bytes: int) -> None:
        threads = block[0] * block[1] * block[2]
        if threads % 32 or threads > self.module.max_threads[self.name]:
            raise EmulationError(f"{self.name}: a block of {threads} threads; it must be a multiple of 32, "
                                 f"at most {self.module.max_threads[self.name]}")
        if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
            raise EmulationError(f"{self.name}: {shared_bytes} bytes of dynamic shared memory; "
                                 f"at most {MAX_SHARED_BYTES} exist")
        if len(args) != len(self.parameters):
            raise EmulationError(f"{self.name} has {len(self.parameters)} parameters; {len(args)} arguments were given")
        for i, (parameter, value) in enumerate(zip(self.parameters, args, strict=True)):
            _check_argument(f"{self.name}: argument {i}", parameter, value)

    def _launch_record(self, guarded: _GuardedArrays, args: Sequence[object], message: ctypes.Array):
        """The structure for the runtime, without sizes, and what must stay alive while it is used."""
        values = []
        for parameter, value in zip(self.parameters, args, strict=True):
            if parameter.kind == b"p":
                data = bytes(ctypes.c_void_p(None if value is None else guarded.address(value)))
            elif parameter.kind == b"t":
                data = _tensor_map_bytes(value, guarded.address(value.array)).ljust(parameter.bytes, b"\0")
            else:
                data = value.tobytes()
            values.append(_aligned_bytes(data, 64))
        addresses = (ctypes.c_void_p * max(1, len(values)))(*(address for _, address in values))
        launch = _Launch()
        launch.call = ctypes.cast(self.module.symbol(f"call_{self.name}"), ctypes.c_void_p)
        launch.arguments = ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p))
        launch.buffers, launch.n_buffers = guarded.regions, guarded.count
        launch.statics, launch.n_statics = self.module.statics, len(self.module.statics)
        launch.message, launch.message_bytes = ctypes.cast(message, ctypes.c_char_p), len(message)
        return launch, (values, addresses)


class EmulatorBackend:
    """A backend for `cutp.array.kernel.use_backend`: launcher functions then run on NumPy arrays.

    order_seed: that of all launches; None: 1, 2, 3, ..., so that tests meet many orders. directory: where the kernel
    files are (another folder than cutp/ops holds changed ones). `launches` counts calls.
    """

    capability: tuple[int, int] | None = None

    def __init__(self, order_seed: int | None = None, directory: Path = OPS_DIRECTORY):
        self.order_seed, self.directory = order_seed, directory
        self.launches = 0

    def launch(self, source: str, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[object],
               shared_bytes: int, defines: Sequence[str], pdl: bool) -> None:
        """As `cutp.array.kernel.KernelBackend.launch`. EmulationError for variants that the file does not declare."""
        self.launches += 1
        path = self.directory / source
        if all(tuple(defines) not in variants for variants in read_source(str(path)).variants.values()):
            raise EmulationError(f"{source} declares no variant {' '.join(defines)}")
        seed = self.launches if self.order_seed is None else self.order_seed
        EmulatedKernel(path, name, defines).launch(grid, block, args, shared_bytes, seed, pdl=pdl)
