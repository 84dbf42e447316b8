"""Times collectives between ranks: `mpirun -n 2 python -m cutp.bench.collectives [--sizes 8K 1M] [--device cpu]`.

On GPUs the calls run in a CUDA graph, as in decoding, and one by one; on the CPU one by one. The time is that of the
slowest rank. Bus bandwidth is what every link carries, comparable between numbers of ranks: for n ranks and S bytes in
t, 2 (n - 1) / n * S / t for all_reduce and (n - 1) / n * S / t for all_gather and reduce_scatter, S being the bytes of
the larger side. Sums of two ranks are checked.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from cutp.array import cuda
from cutp.array.device import select_device
from cutp.array.dtypes import COMPUTE_DTYPES
from cutp.array.graph import Stream, capture
from cutp.comm import Communicator, world
from cutp.errors import ConfigError, CutpError

OPS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
SIZES = ("8", "1K", "8K", "16K", "32K", "64K", "128K", "256K", "1M", "4M", "16M", "64M", "256M")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Timing:
    """One call of `op` on `bytes` bytes (of the larger side): us one by one and in a graph (None on the CPU), GB/s and
    bus GB/s of the faster of the two."""

    op: str
    bytes: int
    ranks: int
    us: float
    graph_us: float | None
    gbps: float
    bus_gbps: float


def parse_size(text: str) -> int:
    """"8K" -> 8192. ConfigError for anything else than a positive whole number with K, M, G or nothing."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not digits.isdecimal() or int(digits) < 1:
        raise ConfigError(f"size {text!r} is not a number of bytes such as 512, 8K or 16M")
    return int(digits) * _UNITS[unit]


def bus_factor(op: str, ranks: int) -> float:
    """What a link carries for each byte of the larger side."""
    return {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0}.get(op, (ranks - 1) / ranks)


class Bench:
    """The arrays and clocks of one rank."""

    def __init__(self, comm: Communicator, dtype: np.dtype, on_gpu: bool):
        self.comm, self.dtype, self.on_gpu = comm, dtype, on_gpu
        self.xp: Any = cuda.cupy() if on_gpu else np

    def call(self, op: str, nbytes: int) -> tuple[Callable[[], Any], int]:
        """A function that makes the call once, and the bytes of its larger side."""
        comm, n = self.comm, self.comm.size
        count = max(1, nbytes // self.dtype.itemsize)
        if op in ("all_gather", "reduce_scatter"):
            count = max(n, count // n * n)
        x = self.xp.asarray(np.ones(count, self.dtype))
        out = self.xp.empty(count, self.dtype)
        part = count // n
        start = part * comm.rank
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: comm.all_reduce(x, out=out),
            "all_gather": lambda: comm.all_gather(x[:part], 0, sizes=(part,) * n, out=out),
            "reduce_scatter": lambda: comm.reduce_scatter(x, 0, out=out[start : start + part]),
            "broadcast": lambda: comm.broadcast(x, 0, out=out),
        }
        return calls[op], count * self.dtype.itemsize

    def measure(self, op: str, nbytes: int, repeats: int) -> Timing:
        """Collective."""
        call, nbytes = self.call(op, nbytes)
        result = call()
        if float(result[-1]) != (self.comm.size if op in ("all_reduce", "reduce_scatter") else 1):
            raise CutpError(f"{op} of {nbytes} bytes gives {float(result[-1])}", rank=self.comm.rank)
        inner = max(1, min(100, int(2e8 // max(nbytes, 1))))
        if not self.on_gpu:
            inner = min(inner, 20)
        us = self._slowest([self._once(call, inner) for _ in range(repeats + 1)][1:])
        graph_us = self._slowest(self._in_graph(call, inner, repeats)) if self.on_gpu else None
        best = us if graph_us is None else min(us, graph_us)
        gbps = nbytes / best / 1e3
        return Timing(op, nbytes, self.comm.size, us, graph_us, gbps, gbps * bus_factor(op, self.comm.size))

    def _once(self, call: Callable[[], Any], inner: int) -> float:
        """Microseconds a call, started one by one."""
        if self.on_gpu:
            self.comm.wait()
        self.comm.barrier()
        began = time.perf_counter()
        for _ in range(inner):
            call()
        if self.on_gpu:
            self.comm.wait()
        return (time.perf_counter() - began) / inner * 1e6

    def _in_graph(self, call: Callable[[], Any], inner: int, repeats: int) -> list[float]:
        cupy = self.xp
        stream = Stream()
        with stream:
            call()
            self.comm.wait(stream)
        with capture(stream) as graph:
            for _ in range(inner):
                call()
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        times = []
        with stream:
            for _ in range(repeats + 1):
                self.comm.barrier()
                begin.record(stream.cupy)
                graph.launch()
                end.record(stream.cupy)
                self.comm.wait(stream)
                times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / inner)
        graph.close()
        return times[1:]

    def _slowest(self, times: list[float]) -> float:
        return max(self.comm.host.all_gather_json(median(times)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cutp.bench.collectives", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS[:3]))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="bytes, with K, M or G")
    parser.add_argument("--dtype", choices=sorted(COMPUTE_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args(argv)
    sizes = [parse_size(text) for text in args.sizes]
    with world() as comm:
        if comm.size < 2:
            raise ConfigError("collectives need ranks", hint="mpirun -n 2 python -m cutp.bench.collectives")
        on_gpu = select_device(args.device, comm.local_rank).is_gpu()
        bench = Bench(comm, COMPUTE_DTYPES[args.dtype], on_gpu)
        if comm.rank == 0 and not args.json:
            print(_title(comm, args.dtype, on_gpu), flush=True)
        for op in args.ops:
            for size in sizes:
                timing = bench.measure(op, size, args.repeats)
                if comm.rank == 0:
                    print(json.dumps(asdict(timing)) if args.json else _line(timing), flush=True)


def _title(comm: Communicator, dtype: str, on_gpu: bool) -> str:
    what = "CPU"
    if on_gpu:
        version = cuda.nccl().get_version()
        what = f"{cuda.device_info().name}, NCCL {version // 10000}.{version // 100 % 100}.{version % 100}"
    return f"{comm.size} ranks on {len(set(comm.hosts))} hosts, {what}, {dtype}"


def _line(t: Timing) -> str:
    graph = "" if t.graph_us is None else f"{t.graph_us:9.1f} us in a graph"
    return f"{t.op:14s} {t.bytes:11d} bytes {t.us:9.1f} us {graph} {t.gbps:8.2f} GB/s, bus {t.bus_gbps:8.2f} GB/s"


if __name__ == "__main__":
    main()
