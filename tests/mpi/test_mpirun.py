"""tests/mpirun.py itself: what a job that hangs leaves in the report, and that it leaves nothing else."""

import re
import sys
import time
from pathlib import Path

import pytest

from tests.mpirun import needs_mpirun, run_mpi

pytestmark = needs_mpirun

# A process that is in no group nor session of the job's, and without a parent as soon as the job ends.
PROGRAM = """
import subprocess, time
print(subprocess.Popen(["sleep", "61"], start_new_session=True).pid, flush=True)
time.sleep(60)
"""


def test_a_job_that_hangs_is_described_and_killed():
    with pytest.raises(AssertionError, match=r"^still running after 5 s: .*mpirun") as raised:
        run_mpi(2, [sys.executable, "-c", PROGRAM], timeout=5)
    text = str(raised.value)
    _, processes, rest = re.split("--- processes|--- stdout", text)
    children = [int(line) for line in rest.splitlines() if line.isdigit()]
    assert len(children) == 2 and all(f"{child}: sleep 61: S " in processes for child in children), text
    described = [int(line.partition(":")[0]) for line in processes.strip().splitlines()]
    assert len(described) >= 5  # mpirun, two ranks, two children
    end = time.monotonic() + 10
    while alive := [pid for pid in described if _is_alive(pid)]:
        assert time.monotonic() < end, alive
        time.sleep(0.01)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
