"""Collectives on NumPy arrays, written once for every transport.

All exchanges are direct (every rank talks to every other), which keeps the summation order fixed and lets a
deadline name the rank that is missing. A sum is always ((r0 + r1) + r2) + ..., element by element, whichever
rank computes it; therefore all ranks hold the same bits, and so do all backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import ml_dtypes
import numpy as np

from cutp.comm.partition import split_range
from cutp.comm.transport import POINT_TO_POINT, Exchange, Transport
from cutp.errors import ConfigError

# Up to this many bytes all ranks exchange whole arrays and each sums all of it (one round of messages);
# above, each rank sums one slice and the sums are exchanged (two rounds, but less to send and to add).
WHOLE_ARRAY_BYTES = 64 * 1024

_SIXTEEN_BIT_FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_SUMMABLE = frozenset(np.dtype(c) for c in "bBhHiIlLqQefd") | {np.dtype(ml_dtypes.bfloat16)}


def sum_in_rank_order(parts: Sequence[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """((parts[0] + parts[1]) + parts[2]) + ..., a new array or `out` (which none of parts[2:] may overlap).

    Sixteen-bit floats are added in float32 and rounded once, at the end. Integers wrap around.
    """
    dtype = parts[0].dtype
    with np.errstate(all="ignore"):
        if dtype in _SIXTEEN_BIT_FLOATS:
            total = parts[0].astype(np.float32)
            for part in parts[1:]:
                np.add(total, part.astype(np.float32), out=total)
            if out is None:
                return total.astype(dtype)
            out[...] = total
            return out
        if len(parts) == 1:
            if out is None:
                return parts[0].copy()
            out[...] = parts[0]
            return out
        if out is None:
            out = np.empty_like(parts[0])
        np.add(parts[0], parts[1], out=out)
        for part in parts[2:]:
            np.add(out, part, out=out)
    return out


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> np.ndarray:
        """The result; call it once, and in the order in which the operations were started."""


class ArrayCollectives:
    """The collectives of one communicator, on NumPy arrays. See `Communicator` for the contracts."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def all_reduce_async(self, x: np.ndarray, out: np.ndarray | None = None) -> Pending:
        x = _summable(x, "all_reduce")
        if out is not None and (not isinstance(out, np.ndarray) or out.shape != x.shape or out.dtype != x.dtype):
            raise ConfigError(f"all_reduce: out must be an array like x, {describe_array(x.dtype, x.shape)}")
        if x.nbytes <= WHOLE_ARRAY_BYTES:
            return _WholeArrayReduce(self._transport, x, out)
        return _SlicedReduce(self._transport, x, out)

    def all_reduce(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return self.all_reduce_async(x, out).wait()

    def all_gather(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        x, axis = _array_with_axis(x, axis, "all_gather")
        t = self._transport
        call = f"all_gather({describe_array(x.dtype, x.shape, ragged=axis)})"
        got = t.exchange(call, t.next_tag(), dict.fromkeys(t.peers, x), t.peers)
        return np.concatenate([x if r == t.rank else got[r] for r in range(t.size)], axis=axis)

    def reduce_scatter(self, x: np.ndarray, axis: int = 0) -> np.ndarray:
        x, axis = _array_with_axis(_summable(x, "reduce_scatter"), axis, "reduce_scatter")
        t = self._transport
        before = (slice(None),) * axis
        cuts = [slice(*split_range(x.shape[axis], t.size, r)) for r in range(t.size)]
        slices = [np.asarray(x[(*before, cut)], order="C") for cut in cuts]
        call = f"reduce_scatter({describe_array(x.dtype, x.shape)}, axis={axis})"
        got = t.exchange(call, t.next_tag(), {r: slices[r] for r in t.peers}, t.peers)
        return sum_in_rank_order([slices[r] if r == t.rank else got[r] for r in range(t.size)])

    def broadcast(self, x: np.ndarray | None, root: int = 0) -> np.ndarray:
        t = self._transport
        root = t.check_peer(root, "broadcast: root", may_be_self=True)
        call = f"broadcast(root={root})"
        if t.rank == root:
            x = _sendable(x, "broadcast")
            t.exchange(call, t.next_tag(), dict.fromkeys(t.peers, x), ())
            return x.copy()
        return _owned(t.exchange(call, t.next_tag(), {}, (root,))[root])

    def send(self, x: np.ndarray, dest: int) -> None:
        t = self._transport
        dest = t.check_peer(dest, "send: dest")
        t.exchange("send/recv", POINT_TO_POINT, {dest: _sendable(x, "send")}, ())

    def recv(self, source: int) -> np.ndarray:
        t = self._transport
        source = t.check_peer(source, "recv: source")
        return _owned(t.exchange("send/recv", POINT_TO_POINT, {}, (source,))[source])


class _WholeArrayReduce:
    """Every rank receives all arrays and sums them."""

    def __init__(self, transport: Transport, x: np.ndarray, out: np.ndarray | None):
        self._rank, self._size, self._x, self._out = transport.rank, transport.size, x, out
        call = _all_reduce_call(x.dtype, x.shape)
        self._exchange = transport.start(
            call, transport.next_tag(), dict.fromkeys(transport.peers, x), transport.peers
        )

    def wait(self) -> np.ndarray:
        got = self._exchange.wait()
        total = sum_in_rank_order([self._x if r == self._rank else got[r] for r in range(self._size)])
        if self._out is None:
            return total
        self._out[...] = total
        return self._out


class _SlicedReduce:
    """Rank r sums slice r of the flattened array; then the ranks exchange the sums."""

    def __init__(self, transport: Transport, x: np.ndarray, out: np.ndarray | None):
        self._transport, self._out, self._shape = transport, out, x.shape
        self._flat = x.reshape(-1)
        self._cuts = [slice(*split_range(x.size, transport.size, r)) for r in range(transport.size)]
        self._call = _all_reduce_call(x.dtype, x.shape)
        self._tag = transport.next_tag()
        self._exchange: Exchange = transport.start(
            self._call, self._tag, {r: self._slice(self._flat, r) for r in transport.peers}, transport.peers
        )

    def _slice(self, flat: np.ndarray, r: int) -> np.ndarray:
        return flat[self._cuts[r]]

    def wait(self) -> np.ndarray:
        t = self._transport
        got = self._exchange.wait()
        out = self._out
        # The sums are written straight into `out` unless it shares memory with addends still to be read.
        direct = out is not None and out.flags.c_contiguous and not np.may_share_memory(out, self._flat)
        flat = out.reshape(-1) if direct else np.empty_like(self._flat)
        mine = self._slice(flat, t.rank)
        parts = [self._slice(self._flat, r) if r == t.rank else got[r] for r in range(t.size)]
        sum_in_rank_order(parts, out=mine)
        into = {r: self._slice(flat, r) for r in t.peers}
        t.exchange(self._call, self._tag, dict.fromkeys(t.peers, mine), t.peers, into)
        result = flat.reshape(self._shape)
        if out is None:
            return result
        if not direct:
            out[...] = result
        return out


@lru_cache(maxsize=4096)
def _all_reduce_call(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"all_reduce({describe_array(dtype, shape)})"


@lru_cache(maxsize=4096)
def describe_array(dtype: np.dtype, shape: tuple[int, ...], ragged: int | None = None) -> str:
    """"float32[2, 8]"; with ragged=0, "float32[*, 8]": a size that may differ between ranks."""
    return f"{dtype.name}[{', '.join('*' if i == ragged else str(n) for i, n in enumerate(shape))}]"


def _sendable(x: np.ndarray, what: str) -> np.ndarray:
    x = np.asarray(x, order="C")
    # kind V holds both structured dtypes and the float types of ml_dtypes; only the latter have a name to find.
    if x.dtype.hasobject or x.dtype.kind not in "?biufcV" or (x.dtype.kind == "V" and x.dtype.name.startswith("void")):
        raise ConfigError(f"{what}: dtype {x.dtype} cannot be sent")
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _summable(x: np.ndarray, what: str) -> np.ndarray:
    x = _sendable(x, what)
    if x.dtype not in _SUMMABLE:
        raise ConfigError(f"{what}: dtype {x.dtype} cannot be summed over ranks")
    return x


def _array_with_axis(x: np.ndarray, axis: int, what: str) -> tuple[np.ndarray, int]:
    x = _sendable(x, what)
    if not -x.ndim <= axis < x.ndim:
        raise ConfigError(f"{what}: an array of {x.ndim} dimensions has no axis {axis}")
    return x, axis % x.ndim


def _owned(x: np.ndarray) -> np.ndarray:
    return x if x.flags.writeable else x.copy()
