"""`cutp doctor` of one process: text, JSON, exit status, and the traps that the environment can set."""

import json
import re
import subprocess
import sys

import pytest

from cutp.array import cuda
from cutp.doctor import checks, software
from cutp.doctor.check import Check
from cutp.doctor.report import fail, ok, warn
from tests.mpirun import clean_environment

LINE = re.compile(r"(OK  |WARN|FAIL) ([a-z-]+( [a-z-]+)*): \S.*")
MPI_ONLY = {"launcher", "mpi", "gpu-aware mpi", "software", "settings", "ranks", "cpu affinity", "blas threads",
            "limits"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: False)


def doctor(*argv, env=None, before=""):
    """`cutp doctor` in a process of its own, which runs the code `before` first."""
    code = f"import os, sys, time\n{before}\nfrom cutp.cli.main import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, "doctor", *argv], capture_output=True, text=True, timeout=40,
                          env=clean_environment(env), stdin=subprocess.DEVNULL, check=False)


def test_text(cli):
    done = cli("doctor")
    assert (done.code, done.err) == (0, ""), done
    *lines, summary = done.out.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    names = [line[5:].partition(":")[0] for line in lines]
    assert set(names) - {"mpi threads"} == MPI_ONLY | {"kernel cache", "gpu"} and len(names) == len(set(names))
    assert "models run on the CPU: there is no NVIDIA driver" in done.out
    counts = re.fullmatch(r"(\d+) OK, (\d+) WARN, 0 FAIL in \d+\.\d s", summary)
    assert counts and int(counts[1]) + int(counts[2]) == len(lines)


def test_mpi_only(cli, monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: pytest.fail("the GPU was asked for"))
    done = cli("doctor", "--mpi-only", "--json")
    assert {check["name"] for check in done.json[0]["checks"]} - {"mpi threads"} == MPI_ONLY


def assert_schema(report):
    assert set(report) == {"cutp", "size", "hosts", "exit_code", "seconds", "checks"}
    assert isinstance(report["hosts"], list) and len(report["hosts"]) == report["size"] >= 1
    assert report["exit_code"] == (7 if any(c["status"] == "FAIL" for c in report["checks"]) else 0)
    assert isinstance(report["seconds"], float) and isinstance(report["cutp"], str)
    for check in report["checks"]:
        assert set(check) == {"name", "status", "message", "fix", "ranks"}
        assert check["status"] in ("OK", "WARN", "FAIL") and check["name"] and check["message"]
        assert (check["fix"] is None) == (check["status"] == "OK")
        assert all(isinstance(rank, int) and 0 <= rank < report["size"] for rank in check["ranks"])


def test_json(cli):
    done = cli("doctor", "--json")
    [report] = done.json
    assert done.code == 0 and done.out.count("\n") == 1
    assert_schema(report)
    assert report["size"] == 1 and {"gpu", "mpi"} <= {check["name"] for check in report["checks"]}


def only(monkeypatch, *findings):
    given = tuple(Check(f.name, lambda job: None, lambda job, facts, f=f: f) for f in findings)
    monkeypatch.setattr(checks, "launcher", type("Room", (), {"CHECKS": given}))
    for room in ("software", "host"):
        monkeypatch.setattr(checks, room, type("Room", (), {"CHECKS": ()}))


def test_exit_status(cli, monkeypatch):
    only(monkeypatch, ok("a", "fine"), warn("b", "hm", "do"))
    done = cli("doctor", "--mpi-only")
    assert done.code == 0 and done.out.startswith("OK   a: fine\nWARN b: hm. Fix: do\n1 OK, 1 WARN, 0 FAIL in ")
    only(monkeypatch, fail("a", "bad", "mend"))
    done = cli("doctor", "--mpi-only")
    assert (done.code, done.err) == (7, "") and done.out.startswith("FAIL a: bad. Fix: mend\n0 OK, 0 WARN, 1 FAIL in ")
    assert cli("doctor", "--mpi-only", "--json").json[0]["exit_code"] == 7


