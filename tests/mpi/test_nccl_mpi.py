"""NCCL between real GPUs: results, deadlines, failures, and that every job ends. Needs a GPU and mpirun.

Where there is only one GPU both ranks share it: NCCL, its kernels and captured calls are the same, but data go through
the network instead of from GPU to GPU.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from cutp.array import cuda
from tests.mpirun import needs_mpirun, run_mpi

PROGRAM = Path(__file__).resolve().parent / "programs" / "nccl_cases.py"
REASON = cuda.unavailable_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"{REASON}"), needs_mpirun]
MUST_SHARE = REASON is None and cuda.cupy().cuda.runtime.getDeviceCount() == 1


def run(what, *args, n=2, timeout=120, module=(), share=MUST_SHARE, **env):
    """Exit status, the lines of each rank, stderr and the seconds it took."""
    began = time.monotonic()
    env["CUTP_SHARE_GPU"] = "1" if share else "0"
    done = run_mpi(n, [sys.executable, *module, PROGRAM, what, *args], timeout=timeout, env=env)
    lines = {r: [] for r in range(n)}
    for rank, text in re.findall(r"^\[(\d+)\] [\d.]+ (.*)$", done.stdout, re.M):
        lines[int(rank)].append(text)
    return done.returncode, lines, done, time.monotonic() - began


def test_results():
    status, _, done, _ = run("results")
    assert status == 0, done.stderr
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert report["equal"] and report["results"] > 200


def test_deadline_names_the_missing_rank():
    _, lines, done, seconds = run("deadline", CUTP_COMM_TIMEOUT="3")
    assert "CommTimeoutError" in lines[0][0] and "did not end on GPU" in lines[0][0], done.stdout + done.stderr
    assert "for rank 1 (host" in lines[0][0] and "CommTimeoutError" in lines[0][1] and seconds < 60


@pytest.mark.parametrize("case", ["raises", "raises_in_a_graph"])
def test_a_rank_that_raises_ends_the_job_with_its_traceback(case):
    status, lines, done, seconds = run(case, module=("-m", "mpi4py"))
    assert status != 0 and seconds < 40
    assert "ZeroDivisionError: a bug in rank 1" in done.stderr
    assert all("PeerFailedError" in line and "a bug in rank 1" in line for line in lines[0][:1])


def test_a_rank_that_is_killed_ends_the_job():
    status, _, _, seconds = run("killed")
    assert status != 0 and seconds < 40


def test_out_of_step():
    _, lines, done, _ = run("out_of_step")
    assert "CommError" in lines[0][0] and "all_reduce(float32[10" in lines[0][0], done.stdout + done.stderr


def test_many_communicators():
    status, lines, done, _ = run("setups", "40", timeout=300)
    assert status == 0, done.stderr
    for rank in (0, 1):
        report = json.loads(lines[rank][0])
        assert report["lost"] < 64 << 20 and report["seconds"] < 5, report


def test_a_communicator_left_open_does_not_hang_at_exit():
    status, lines, done, seconds = run("left_open", timeout=90)
    assert status == 0 and lines == {0: ["left"], 1: ["left"]} and seconds < 60, done.stderr


def test_two_ranks_on_one_gpu():
    _, lines, done, _ = run("one_gpu", share=False)
    assert all("DeviceMappingError" in lines[r][0] and "use the same GPU 0" in lines[r][0] for r in (0, 1)), done.stderr


def test_two_ranks_that_share_a_gpu():
    _, lines, done, _ = run("one_gpu", share=True)
    assert all(lines[r][0] == "fine" for r in (0, 1)), done.stdout + done.stderr
