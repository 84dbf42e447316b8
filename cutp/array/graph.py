"""Streams, and CUDA graphs captured from them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from cutp.array import cuda
from cutp.errors import ClosedError, ConfigError, DeviceError

_this_thread = threading.local()


class Stream:
    """A stream of the current GPU that does not wait for the default stream. `with stream:` makes it current.

    `cupy` is CuPy's stream, `ptr` the cudaStream_t.
    """

    def __init__(self) -> None:
        self.cupy = cuda.cupy().cuda.Stream(non_blocking=True)

    @property
    def ptr(self) -> int:
        return self.cupy.ptr

    def synchronize(self) -> None:
        """Wait for all that was started on this stream. DeviceError if a kernel on it failed."""
        try:
            self.cupy.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"a kernel or copy on the GPU failed: {error}",
                              hint="CUDA_LAUNCH_BLOCKING=1 shows which one") from error

    def __enter__(self) -> Stream:
        self.cupy.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cupy.__exit__(kind, error, traceback)


class Graph:
    """Kernels captured once, to be launched together many times. Made by `capture`.

    It holds what its kernels use (the arrays passed to `launch` and `linear` meanwhile, and what was given to
    `keep`), so that this memory is not given to others while the graph can still write to it.
    """

    def __init__(self, stream: Stream):
        self.stream = stream
        self._executable: Any = None
        self._kept: list[Any] = []

    def keep(self, *objects: Any) -> None:
        """Hold these as long as the graph lives."""
        self._kept.extend(objects)

    def launch(self, stream: Stream | None = None) -> None:
        """Start the graph on `stream`, by default the one it was captured from. Returns at once."""
        self._ready().launch((stream or self.stream).cupy)

    def upload(self) -> None:
        """Send the graph to the GPU ahead of its first launch."""
        self._ready().upload(self.stream.cupy)

    def dot(self) -> str:
        """The graph's nodes and edges in the language of Graphviz, for looking at it."""
        return self._ready().debug_dot_str()

    def close(self) -> None:
        """Give up the graph and what it holds, once its last launch has ended. May be called again."""
        if self._executable is not None:
            self.stream.synchronize()
        self._executable, self._kept = None, []

    def _ready(self) -> Any:
        if self._executable is None:
            raise ClosedError("this graph was not captured to its end, or was closed")
        return self._executable


@contextmanager
def capture(stream: Stream) -> Iterator[Graph]:
    """`with capture(stream) as graph:` records what the body starts on `stream`, which is current in it; nothing runs.

    The body may not allocate device memory (DeviceError: use an Arena, and `out=`), read device values on the host
    or wait. Run it once before, so that its kernels are loaded. If it raises, the graph is dropped and the stream
    can be used again.
    """
    if getattr(_this_thread, "graph", None) is not None:
        raise ConfigError("a graph is being captured by this thread already")
    cupy = cuda.cupy()
    graph = Graph(stream)
    # Relaxed: other threads and libraries may call whatever they like meanwhile.
    with stream, cupy.cuda.using_allocator(_refuse_allocation):
        stream.cupy.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        _this_thread.graph = graph
        try:
            yield graph
        except BaseException:
            with suppress(RuntimeError):  # the capture may be broken already, which the error is about
                stream.cupy.end_capture()
            raise
        else:
            graph._executable = _end(stream)
        finally:
            _this_thread.graph = None


def keep_for_capture(objects: Iterable[Any]) -> None:
    """Have the graph that this thread is capturing, if any, hold these."""
    graph = getattr(_this_thread, "graph", None)
    if graph is not None:
        graph.keep(*objects)


def captured_graph() -> Graph | None:
    """The graph that this thread is capturing, if any."""
    return getattr(_this_thread, "graph", None)


def is_capturing() -> bool:
    """Whether this thread is inside `capture`."""
    return captured_graph() is not None


def _end(stream: Stream) -> Any:
    try:
        return stream.cupy.end_capture()
    except RuntimeError as error:
        raise DeviceError(
            f"the graph cannot be captured: {error}",
            hint="something in it waits for the GPU, copies to the host or uses the default stream",
        ) from error


def _refuse_allocation(size: int) -> Any:
    # The pool would hand the memory to others afterwards, while the graph still writes to it.
    raise DeviceError(f"{size} bytes of device memory were asked for while capturing a graph",
                      hint="allocate in an Arena before, and pass out=")