def test_a_check_that_raises_leaves_no_traceback(cli, monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: 1 / 0)
    done = cli("doctor", "--mpi-only")
    assert (done.code, done.err) == (7, "") and "Traceback" not in done.out
    assert "FAIL software: rank 0: ZeroDivisionError: division by zero" in done.out and "OK   settings" in done.out


@pytest.mark.parametrize("value", ["0", "-1", "x", "inf", "nan", "1e9"])
def test_bad_timeout(cli, value):
    cli("doctor", "--timeout", value).assert_error(2, "--timeout", value)


def test_a_setting_that_cannot_be_read(cli, monkeypatch):
    monkeypatch.setenv("CUTP_COMM_TIMEOUT", "soon")
    done = cli("doctor", "--mpi-only")
    assert done.code == 7 and "FAIL settings: CUTP_COMM_TIMEOUT='soon'" in done.out and done.out.count("FAIL ") == 2


def test_help(cli):
    done = cli("doctor", "--help")
    assert done.code == 0 and "7 a check failed" in done.out and "mpirun -n 2 cutp doctor" in done.out


@pytest.mark.parametrize("env", ["OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_RANK=0",
                                 "SLURM_STEP_NUM_TASKS=3 SLURM_PROCID=0", "PALS_SIZE=3 PALS_RANKID=0"])
def test_singleton_trap(env):
    done = doctor("--mpi-only", env=dict(pair.split("=") for pair in env.split()))
    assert (done.returncode, done.stderr) == (7, ""), done
    first = done.stdout.splitlines()[0]
    assert first.startswith("FAIL launcher: the launcher started 3 ranks") and "Fix: launch with the mpirun" in first
    assert env.split()[0] in first and "OK   software" in done.stdout


def test_only_the_first_of_the_trapped_speaks():
    env = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}
    done = doctor("--mpi-only", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    done = doctor("--mpi-only", "--json", env=env | {"OMPI_COMM_WORLD_RANK": "0"})
    report = json.loads(done.stdout)
    assert_schema(report)
    assert done.returncode == 7 and report["checks"][0]["name"] == "launcher" and report["size"] == 1


def test_without_mpi4py():
    done = doctor("--mpi-only", before="sys.modules['mpi4py'] = None", env={"PMI_SIZE": "2", "PMI_RANK": "0"})
    assert (done.returncode, done.stderr) == (7, ""), done
    assert done.stdout.startswith("FAIL launcher: the launcher started 2 ranks (PMI_SIZE=2), but mpi4py is not inst")


def test_a_check_that_hangs_ends_the_process():
    done = doctor("--mpi-only", "--timeout", "1", before="from cutp.doctor import software\n"
                  "software.platform.python_version = lambda: time.sleep(60)")
    assert (done.returncode, done.stderr) == (7, ""), done
    assert "FAIL software: rank 0: no answer within 1 s" in done.stdout and "OK   limits" in done.stdout


def test_the_watch_over_mpi_init():
    """A process that ends, or hangs, inside MPI is reported by another one."""
    for act, part in (("os._exit(9)", "this process ended inside MPI_Init"), ("time.sleep(60)", "takes more than 1 s")):
        before = f"from cutp.doctor import connect\nconnect.world = lambda: {act}"
        for options in ([], ["--json"]):
            done = doctor("--timeout", "1", *options, before=before, env={"PMI_SIZE": "2", "PMI_RANK": "0"})
            assert done.returncode != 0 and done.stderr == "" and part in done.stdout, done
            if options:
                assert_schema(json.loads(done.stdout))
            else:
                assert done.stdout.startswith("FAIL launcher: the launcher started 2 ranks (PMI_SIZE=2), and ")


def test_no_watch_without_a_launcher(cli, monkeypatch):
    from cutp.doctor import connect

    monkeypatch.setattr(connect, "_watched", lambda *args: pytest.fail("a watch was set"))
    assert cli("doctor", "--mpi-only").code == 0
