"""When one rank fails, the whole job ends at once, with the cause in sight."""

import re
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.mpirun import needs_mpirun, run_mpi

PROGRAMS = Path(__file__).resolve().parent / "programs"
COMMAND = ["generate", "-p", "Once upon a time", "--temperature", "0", "--max-tokens", "200", "--ignore-eos"]
HOST = socket.gethostname()

pytestmark = needs_mpirun

# A job in which something fails ends within SOON, however busy the machine is. One in which a rank waits for another
# for ever is ended by run_mpi after a longer time, which is an error.
SOON = 30


def run(n, program, *argv, **env):
    """Exit status, stdout, stderr and the seconds it took."""
    began = time.monotonic()
    done = run_mpi(n, [sys.executable, PROGRAMS / program, *argv], timeout=50, env=env)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def cutp(what, n=3, command=COMMAND, **env):
    return run(n, "cli_failures.py", what, *command, **env)


@pytest.mark.parametrize("what", ["load", "prefill", "decode"])
def test_exception_on_one_rank(what):
    code, _, err, seconds = cutp(what)
    assert code != 0 and seconds < SOON, err
    assert err.startswith(f"[cutp rank 1 of 3 on {HOST}] ZeroDivisionError: a bug on one rank\nTraceback "), err
    assert 'in a_bug\n    raise ZeroDivisionError("a bug on one rank")' in err
    # No other rank has a traceback of its own to show.
    assert err.count("Traceback") == 1


def test_exception_on_rank_0():
    code, out, err, seconds = cutp("decode", command=[*COMMAND, "--stream"], FAILING_RANK="0")
    assert code != 0 and seconds < SOON and out.startswith("Once upon a time there")
    assert err.startswith(f"[cutp rank 0 of 3 on {HOST}] ZeroDivisionError") and "in a_bug" in err


def test_error_at_load_on_one_rank():
    code, out, err, seconds = cutp("load-error")
    assert (code, out, err) == (3, "", "cutp: error: rank 1: damaged for one rank\n") and seconds < SOON


def test_error_in_generation_on_one_rank():
    code, _, err, seconds = cutp("decode-error")
    assert code != 0 and seconds < SOON and "no room on one rank" in err
    assert re.search(rf"rank 1\b.*{HOST}", err)


@pytest.mark.parametrize("what", ["exit", "interrupt", "killed"])
def test_rank_that_goes_away(what):
    code, _, err, seconds = cutp(what)
    assert code != 0 and seconds < SOON, err


@pytest.mark.parametrize(("what", "rank"), [("absent", "1"), ("absent-decode", "1"), ("absent-decode", "0")])
def test_rank_that_never_arrives(what, rank):
    code, _, err, seconds = cutp(what, CUTP_COMM_TIMEOUT="3", FAILING_RANK=rank)
    assert code != 0 and 3 < seconds < SOON, err
    assert re.search(rf"cutp: error: rank [012]: \S.* waited [3-9]\.\d s for rank {rank} \(host {HOST}\)", err), err
    assert "Traceback" not in err


@pytest.mark.parametrize("what", ["bug_in_generate", "bug_between_calls", "bug_in_the_input"])
def test_exception_in_a_program(what):
    code, _, err, seconds = run(3, "library.py", what)
    assert code != 0 and seconds < SOON, err
    assert "\nZeroDivisionError: a bug on one rank" in err
    rank = 0 if what == "bug_in_the_input" else 1
    for line in re.findall(r"^\S*PeerFailedError: .*", err, re.M):
        assert f"rank {rank}: failed on host {HOST}: ZeroDivisionError: a bug on one rank" in line


def test_bad_input_in_a_program():
    code, out, err, _ = run(3, "library.py", "inputs")
    assert code == 0, err
    lines = {r: re.findall(rf"^\[{r}\] (.*)$", out, re.M) for r in range(3)}
    assert lines[0] == lines[1] == lines[2]
    kinds = {line.split()[0]: line.split()[1] for line in lines[0][:-1]}
    assert kinds == {"differs": "InputMismatchError", "params": "InputMismatchError", "missing": "InputMismatchError",
                     "type": "RequestError", "range": "InvalidTokenError"}


def test_models_come_and_go_in_a_program():
    code, out, err, _ = run(2, "library.py", "twice")
    assert code == 0, err
    assert out.count("refused top_k must be an integer") == 4 and out.count("sum 1") == 2
