"""Collectives on device arrays through NCCL, and on NumPy arrays through the transport: one Communicator serves both.

Calls on device arrays are started on the current CuPy stream and return at once; they may be captured in a graph.
Results lie in `out`, else in the scratch in use, else in new memory.

Which ranks make which calls is checked on the host the first time a rank makes a call with this name, dtype and shape:
NCCL itself would hang or mix up data. A captured graph makes its calls unchecked.

Sums. NCCL adds in the dtype of the arrays, 16-bit floats with a rounding after every addition, in an order that it
chooses by the size of the array and the number of ranks. All ranks get the same bits, and the same call gives the same
bits again. Two ranks get the bits of the host's contract (sum in float32 in rank order, rounded once), because one
addition is rounded once and float32 holds more than twice the bits of the 16-bit types. More ranks do not: each of
n - 1 additions is rounded. Integers are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.array.arena import address
from cutp.array.dtypes import bfloat16
from cutp.array.graph import Graph, captured_graph, keep_for_capture
from cutp.array.scratch import frame
from cutp.comm.collectives import ArrayCollectives, Pending, describe_array
from cutp.comm.device_results import (
    checked_axis,
    contiguous,
    copied,
    copied_to_host,
    is_device_array,
    new_array,
    parts_of,
    result_array,
    span,
    with_size,
)
from cutp.comm.nccl_link import NcclLink
from cutp.comm.partition import split_range
from cutp.comm.transport import Transport
from cutp.errors import ConfigError, DeviceError

# NumPy dtype -> the name of NCCL's type for sums. Everything else is moved as bytes.
_SUM_TYPES = {np.dtype(kind): f"NCCL_{np.dtype(kind).name.upper()}" for kind in (
    np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float16, bfloat16, np.float32, np.float64)}
_CHECKED_CALLS = 4096


class NcclCollectives:
    """The collectives of one communicator. See `Communicator` for the contracts.

    The first call on a device array connects the current GPUs of all ranks.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        self._host = ArrayCollectives(transport)
        self._link: NcclLink | None = None
        self._checked: set[str] = set()
        self._side: Any = None
        self._pending: list[_PendingSum] = []

    # -- collectives -----------------------------------------------------------------------------------

    def all_reduce(self, x: Any, out: Any = None) -> Any:
        if not is_device_array(x):
            return self._host.all_reduce(x, out)
        kind = _sum_type(x, "all_reduce")
        out = result_array(out, x.shape, x.dtype, "all_reduce")
        x = contiguous(x)
        if self._transport.size == 1:
            return copied(x, out)
        if out.size:
            call = f"all_reduce({describe_array(x.dtype, x.shape)})"
            with self._calling(call, x, out) as (comm, nccl, stream):
                comm.allReduce(address(x), address(out), x.size, getattr(nccl, kind), nccl.NCCL_SUM, stream.ptr)
        return out

    def all_reduce_async(self, x: Any, out: Any = None) -> Pending:
        if not is_device_array(x):
            return self._host.all_reduce_async(x, out)
        kind = _sum_type(x, "all_reduce")
        out = result_array(out, x.shape, x.dtype, "all_reduce")
        x = contiguous(x)
        if self._transport.size == 1 or not out.size:
            return _Ready(copied(x, out))
        call = f"all_reduce({describe_array(x.dtype, x.shape)})"
        with self._calling(call, x, out, in_order=False) as (comm, nccl, stream):
            side = self._side_stream(stream)
            comm.allReduce(address(x), address(out), x.size, getattr(nccl, kind), nccl.NCCL_SUM, side.ptr)
            pending = _PendingSum(self, side.record(_event()), x, out)
        self._pending.append(pending)
        return pending

    def all_gather(self, x: Any, axis: int = 0, sizes: Sequence[int] | None = None, out: Any = None) -> Any:
        if not is_device_array(x):
            return copied_to_host(out, self._host.all_gather(x, axis))
        t = self._transport
        axis = checked_axis(x, axis, "all_gather")
        x = contiguous(x)
        agreed = sizes is None
        sizes = self._sizes(x, axis) if sizes is None else tuple(int(n) for n in sizes)
        if len(sizes) != t.size or sizes[t.rank] != x.shape[axis]:
            raise ConfigError(
                f"all_gather: sizes are {sizes} on {t.size} ranks, but x has {x.shape[axis]} on axis {axis}")
        out = result_array(out, with_size(x.shape, axis, sum(sizes)), x.dtype, "all_gather")
        if t.size == 1:
            return copied(x, out)
        if not out.size:
            return out
        call = f"all_gather({describe_array(x.dtype, x.shape, axis)}, sizes={_short(sizes)}, axis={axis})"
        with frame(), self._calling(call, x, out, checked=not agreed) as (comm, nccl, stream):
            # NCCL puts whole parts one after another, which is the result already if nothing lies before the axis.
            in_place = math.prod(x.shape[:axis]) == 1
            joined = out.reshape(-1) if in_place else new_array(out.size, out.dtype)
            parts = parts_of(joined, [with_size(x.shape, axis, n) for n in sizes])
            if len(set(sizes)) == 1:
                comm.allGather(address(x), address(joined), x.nbytes, nccl.NCCL_UINT8, stream.ptr)
            else:
                with _group(nccl):
                    for r, part in enumerate(parts):
                        if part.size:
                            source = x if r == t.rank else part
                            comm.broadcast(address(source), address(part), part.nbytes, nccl.NCCL_UINT8, r, stream.ptr)
            if not in_place:
                start = 0
                for part, n in zip(parts, sizes, strict=True):
                    if n:
                        out[span(axis, start, start + n)] = part
                    start += n
        return out

    def reduce_scatter(self, x: Any, axis: int = 0, out: Any = None) -> Any:
        if not is_device_array(x):
            return copied_to_host(out, self._host.reduce_scatter(x, axis))
        t = self._transport
        kind = _sum_type(x, "reduce_scatter")
        axis = checked_axis(x, axis, "reduce_scatter")
        x = contiguous(x)
        cuts = [split_range(x.shape[axis], t.size, r) for r in range(t.size)]
        shapes = [with_size(x.shape, axis, stop - start) for start, stop in cuts]
        out = result_array(out, shapes[t.rank], x.dtype, "reduce_scatter")
        if t.size == 1:
            return copied(x, out)
        if not x.size:
            return out
        call = f"reduce_scatter({describe_array(x.dtype, x.shape)}, axis={axis})"
        with frame(), self._calling(call, x, out) as (comm, nccl, stream):
            joined = x.reshape(-1)
            if math.prod(x.shape[:axis]) > 1:
                joined = new_array(x.size, x.dtype)
                for part, cut in zip(parts_of(joined, shapes), cuts, strict=True):
                    if part.size:
                        part[...] = x[span(axis, *cut)]
            parts = parts_of(joined, shapes)
            dtype, add = getattr(nccl, kind), nccl.NCCL_SUM
            if len(set(shapes)) == 1:
                comm.reduceScatter(address(joined), address(out), out.size, dtype, add, stream.ptr)
            else:
                with _group(nccl):
                    for r, part in enumerate(parts):
                        if part.size:
                            target = out if r == t.rank else part  # only root's is written
                            comm.reduce(address(part), address(target), part.size, dtype, add, r, stream.ptr)
        return out

    def broadcast(self, x: Any, root: int = 0, out: Any = None) -> Any:
        if not is_device_array(x):
            return copied_to_host(out, self._host.broadcast(x, root))
        t = self._transport
        root = t.check_peer(root, "broadcast: root", may_be_self=True)
        out = result_array(out, x.shape, x.dtype, "broadcast")
        if t.size == 1:
            return copied(x, out)
        if out.size:
            source = contiguous(x) if t.rank == root else out
            call = f"broadcast({describe_array(x.dtype, x.shape)}, root={root})"
            with self._calling(call, source, out) as (comm, nccl, stream):
                comm.broadcast(address(source), address(out), out.nbytes, nccl.NCCL_UINT8, root, stream.ptr)
        return out

    def send(self, x: Any, dest: int) -> None:
        if not is_device_array(x):
            return self._host.send(x, dest)
        dest = self._transport.check_peer(dest, "send: dest")
        x = contiguous(x)
        if x.size:
            with self._calling("send", x, checked=False) as (comm, nccl, stream):
                comm.send(address(x), x.nbytes, nccl.NCCL_UINT8, dest, stream.ptr)

    def recv(self, source: int, out: Any = None) -> Any:
        if not is_device_array(out):
            return copied_to_host(out, self._host.recv(source))
        source = self._transport.check_peer(source, "recv: source")
        out = result_array(out, out.shape, out.dtype, "recv")
        if out.size:
            with self._calling("recv", out, checked=False) as (comm, nccl, stream):
                comm.recv(address(out), out.nbytes, nccl.NCCL_UINT8, source, stream.ptr)
        return out

    # -- waiting and the end ---------------------------------------------------------------------------

    def connect(self) -> None:
        """Collective: connects the current GPUs of all ranks, if they are not."""
        if self._transport.size > 1:
            self._linked()

    def wait(self, what: Any = None) -> None:
        what = _current_stream() if what is None else getattr(what, "cupy", what)
        if self._link is not None:
            self._link.wait(what)
            return
        try:
            what.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"a kernel or copy on the GPU failed: {error}",
                              hint="CUDA_LAUNCH_BLOCKING=1 shows which one") from error

    def close(self) -> None:
        """Leave NCCL. Needs no peers, never raises, may be called again."""
        self._pending.clear()
        if self._link is not None:
            self._link.close()

    # -- how a call is made ----------------------------------------------------------------------------

    def _linked(self) -> NcclLink:
        if self._link is None:
            self._link = NcclLink.join(self._transport)
        return self._link

    @contextmanager
    def _calling(self, call: str, *arrays: Any, in_order: bool = True,
                 checked: bool = True) -> Iterator[tuple[Any, Any, Any]]:
        """(communicator, nccl, stream) for the call, which uses `arrays`."""
        link = self._linked()
        link.check()
        if checked and call not in self._checked:
            self._check(call)
        graph = captured_graph()
        keep_for_capture(arrays)
        stream = _current_stream()
        link.used(stream, graph)
        if in_order and self._pending:
            # Calls of one communicator run in the order in which they were made, whatever their streams.
            self._pending = [pending for pending in self._pending if pending.graph is graph]
            if self._pending:
                stream.wait_event(self._pending[-1].done)
        with link.calling(call) as comm:
            yield comm, link.nccl, stream

    def _check(self, call: str) -> None:
        """Whether all ranks make this call, the first time that it is made; ranks in step have the same memory."""
        t = self._transport
        t.exchange(f"{call} on GPUs", t.next_tag(), dict.fromkeys(t.peers, np.empty(0, np.uint8)), t.peers)
        if len(self._checked) >= _CHECKED_CALLS:
            self._checked.clear()
        self._checked.add(call)

    def _sizes(self, x: Any, axis: int) -> tuple[int, ...]:
        """x.shape[axis] of all ranks."""
        t = self._transport
        mine = np.array(x.shape[axis])
        call = f"all_gather({describe_array(x.dtype, x.shape, axis)}, axis={axis}) on GPUs"
        got = t.exchange(call, t.next_tag(), dict.fromkeys(t.peers, mine), t.peers)
        return tuple(int(mine if r == t.rank else got[r]) for r in range(t.size))

    def _side_stream(self, stream: Any) -> Any:
        """A second stream, once it will have waited for what was started on `stream`."""
        if self._side is None:
            self._side = cuda.cupy().cuda.Stream(non_blocking=True)
        self._side.wait_event(stream.record(_event()))
        self._linked().used(self._side, captured_graph())
        return self._side

    def finished(self, pending: _PendingSum) -> None:
        self._pending = [other for other in self._pending if other is not pending]


