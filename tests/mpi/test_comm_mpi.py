"""The communicator on real MPI processes: results, deadlines, failures, and that every job ends."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from cutp.comm import run_threads
from tests.comm import collective_cases
from tests.mpirun import needs_mpirun, run_mpi

PROGRAMS = Path(__file__).resolve().parent / "programs"

pytestmark = needs_mpirun

# A job in which something fails ends within SOON, however busy the machine is. One in which a rank waits for another
# for ever is ended by run_mpi after a longer time, which is an error.
SOON = 30


def run(n, what, *args, timeout=40, **env):
    """Exit status, the lines of each rank, stderr and the seconds it took."""
    began = time.monotonic()
    done = run_mpi(n, [sys.executable, PROGRAMS / "comm_failures.py", what, *args], timeout=timeout, env=env)
    lines = {r: [] for r in range(n)}
    for rank, text in re.findall(r"^\[(\d+)\] [\d.]+ (.*)$", done.stdout, re.M):
        lines[int(rank)].append(text)
    return done.returncode, lines, done.stderr, time.monotonic() - began


def waited(line):
    return float(re.match(r"waited ([\d.]+) ", line)[1])


def error(line):
    return re.sub(r"^waited [\d.]+ ", "", line)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_collectives_against_numpy_and_threads(n):
    done = run_mpi(n, [sys.executable, PROGRAMS / "comm_cases.py"])
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [r[:3] for r in reports] == [[rank, rank, n] for rank in range(n)]
    assert [r[3] for r in reports] == run_threads(n, collective_cases.run_all)


@pytest.mark.parametrize(("n", "elements", "limit"), [(2, 3, 2), (2, 1_000_000, 1), (3, 3, 1)])
def test_deadline_names_the_missing_rank(n, elements, limit, tmp_path):
    _, lines, _, _ = run(n, "deadline", str(elements), CUTP_COMM_TIMEOUT=str(limit), OVER=str(tmp_path))
    first = [lines[r][0] for r in range(n) if r != 1]
    assert any("CommTimeoutError" in line for line in first)
    for line in first:
        assert re.search(rf"all_reduce\(float32\[{elements}\]\) waited \d+\.\d s for rank 1 \(host ", line), line
        assert limit - 0.1 < waited(line) < limit + 10
    # The second call does not wait again: it has the error of the first.
    assert all(error(lines[r][1]) == error(lines[r][0]) for r in range(n) if r != 1)


def test_deadline_while_duplicating_a_communicator(tmp_path):
    _, lines, _, _ = run(2, "deadline_of_construction", CUTP_COMM_TIMEOUT="1", OVER=str(tmp_path))
    assert "CommTimeoutError" in lines[0][0] and "every rank" in lines[0][0]


@pytest.mark.parametrize("n", [2, 3])
def test_fail_wakes_the_peers(n):
    status, lines, stderr, _ = run(n, "fail")
    assert status == 0, stderr
    assert "CommError rank 1: this rank has reported that it failed: ValueError: no more" in lines[1][0]
    for r in range(n):
        if r != 1:
            for line in lines[r]:
                told = r"PeerFailedError (world )?rank 1:? failed on host \S+: ValueError: no more"
                assert re.search(told, line), line
            assert waited(lines[r][0]) < 20 and waited(lines[r][1]) < 10


def test_exception_in_agree_ends_the_job():
    status, _, stderr, seconds = run(3, "exception_in_agree")
    assert status != 0 and seconds < SOON
    assert 'in exception_in_agree\n    raise ZeroDivisionError("a bug in rank 1")' in stderr
    assert stderr.count("\nZeroDivisionError: a bug in rank 1") >= 1
    peers = re.findall(r"PeerFailedError: rank 1: failed on host \S+: ZeroDivisionError: a bug in rank 1", stderr)
    assert len(peers) == 2 or status != 1, "a launcher that kills the job early may cut this short"


def test_leaving_a_with_block_ends_the_job():
    status, _, stderr, seconds = run(2, "interrupted")
    assert status != 0 and seconds < SOON and "KeyError: 'left'" in stderr


def test_agree():
    status, lines, stderr, _ = run(3, "agree")
    assert status == 0, stderr
    for r in range(3):
        assert all("ConfigError rank 1: bad value on 1" in line for line in lines[r][:3]) and lines[r][3] == "sum 3"


@pytest.mark.parametrize("what", ["kind", "small-large", "large", "host", "send"])
def test_ranks_out_of_step(what):
    status, lines, stderr, seconds = run(2, "mismatch", what)
    text = " ".join(lines[0] + lines[1])
    assert "CommError" in text and "this rank called" in text and seconds < SOON
    assert all("Error" in lines[r][1] for r in (0, 1)), "both ranks must be told"
    assert status == 0, stderr


def test_user_communicator_is_duplicated():
    status, lines, stderr, _ = run(3, "user_communicator")
    assert status == 0, stderr
    assert sorted(lines[r][-1] for r in range(3)) == ["total 3 0"] * 3
    assert sorted(lines[r][0].split()[0] for r in range(3)) == ["alone", "null", "null"]


def test_sub_communicator_while_others_are_busy_elsewhere():
    status, lines, stderr, _ = run(4, "busy_elsewhere")
    assert status == 0, stderr
    assert [lines[r] for r in range(4)] == [["worked"], ["worked"], ["done"], []]


@pytest.mark.parametrize("what", ["many_calls", "chunks", "dropped_handles"])
def test_tags_chunks_and_dropped_handles(what):
    status, _, stderr, _ = run(2, what)
    assert status == 0, stderr


def test_abort():
    status, _, _, seconds = run(2, "aborted")
    assert status != 0 and seconds < SOON


def test_blas_threads_are_shared():
    pytest.importorskip("threadpoolctl")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    none = {"OMP_NUM_THREADS": "", "OPENBLAS_NUM_THREADS": "", "MKL_NUM_THREADS": ""}
    _, lines, stderr, _ = run(2, "blas_share", **none)
    shares = json.loads(lines[0][0].removeprefix("share "))
    assert all(s <= max(1, cores // 2) for s in shares), (lines, stderr)
