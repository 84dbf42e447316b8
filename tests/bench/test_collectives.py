"""The measurement of collectives, on the CPU."""

import json
import sys

import numpy as np
import pytest

from cutp import run_threads
from cutp.bench import collectives
from cutp.errors import ConfigError, CutpError
from tests.mpirun import needs_mpirun, run_mpi


def test_sizes():
    assert [collectives.parse_size(text) for text in ("8", "8K", "3m", "1G")] == [8, 8192, 3 << 20, 1 << 30]
    for text in ("", "K", "0", "-1", "8T", "1.5K", "8KB"):
        with pytest.raises(ConfigError, match="not a number of bytes"):
            collectives.parse_size(text)


@pytest.mark.parametrize("op, ranks, factor", [("all_reduce", 2, 1.0), ("all_reduce", 8, 1.75), ("all_gather", 4, 0.75),
                                               ("reduce_scatter", 2, 0.5), ("broadcast", 3, 1.0)])
def test_bus_factor(op, ranks, factor):
    assert collectives.bus_factor(op, ranks) == factor


def test_measuring_on_three_ranks():
    def body(comm):
        bench = collectives.Bench(comm, np.dtype(np.float32), False)
        return [bench.measure(op, 1000, 2) for op in collectives.OPS]

    for timings in run_threads(3, body):
        assert [(t.op, t.bytes, t.ranks, t.graph_us) for t in timings] == [
            ("all_reduce", 1000, 3, None), ("all_gather", 996, 3, None), ("reduce_scatter", 996, 3, None),
            ("broadcast", 1000, 3, None)]
        for t in timings:
            assert t.us > 0 and t.gbps == pytest.approx(t.bytes / t.us / 1e3)
            assert t.bus_gbps == pytest.approx(t.gbps * collectives.bus_factor(t.op, 3))


def test_a_wrong_sum_is_an_error():
    def body(comm):
        bench = collectives.Bench(comm, np.dtype(np.float32), False)
        comm.all_reduce = lambda x, out=None: x
        with pytest.raises(CutpError, match="all_reduce of 8 bytes gives 1.0"):
            bench.measure("all_reduce", 8, 1)

    run_threads(2, body)


@needs_mpirun
def test_the_program():
    done = run_mpi(2, [sys.executable, "-m", "cutp.bench.collectives", "--device", "cpu", "--sizes", "8", "1K",
                       "--repeats", "1", "--json"])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["op"], line["bytes"]) for line in lines] == [
        (op, size) for op in ("all_reduce", "all_gather", "reduce_scatter") for size in (8, 1024)]