class _PendingSum:
    """A sum on the second stream. It holds what NCCL reads and writes."""

    def __init__(self, owner: NcclCollectives, done: Any, x: Any, out: Any):
        self.graph: Graph | None = captured_graph()
        self.done = done
        self._owner, self._x, self._out = owner, x, out

    def wait(self) -> Any:
        """What is started on the current stream from now on finds the sum; the host does not wait."""
        _current_stream().wait_event(self.done)
        self._owner.finished(self)
        return self._out


class _Ready:
    def __init__(self, result: Any):
        self._result = result

    def wait(self) -> Any:
        return self._result


@contextmanager
def _group(nccl: Any) -> Iterator[None]:
    """Calls that NCCL starts as one."""
    nccl.groupStart()
    try:
        yield
    finally:
        nccl.groupEnd()


def _current_stream() -> Any:
    return cuda.cupy().cuda.get_current_stream()


def _event() -> Any:
    return cuda.cupy().cuda.Event(disable_timing=True)


def _sum_type(x: Any, what: str) -> str:
    kind = _SUM_TYPES.get(x.dtype)
    if kind is None:
        raise ConfigError(f"{what}: dtype {x.dtype} cannot be summed by NCCL",
                          hint=f"it sums {', '.join(dtype.name for dtype in _SUM_TYPES)}")
    return kind


@lru_cache(maxsize=256)
def _short(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else str(list(sizes))
