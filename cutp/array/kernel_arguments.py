"""Arguments of kernels as a launch takes them: CuPy's, and the driver's own."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cutp.array.tensor_map import TensorMap
from cutp.errors import ConfigError

_ALIGNMENT = 16  # of every argument: the strictest that a kernel's parameter can have
# NumPy's characters for these types mean the same to `struct`.
_NUMBERS = {np.dtype(code).type: code for code in "?bBhHiIlLqQefd"}
_POINTER = "Q"


def plain_argument(arg: Any) -> Any:
    """`arg` as CuPy takes it: a CuPy array, a NumPy scalar, a size-one array. ConfigError for what no kernel takes."""
    if arg is None:
        return np.uint64(0)
    if isinstance(arg, np.ndarray):
        if arg.size != 1:
            raise ConfigError(f"a NumPy array of shape {arg.shape} cannot be passed to a GPU kernel, only a CuPy array")
        return arg
    if isinstance(arg, TensorMap):
        if isinstance(arg.array, np.ndarray):
            raise ConfigError(f"a TensorMap of a NumPy array of shape {arg.array.shape} cannot be passed to a GPU "
                              "kernel, only one of a CuPy array")
        return arg.encoded()
    if isinstance(arg, np.generic) and arg.dtype.isbuiltin != 1:
        return np.array([arg], dtype=arg.dtype)  # a struct, or a scalar of a type of ml_dtypes
    return arg


class PackedArguments:
    """Memory with the bytes of all arguments and, behind them, the address of each.

    `addresses`: where those lie, which cuLaunchKernel calls kernelParams. Valid until `release`, which must follow.
    """

    def __init__(self, packing: _Packing, size: int, starts: Sequence[int]):
        self._packing = packing
        self.memory = (ctypes.c_char * (_ALIGNMENT + size + 8 * max(1, len(starts))))()
        begin = ctypes.addressof(self.memory)
        self.offset = -begin % _ALIGNMENT
        self.addresses = begin + self.offset + size
        for i, start in enumerate(starts):
            ctypes.c_uint64.from_address(self.addresses + 8 * i).value = begin + self.offset + start

    def release(self) -> None:
        """The next launch with arguments of these types may use the memory."""
        self._packing.free.append(self)


def pack_arguments(args: Sequence[Any]) -> PackedArguments:
    """The arguments of a kernel, by value. A pass over a short prompt takes as long as the host needs to start its
    kernels, so the memory is laid out once for arguments of the same types, and used again."""
    types = tuple(map(type, args))
    packing = _packings.get(types)
    if packing is None:
        packing = _packings[types] = _Packing(types, ())
    values = list(args)
    for i in packing.pointers:
        values[i] = values[i].data.ptr
    for i in packing.nulls:
        values[i] = 0
    if packing.structs:
        for i in packing.structs:
            values[i] = plain_argument(values[i]).tobytes()
        packing = packing.of_sizes(tuple(len(values[i]) for i in packing.structs))
    try:
        packed = packing.free.pop()
    except IndexError:  # other threads are using all there are
        packed = packing.new()
    packing.write(packed.memory, packed.offset, *values)
    return packed


class _Packing:
    """Where arguments of certain types lie. `free` is memory that no thread is using: taking from and adding to a list
    are single steps, so no lock is needed."""

    def __init__(self, types: tuple[type, ...], struct_bytes: tuple[int, ...]):
        self._types = types
        self.free: list[PackedArguments] = []
        kinds = [_kind(t) for t in types]
        self.pointers, self.nulls, self.structs = (
            tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in ("pointer", "null", "struct"))
        self._of_sizes: dict[tuple[int, ...], _Packing] = {}
        codes = [_NUMBERS.get(t, _POINTER) for t in types]
        for i, size in zip(self.structs, struct_bytes, strict=False):
            codes[i] = f"{size}s"
        sizes = [struct.calcsize(code) for code in codes]
        steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._starts = [sum(steps[:i]) for i in range(len(steps))]
        self._size = sum(steps)
        self.write = struct.Struct("@" + "".join(f"{code}{step - size}x" for code, size, step in
                                                 zip(codes, sizes, steps, strict=True))).pack_into

    def of_sizes(self, struct_bytes: tuple[int, ...]) -> _Packing:
        """The same with structs of these sizes, which their types do not tell."""
        found = self._of_sizes.get(struct_bytes)
        if found is None:
            found = self._of_sizes[struct_bytes] = _Packing(self._types, struct_bytes)
        return found

    def new(self) -> PackedArguments:
        return PackedArguments(self, self._size, self._starts)


_packings: dict[tuple[type, ...], _Packing] = {}


def _kind(argument: type) -> str:
    """What an argument of this type is to a kernel: "pointer", "null", "number" or "struct"."""
    if argument is type(None):
        return "null"
    if argument in _NUMBERS:
        return "number"
    return "struct" if issubclass(argument, (np.generic, np.ndarray, TensorMap)) else "pointer"
