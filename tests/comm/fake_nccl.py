"""CuPy's streams, events, graphs and NCCL without a GPU: a rank is a thread, a stream a queue with a thread of its own.

What is started on a stream runs later, in the stream's order; so a missing event shows as a wrong or hanging result,
and a collective that a rank never joins keeps its stream busy until it is aborted, as on a GPU. Arrays are host memory
of a class of their own. Collectives add in rank order, in float32 for 16-bit floats.
"""

import contextlib
import ctypes
import itertools
import math
import queue
import threading
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from cutp.array import cuda
from cutp.comm.collectives import sum_in_rank_order

NOT_READY = 600
TYPES = {"INT8": (0, "i1"), "UINT8": (1, "u1"), "INT32": (2, "i4"), "UINT32": (3, "u4"), "INT64": (4, "i8"),
         "UINT64": (5, "u8"), "FLOAT16": (6, "f2"), "FLOAT32": (7, "f4"), "FLOAT64": (8, "f8"),
         "BFLOAT16": (9, ml_dtypes.bfloat16)}
_DTYPES = {number: np.dtype(kind) for number, kind in TYPES.values()}


class GpuArray(np.ndarray):
    """Device memory: assignments happen in the order of the current stream, and only views may be made of it."""

    def __setitem__(self, key, value):
        assert np.isscalar(value) or type(value) is GpuArray
        raw = value.view(np.ndarray) if type(value) is GpuArray else value
        current().do(lambda: np.ndarray.__setitem__(self.view(np.ndarray), key, raw))

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise AssertionError(f"{ufunc.__name__} on device arrays")

    def __array_function__(self, function, types, args, kwargs):
        raise AssertionError(f"numpy.{function.__name__} on device arrays")


_thread = threading.local()
_numbers = itertools.count(1)


def current():
    if not _thread.streams:
        _thread.streams.append(_thread.gpu.cupy.cuda.Stream())
    return _thread.streams[-1]


class Event:
    def __init__(self, block=False, disable_timing=False):
        self.ptr = next(_numbers)
        self.reached = threading.Event()
        self.reached.set()
        self.graph = None
        _events[self.ptr] = self

    def record(self, stream):
        stream.record(self)


_events = {}


class Stream:
    def __init__(self, non_blocking=False):
        self.ptr = next(_numbers)
        self.graph, self.error = None, 0
        self._work = queue.SimpleQueue()
        self.gpu = _thread.gpu
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self):
        _thread.streams.append(self)
        return self

    def __exit__(self, *_):
        assert _thread.streams.pop() is self

    def _run(self):
        while True:
            try:
                self._work.get()()
            except Exception as error:
                self.error = self.error or 700
                self.gpu.cupy.problems.append(error)

    def do(self, work):
        """Start `work()` on this stream, or have it captured."""
        if self.graph is None:
            self._work.put(work)
        else:
            self.graph.work.append((self, work))

    def record(self, event=None):
        event = event or Event()
        if self.graph is not None:
            event.graph, event.stream, event.place = self.graph, self, len(self.graph.work)
            return event
        event.graph = None
        reached = event.reached = threading.Event()
        self._work.put(reached.set)
        return event

    def wait_event(self, event):
        if event.graph is not None:
            assert self.graph is None or self.graph is event.graph, "an event of another capture"
            assert not event.graph.ended, "an event recorded in a capture that has ended"
            self.graph = event.graph
            self.graph.streams.add(self)
            self.graph.joins.append((event.stream, self, event.place))
            return
        reached = event.reached
        self.do(lambda: reached.wait(60))

    def synchronize(self):
        assert self.graph is None, "waiting for a stream that is captured"
        self.record().reached.wait(60)
        self.gpu.log.append("synchronize")

    def begin_capture(self, mode):
        self.graph = _Captured(self)

    def end_capture(self):
        graph = self.graph
        graph.ended = True
        for stream in graph.streams:
            stream.graph = None
        for stream in graph.streams - {self}:
            last = max((i + 1 for i, (s, _) in enumerate(graph.work) if s is stream), default=0)
            if not any(s is stream and to is self and place >= last for s, to, place in graph.joins):
                raise RuntimeError("cudaErrorStreamCaptureUnjoined")
        return graph


class _Captured:
    def __init__(self, stream):
        self.work, self.streams, self.joins, self.ended = [], {stream}, [], False

    def launch(self, stream):
        for _, work in self.work:
            stream.do(work() if getattr(work, "per_launch", False) else work)


class NcclError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"NCCL_ERROR_{status}")
        self.status = status


class _Clique:
    """What the ranks of one NCCL communicator share."""

    def __init__(self):
        self.changed = threading.Condition()
        self.joined, self.calls, self.mail = set(), {}, {}

    def meet(self, comm, number, mine):
        """What all ranks bring to their `number`th call, in rank order; None once this rank has aborted."""
        with self.changed:
            call = self.calls.setdefault(number, {})
            call[comm.rank] = mine
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(call) == comm.size or comm.aborted, 60)
            return None if comm.aborted else [call[r] for r in range(comm.size)]


