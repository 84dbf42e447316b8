"""`cutp doctor` under mpirun: one voice, all ranks compared, and no rank that can hold it up."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.cli.test_doctor import LINE, assert_schema
from tests.mpirun import needs_mpirun, run_mpi

pytestmark = needs_mpirun

PROGRAM = Path(__file__).resolve().parent / "programs" / "doctor_failures.py"


def doctor(n, *options, what=None, **env):
    """Exit status, stdout, stderr, seconds."""
    began = time.monotonic()
    program = [sys.executable, "-m", "cutp"] if what is None else [sys.executable, PROGRAM, what]
    done = run_mpi(n, [*program, "doctor", "--mpi-only", *options], timeout=50, env=env)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


@pytest.mark.parametrize("n", [1, 3])
def test_a_job(n):
    code, out, err, seconds = doctor(n)
    *lines, summary = out.splitlines()
    assert (code, err) == (0, "") and seconds < 35 and all(LINE.fullmatch(line) for line in lines), out
    assert lines[0] == f"OK   launcher: {n} rank{'s' if n > 1 else ''}, as the launcher says (PMI_SIZE={n}) over PMI"
    assert ("1 MB over 3 ranks is right" in out) == (n == 3) and " 0 FAIL in " in summary
    assert sum(line.startswith("OK   mpi: ") for line in lines) == 1


def test_json():
    code, out, err, _ = doctor(3, "--json")
    report = json.loads(out)
    assert_schema(report)
    assert (code, err, report["size"], len(report["hosts"])) == (0, "", 3, 3)


def failure(what, *options, n=3):
    code, out, err, seconds = doctor(n, "--json", *options, what=what)
    report = json.loads(out)
    assert_schema(report)
    assert "Traceback" not in out + err
    return code, report, {check["name"]: check for check in report["checks"]}, seconds


def test_other_versions_on_one_rank():
    code, _, checks, _ = failure("other_version")
    assert code == 7 and checks["software"]["status"] == "FAIL" and checks["software"]["ranks"] == [1]
    assert "9.9.9 on rank 1" in checks["software"]["message"] and checks["host all-reduce"]["status"] != "FAIL"


def test_an_exception_on_one_rank():
    code, _, checks, seconds = failure("raising")
    assert code == 7 and checks["software"]["message"] == "rank 1: ZeroDivisionError: division by zero"
    assert checks["software"]["ranks"] == [1] and checks["host all-reduce"]["status"] != "FAIL" and seconds < 35


def test_wrong_sums_on_one_rank():
    code, _, checks, _ = failure("wrong_sum")
    assert code == 7 and "262144 of 262144 sums are wrong on rank 1" in checks["host all-reduce"]["message"]


def test_environment_of_one_rank():
    code, _, checks, _ = failure("crowded")
    assert code == 0 and checks["gpu-aware mpi"]["status"] == "WARN" and checks["gpu-aware mpi"]["ranks"] == [1]


def test_a_hang_on_one_rank():
    code, _, checks, seconds = failure("hanging", "--timeout", "2")
    assert code == 7 and checks["software"]["message"] == "rank 1: no answer within 2 s" and seconds < 35
    assert checks["host all-reduce"]["status"] != "FAIL"


def test_a_hang_in_a_collective_check():
    code, _, checks, seconds = failure("hanging_all_reduce", "--timeout", "1", n=2)
    assert code == 7 and "for rank 1" in checks["host all-reduce"]["message"] and seconds < 35


def test_a_rank_that_holds_pythons_lock():
    code, report, checks, seconds = failure("unstoppable", "--timeout", "1")
    assert code != 0 and report["exit_code"] == 7 and seconds < 35
    assert "the ranks cannot talk to each other" in checks["software"]["message"]
    assert "for rank 1 (host " in checks["software"]["message"]


def test_rank_0_that_holds_pythons_lock():
    """Nobody can print the report; the other ranks say why the job ends."""
    code, out, err, seconds = doctor(3, "--timeout", "1", what="unstoppable", FAILING_RANK="0")
    assert code != 0 and seconds < 35 and "Traceback" not in out + err
    assert "FAIL software: the ranks cannot talk to each other" in err and "for rank 0 (host " in err


def test_a_rank_that_ends():
    """The launcher ends the job: nothing may hang, and what was found until then is there."""
    code, out, err, seconds = doctor(3, "--timeout", "5", what="dying")
    assert code != 0 and seconds < 35 and "OK   launcher" in out and "Traceback" not in out + err


def test_a_rank_that_ends_and_nobody_sees_it():
    """The launcher may not look, or be dead itself: the other ranks end the job, and say whom they wait for."""
    code, report, checks, seconds = failure("dying_unnoticed", "--timeout", "1")
    assert code == report["exit_code"] == 7 and seconds < 35
    assert "the ranks cannot talk to each other" in checks["cpu affinity"]["message"]
    assert re.search(r"waited [4-9]\.\d s for rank 1 \(host ", checks["cpu affinity"]["message"])


def test_a_rank_that_ends_in_mpi_init():
    code, _, _, seconds = doctor(3, "--timeout", "3", what="dying_at_start")
    assert code != 0 and seconds < 35
