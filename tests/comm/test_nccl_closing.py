"""The end of communicators with GPUs, in order and out of it."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cutp.array.graph import Stream, capture
from cutp.comm import nccl_link
from cutp.errors import ClosedError
from tests.comm.nccl_ranks import SOON, outcomes, sum_and_wait

ROOT = Path(__file__).resolve().parents[2]


def test_closing_in_order_twice(cupy):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        stream = Stream()
        with stream:
            comm.all_reduce(x, out=x)
        with capture(stream) as graph:
            comm.all_reduce(x, out=x)
        with stream:
            graph.launch()
            comm.all_reduce(x, out=x)
        close = graph.close
        graph.close = lambda: (gpu.log.append("graph"), close())
        gpu.log.clear()
        comm.close()
        comm.close()
        assert cupy.download(x).tolist() == [8.0] * 4, "what was started had not ended"
        with pytest.raises(ClosedError):
            comm.all_reduce(x)
        with pytest.raises(ClosedError):
            comm.wait()
        return gpu.log, graph._executable

    for result, _, _ in outcomes(cupy, 2, body):
        assert result == (["graph", "synchronize", "destroy"], None)


def test_a_graph_that_was_given_up_before_is_not_touched(cupy):
    def body(comm, gpu):
        x = cupy.upload(np.ones(4, np.float32))
        comm.all_reduce(x, out=x)
        with capture(Stream()) as graph:
            comm.all_reduce(x, out=x)
        graph.close()
        link = comm._collectives._link
        assert list(link._graphs) == [graph]
        del graph
        gc.collect()
        assert list(link._graphs) == []
        return True

    assert all(result is True for result, _, _ in outcomes(cupy, 2, body))


def test_closing_with_work_that_never_ends(cupy, monkeypatch):
    left = threading.Event()  # by rank 1, whose work ends: it has time

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        if comm.rank == 0:
            comm.all_reduce(cupy.upload(np.ones(4, np.float32)))  # rank 1 does not
            assert left.wait(SOON)
            monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", 0.3)
        comm.close()
        left.set()
        return gpu.log

    logs = [result for result, seconds, _ in outcomes(cupy, 2, body) if seconds < SOON]
    assert [log[-1] for log in logs] == ["abort", "destroy"] and "destroy" not in logs[0]


def test_closing_when_destroying_hangs(cupy, caplog, monkeypatch):
    monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", 0.3)

    def prepare(gpu):
        gpu.hangs = {"destroy"}

    def body(comm, gpu):
        sum_and_wait(comm, cupy)
        link = comm._collectives._link
        assert link._has_ended(SOON)
        link._has_ended = lambda limit: True  # a busy machine may need longer to find that out
        comm.close()
        return "closed"

    for result, seconds, _ in outcomes(cupy, 2, body, prepare):
        assert result == "closed" and seconds < SOON
    assert "could not be destroyed within 0.3 s on GPU" in caplog.text


def test_many_communicators_one_after_another(cupy):
    def body(comm, gpu):
        for _ in range(20):
            with comm.split(0) as part:
                sum_and_wait(part, cupy)
        comm.barrier()
        return [c.destroyed for c in gpu.comms], len(nccl_link._links)

    for result, _, _ in outcomes(cupy, 2, body):
        assert result == ([True] * 20, 0)


AT_EXIT = """
import sys, threading
import numpy as np, pytest
from cutp.comm import nccl_link
from cutp.comm.communicator import Communicator
from cutp.comm.threads import _Group, ThreadTransport
from tests.comm.fake_nccl import fake_cupy
nccl_link._ABORT_SECONDS = 1.0 if {"late", "hang"} & set(sys.argv) else 20.0
nccl_link._WARM_UP_SIZES = (2, 16)
hold = []
group = _Group(2)
patch = pytest.MonkeyPatch()
context = fake_cupy(patch)
cupy = context.__enter__()
def rank(r):
    comm = Communicator(ThreadTransport(group, r, 120.0))
    hold.append(comm)
    with cupy.gpu(r) as gpu:
        if "hang" in sys.argv:
            gpu.hangs = {"abort", "destroy"}
        comm.all_reduce(cupy.upload(np.ones(3)))
        comm.wait()
        if r == 0 and "late" in sys.argv:
            comm.all_reduce(cupy.upload(np.ones(3)))
each = [threading.Thread(target=rank, args=(r,)) for r in (0, 1)]
[t.start() for t in each]
[t.join() for t in each]
import atexit
print("left", flush=True)
if "no_threads" in sys.argv:
    def refuse(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")
    threading.Thread.start = refuse
# Called after what was registered later, which is cutp's own.
atexit.unregister(nccl_link._leave_at_exit)
atexit.register(lambda: print(sorted({e for g in cupy.gpus.values() for e in g.log} - {"synchronize"}), flush=True))
atexit.register(nccl_link._leave_at_exit)
"""


@pytest.mark.parametrize("case", ["well", "late", "hang", "no_threads"])
def test_a_communicator_that_is_left_open_does_not_hang_at_exit(case, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(AT_EXIT)
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, program, case], capture_output=True, text=True, timeout=30, env=env,
                          check=False)
    assert done.returncode == 0 and done.stderr.count("Traceback") == 0, done.stderr
    left = "['abort', 'destroy']" if case == "late" else "['destroy']"
    assert done.stdout.splitlines() == ["left", left], done.stdout