class FakeNccl:
    available = True
    NcclError = NcclError
    NCCL_SUM = 0

    def __init__(self):
        self.cliques = {}
        self._lock = threading.Lock()
        self.NcclCommunicator = lambda size, uid, rank: NcclCommunicator(self, size, uid, rank)
        for name, (number, _) in TYPES.items():
            setattr(self, f"NCCL_{name}", number)

    def get_version(self):
        return _thread.gpu.nccl_version

    def get_unique_id(self):
        return next(_numbers).to_bytes(128, "little")

    def clique(self, uid):
        with self._lock:
            return self.cliques.setdefault(uid, _Clique())

    def groupStart(self):
        _thread.group = []

    def groupEnd(self):
        calls, _thread.group = _thread.group, None
        for start in calls:
            start()


def memory(pointer, count, dtype):
    dtype = np.dtype(dtype)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, np.uint8).view(dtype)


class NcclCommunicator:
    def __init__(self, nccl, size, uid, rank):
        self.size, self.rank, self.gpu = size, rank, _thread.gpu
        self.aborted, self.destroyed, self.async_error = False, False, 0
        self._numbers, self.ended = itertools.count(), 0
        self._clique = clique = nccl.clique(uid)
        self.gpu.comms.append(self)
        if self.gpu.refuse == "init":
            raise NcclError(2)
        with clique.changed:
            clique.joined.add(rank)
            clique.changed.notify_all()
            clique.changed.wait_for(lambda: len(clique.joined) == size, 60)

    def _start(self, stream, bring, use):
        """bring() when the call is reached on its stream; use(what all ranks brought) when they are all there."""
        assert not (self.aborted or self.destroyed), "a call on a communicator that is gone"
        if self.gpu.refuse == "call":
            raise NcclError(5)

        def start():
            def launch():
                number = next(self._numbers)

                def run():
                    if number != self.ended:
                        self.gpu.cupy.problems.append(f"call {number} runs beside call {self.ended}")
                    time.sleep(self.gpu.slow)
                    parts = self._clique.meet(self, number, bring())
                    if self.destroyed:
                        self.gpu.cupy.problems.append(f"call {number} ends after the communicator was destroyed")
                    self.ended += 1
                    if parts is not None:
                        if len({head for head, _ in parts}) > 1:
                            self.async_error = 3
                        else:
                            use([data for _, data in parts])

                return run

            stream_object = streams()[stream]
            if stream_object.graph is None:
                stream_object.do(launch())
            else:
                launch.per_launch = True
                stream_object.do(launch)

        self.gpu.calls.append(stream)
        group = getattr(_thread, "group", None)
        start() if group is None else group.append(start)

    def allReduce(self, send, recv, count, dtype, op, stream):
        source, target = memory(send, count, _DTYPES[dtype]), memory(recv, count, _DTYPES[dtype])
        self._start(stream, lambda: (("allReduce", count, dtype, op), source.copy()),
                    lambda parts: sum_in_rank_order(parts, out=target))

    def allGather(self, send, recv, count, dtype, stream):
        source, target = memory(send, count, _DTYPES[dtype]), memory(recv, count * self.size, _DTYPES[dtype])
        self._start(stream, lambda: (("allGather", count, dtype), source.copy()),
                    lambda parts: np.concatenate(parts, out=target))

    def reduceScatter(self, send, recv, count, dtype, op, stream):
        source, target = memory(send, count * self.size, _DTYPES[dtype]), memory(recv, count, _DTYPES[dtype])
        mine = slice(self.rank * count, (self.rank + 1) * count)
        self._start(stream, lambda: (("reduceScatter", count, dtype, op), source.copy()),
                    lambda parts: sum_in_rank_order([part[mine] for part in parts], out=target))

    def broadcast(self, send, recv, count, dtype, root, stream):
        source = memory(send, count, _DTYPES[dtype]) if self.rank == root else None
        target = memory(recv, count, _DTYPES[dtype])
        self._start(stream, lambda: (("broadcast", count, dtype, root), None if source is None else source.copy()),
                    lambda parts: target.__setitem__(slice(None), parts[root]))

    def reduce(self, send, recv, count, dtype, op, root, stream):
        source = memory(send, count, _DTYPES[dtype])
        target = memory(recv, count, _DTYPES[dtype]) if self.rank == root else None
        self._start(stream, lambda: (("reduce", count, dtype, op, root), source.copy()),
                    lambda parts: None if target is None else sum_in_rank_order(parts, out=target))

    def _mailbox(self, source, dest):
        with self._clique.changed:
            return self._clique.mail.setdefault((source, dest), queue.SimpleQueue())

    def send(self, pointer, count, dtype, peer, stream):
        source, box = memory(pointer, count, _DTYPES[dtype]), self._mailbox(self.rank, peer)
        streams()[stream].do(lambda: box.put(source.copy()))

    def recv(self, pointer, count, dtype, peer, stream):
        target, box = memory(pointer, count, _DTYPES[dtype]), self._mailbox(peer, self.rank)
        streams()[stream].do(lambda: target.__setitem__(slice(None), box.get(timeout=60)))

    def check_async_error(self):
        assert not (self.aborted or self.destroyed), "a question to a communicator that is gone"
        if self.async_error == 7:
            raise KeyError(7)
        if self.async_error:
            raise NcclError(self.async_error)

    def abort(self):
        self.gpu.log.append("abort")
        self.gpu.may_hang("abort")
        with self._clique.changed:
            self.aborted = True
            self._clique.changed.notify_all()

    def destroy(self):
        self.gpu.log.append("destroy")
        self.gpu.may_hang("destroy")
        self.destroyed = True


