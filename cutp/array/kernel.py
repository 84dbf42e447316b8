"""Launching a kernel: one function, whatever runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

from cutp.array.compile import canonical_defines
from cutp.errors import ConfigError

_BARE_NUMBERS = frozenset((bool, int, float, complex))


class KernelBackend(Protocol):
    """What runs kernels: a GPU, or for tests something that behaves like one.

    capability: compute capability of the current GPU, by which launchers choose kernels that not every GPU runs; None
    for one that runs only those of every GPU.
    """

    capability: tuple[int, int] | None

    def launch(
        self, source: str, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], args: Sequence[Any],
        shared_bytes: int, defines: tuple[str, ...], pdl: bool,
    ) -> None:
        """Run kernel `name` of file `source`. `defines` are sorted; other arguments as in `launch`, checked."""


_backend: KernelBackend | None = None


def backend() -> KernelBackend:
    """The backend in use; unless another was set, the GPU through CuPy, opened on first use (DeviceError)."""
    global _backend
    if _backend is None:
        from cutp.array.cuda_backend import CudaBackend

        _backend = CudaBackend()
    return _backend


def set_backend(new: KernelBackend | None) -> KernelBackend | None:
    """Make `new` run all kernels of this process, in all its threads; returns the one before (None: the default)."""
    global _backend
    old, _backend = _backend, new
    return old


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether kernels now run on a GPU of exactly this compute capability."""
    return backend().capability == capability


@contextmanager
def use_backend(new: KernelBackend) -> Iterator[KernelBackend]:
    """`set_backend` for the time of a `with` block."""
    old = set_backend(new)
    try:
        yield new
    finally:
        set_backend(old)


def launch(
    source: str, name: str, grid: int | tuple[int, ...], block: int | tuple[int, ...], args: Sequence[Any], *,
    shared_bytes: int = 0, defines: Sequence[str] = (), pdl: bool = False, stream: Any = None,
) -> None:
    """Start the extern "C" kernel `name` of the file `source` in `cutp/ops` (or an absolute path).

    grid, block: blocks and threads per block, up to three numbers. args: in the kernel's order, arrays (passed as
    pointers), NumPy scalars (np.int32(n), np.float32(x)), structs as size-one NumPy arrays or scalars of a
    structured or V dtype (by value), None (a null pointer), a TensorMap (for `const __grid_constant__ TensorMap`).
    shared_bytes: dynamic shared memory, above 48 KB too. defines: the variant, "NAME=VALUE" or "NAME", as declared in
    the file. pdl: programmatic dependent launch: the kernel may start before its predecessor in the stream has ended
    and must execute griddepcontrol.wait; without effect where the hardware has no such thing. stream: the current one
    if None.

    Returns at once; errors inside the kernel show up at the next synchronisation. An empty grid does nothing.
    Raises ConfigError for arguments that cannot work, KernelCompileError, DeviceError.
    """
    # The width of a bare number is anybody's guess, and a wrong one shifts all arguments after it.
    if not _BARE_NUMBERS.isdisjoint(map(type, args)):
        i, kind = next((i, type(arg)) for i, arg in enumerate(args) if type(arg) in _BARE_NUMBERS)
        raise ConfigError(f"kernel {name}: argument {i} is a bare {kind.__name__}: use np.int32, np.float32, ...")
    settled = _settled(name, grid, block, shared_bytes, tuple(defines))
    if settled is None:
        return
    grid3, block3, defines = settled
    if stream is None:
        backend().launch(source, name, grid3, block3, args, shared_bytes, defines, pdl)
    else:
        with stream:
            backend().launch(source, name, grid3, block3, args, shared_bytes, defines, pdl)


@lru_cache(maxsize=16384)
def _settled(name: str, grid: int | tuple[int, ...], block: int | tuple[int, ...], shared_bytes: int,
             defines: tuple[str, ...]) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[str, ...]] | None:
    """Grid, block and defines as the backend gets them, checked once; None for an empty grid."""
    grid3, block3 = _three(grid, "grid", name), _three(block, "block", name)
    if shared_bytes < 0:
        raise ConfigError(f"kernel {name}: shared_bytes is {shared_bytes}")
    return None if 0 in grid3 else (grid3, block3, canonical_defines(defines))


def _three(size: int | tuple[int, ...], what: str, name: str) -> tuple[int, int, int]:
    given = (size,) if not isinstance(size, tuple) else size
    smallest = 0 if what == "grid" else 1
    if not 1 <= len(given) <= 3 or any(int(n) != n or n < smallest for n in given):
        raise ConfigError(f"kernel {name}: {what} {size!r} is not one to three numbers of at least {smallest}")
    x, y, z = (*(int(n) for n in given), 1, 1)[:3]
    return x, y, z