def streams():
    return _thread.gpu.streams


class Gpu:
    """One rank's GPU, and what a test wants to go wrong there."""

    def __init__(self, cupy, rank):
        self.cupy, self.index = cupy, rank
        self.card, self.nccl_version = f"GPU-{rank}", 23203
        self.log, self.calls, self.comms, self.streams = [], [], [], {}
        self.refuse, self.hangs, self.missing, self.slow = None, set(), None, 0

    def may_hang(self, what):
        if what in self.hangs:
            self.cupy.released.wait(60)


class FakeCupy:
    """The module, for as many ranks as ask for a GPU."""

    def __init__(self):
        self.gpus, self.problems, self.kept = {}, [], []
        self.released = threading.Event()
        runtime = SimpleNamespace(
            eventQuery=self._event_query, streamCaptureModeRelaxed=2,
            CUDARuntimeError=lambda status: RuntimeError(f"cudaError {status}"))
        self.cuda = SimpleNamespace(
            Stream=self._stream, Event=Event, get_current_stream=current, nccl=FakeNccl(), runtime=runtime,
            Device=self._device,
            using_allocator=self._using_allocator)

    def _stream(self, non_blocking=False):
        stream = Stream()
        _thread.gpu.streams[stream.ptr] = stream
        return stream

    @contextlib.contextmanager
    def _device(self, index):
        before = getattr(_thread, "gpu", None)
        _thread.gpu = self.gpus[index]
        if not hasattr(_thread, "streams"):
            _thread.streams = []
        try:
            yield
        finally:
            _thread.gpu = before

    def _event_query(self, pointer):
        event = _events[pointer]
        broken = next((s.error for s in _thread.gpu.streams.values() if s.error), 0)
        return broken or (0 if event.reached.is_set() else NOT_READY)

    @contextlib.contextmanager
    def _using_allocator(self, allocate):
        _thread.allocate = allocate
        try:
            yield
        finally:
            _thread.allocate = None

    def empty(self, shape, dtype):
        if getattr(_thread, "allocate", None):
            _thread.allocate(1)
        dtype = np.dtype(dtype)
        raw = np.full(math.prod(np.atleast_1d(shape)) * dtype.itemsize, 0xFF, np.uint8)
        self.kept.append(raw)  # CuPy's pool gives memory back in the order of the stream, Python would do so at once
        return raw.view(dtype).reshape(shape).view(GpuArray)

    def device_info(self):
        gpu = _thread.gpu
        return SimpleNamespace(uuid=gpu.card, pci_bus_id="", index=gpu.index, name="Stand-in")

    def module(self):
        if _thread.gpu.missing:
            raise _thread.gpu.missing
        return self

    @contextlib.contextmanager
    def gpu(self, rank):
        """This thread's GPU, with a stream that is current."""
        _thread.gpu = self.gpus.setdefault(rank, Gpu(self, rank))
        _thread.streams, _thread.group = [], None
        with self._stream():
            yield _thread.gpu

    def upload(self, host):
        """A copy of `host` as a device array."""
        self.kept.append(copy := np.array(host, order="C"))
        return copy.view(GpuArray)

    def download(self, x):
        """x on the host, once what was started on the current stream has ended."""
        assert type(x) is GpuArray, type(x)
        assert current().record().reached.wait(20), "the stream hangs"
        return np.array(x.view(np.ndarray))


@contextlib.contextmanager
def fake_cupy(monkeypatch):
    cupy = FakeCupy()
    monkeypatch.setattr(cuda, "cupy", cupy.module)
    monkeypatch.setattr(cuda, "device_info", cupy.device_info)
    monkeypatch.setattr(cuda, "_import_nccl", lambda: cupy.cuda.nccl)
    try:
        yield cupy
    finally:
        cupy.released.set()
        for gpu in cupy.gpus.values():
            for comm in gpu.comms:
                with comm._clique.changed:
                    comm.aborted = True
                    comm._clique.changed.notify_all()
