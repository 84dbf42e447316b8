"""Hosts, cores, limits, versions and settings, from made-up facts and from this process."""

import json
import os
import re
import resource
from pathlib import Path

import pytest

from cutp import Communicator, __version__
from cutp.doctor import host, software
from cutp.doctor.check import Job
from tests.doctor.jobs import assert_finding, job


def ranks(*cores, local=None):
    return [{"cores": list(c), "local_size": local or len(cores), "pid": rank} for rank, c in enumerate(cores)]


def test_ranks_and_hosts():
    assert_finding(host.judge_ranks(job("a", "a", "b"), ranks([0, 1], [0, 1], [0], local=2)), "WARN",
                   "node of rank 2", ranks=[2])
    facts = ranks([0, 1], [0, 1], [0])
    for rank, local in enumerate((2, 2, 1)):
        facts[rank]["local_size"] = local
    assert_finding(host.judge_ranks(job("a", "a", "b"), facts), "OK",
                   "3 on 2 hosts: a: ranks 0-1, 2 cores; b: rank 2, 1 core")
    assert_finding(host.judge_ranks(job(*"aaa"), ranks([0, 1], [1], [0])), "WARN", "3 ranks share 2 cores of a",
                   ranks=[0, 1, 2])
    assert_finding(host.judge_ranks(job("a"), ranks([0])), "OK", "1 on 1 host: a: rank 0, 1 core")


@pytest.mark.parametrize(("cores", "count", "status", "parts", "bad"), [
    (([0, 1], [2, 3]), 4, "OK", ["cores of its own"], ()),
    (([0, 1, 2, 3],) * 2, 4, "OK", ["share all its cores"], ()),
    (([0, 1], [1, 2]), 4, "WARN", ["ranks 0-1 share some", "--bind-to"], [0, 1]),
    (([0, 1, 2, 3], [3]), 4, "WARN", ["share some"], [0, 1]),
    (([0], [1]), 8, "WARN", ["ranks 0-1 may use only one of 8 cores", "--bind-to none"], [0, 1]),
    (([0], [1]), 2, "OK", ["cores of its own"], ()),
    (([0, 1],), 4, "OK", ["may use 2 of 4"], ()),
])
def test_affinity(cores, count, status, parts, bad):
    j = job(*["a"] * len(cores), ranks=ranks(*cores))
    assert_finding(host.judge_affinity(j, [count] * len(cores)), status, *parts, ranks=bad)


def test_affinity_is_about_each_host():
    j = job("a", "b", ranks=ranks([0, 1], [1, 2]))
    assert_finding(host.judge_affinity(j, [2, 2]), "OK")


@pytest.mark.parametrize(("cores", "threads", "status", "bad"), [
    (([0, 1, 2, 3],) * 2, [2, 2], "OK", ()), (([0, 1, 2, 3],) * 2, [4, 4], "WARN", [0, 1]),
    (([0, 1], [2, 3]), [2, 2], "OK", ()), (([0, 1], [2, 3]), [2, 4], "WARN", [1]),
    (([0, 1],) * 3, [1, 1, 1], "OK", ())])
def test_blas_threads(cores, threads, status, bad):
    j = job(*["a"] * len(cores), ranks=ranks(*cores))
    facts = [{"libraries": ["openblas 1"], "threads": n, "chosen": False} for n in threads]
    finding = host.judge_blas(j, facts)
    assert_finding(finding, status, "openblas 1", ranks=bad)
    if status == "WARN":
        assert "OMP_NUM_THREADS=2" in finding.fix


GOOD = {"files": 65536, "locked": None, "shared": 8 << 30}


@pytest.mark.parametrize(("hosts", "change", "status", "part"), [
    ("ab", {}, "OK", "65536 open files, 8.6 GB free in /dev/shm"), ("ab", {"files": 256}, "WARN", "ulimit -n"),
    ("ab", {"files": None, "shared": None}, "OK", "65536"), ("ab", {"shared": 64 << 20}, "WARN", "64 MB are free"),
    ("ab", {"locked": 64 << 10}, "WARN", "64 kB may be locked"), ("aa", {"locked": 64 << 10}, "OK", "")])
def test_limits(hosts, change, status, part):
    finding = host.judge_limits(job(*hosts), [GOOD, GOOD | change])
    assert_finding(finding, status, part, ranks=[1] if status == "WARN" else ())


def test_one_rank_needs_no_shared_memory():
    assert_finding(host.judge_limits(job("a"), [GOOD | {"shared": 1}]), "OK")


def test_what_this_host_says():
    with Communicator.single() as comm:
        here = Job(comm)
        cores = host.probe_ranks(here)
        assert cores["cores"] == sorted(os.sched_getaffinity(0)) and cores["local_size"] == 1
        assert host.probe_affinity(here) == os.cpu_count()
        blas = host.probe_blas(here)
        assert blas["threads"] == 1 and blas["libraries"]  # see tests/conftest.py
        limits = host.probe_limits(here)
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert limits["files"] == (None if soft == resource.RLIM_INFINITY else soft)


SOFTWARE = {"cutp": "1", "python": "3.12.1", "numpy": "2", "ml_dtypes": "0.5", "cupy": ["cupy-cuda13x 14.2.0"],
            "container": None}


@pytest.mark.parametrize(("change", "status", "parts", "bad"), [
    ({}, "OK", ["cutp 1, Python 3.12.1, NumPy 2, ml_dtypes 0.5, cupy-cuda13x 14.2.0"], ()),
    ({"cutp": "2"}, "FAIL", ["cutp is 1 on ranks 0-1, 2 on rank 2"], [2]),
    ({"python": "3.11.0"}, "FAIL", ["Python is"], [2]), ({"numpy": "3"}, "FAIL", ["NumPy is"], [2]),
    ({"cupy": []}, "FAIL", ["CuPy is", "not installed on rank 2"], [2])])
def test_software(change, status, parts, bad):
    facts = [SOFTWARE, SOFTWARE, SOFTWARE | change]
    assert_finding(software.judge_software(job(*"abc"), facts), status, *parts, ranks=bad)


def test_software_of_one_rank():
    two = SOFTWARE | {"cupy": ["cupy-cuda13x 14", "cupy-cuda12x 13"]}
    assert_finding(software.judge_software(job("a"), [two]), "FAIL", "several CuPy", "uninstall")
    none = SOFTWARE | {"cupy": [], "container": "Apptainer"}
    assert_finding(software.judge_software(job("a"), [none]), "OK", "no CuPy, in Apptainer")
    found = software.probe_software(job("a"))
    assert found["cutp"] == __version__ and found["numpy"] and found["python"].startswith("3.")


def test_containers(monkeypatch):
    monkeypatch.setenv("APPTAINER_CONTAINER", "/x.sif")
    assert software._container() == "Apptainer"


@pytest.fixture
def settings(monkeypatch):
    """settings(NAME=value): what this process says of its settings."""
    for name in list(os.environ):
        if name.startswith("CUTP_"):
            monkeypatch.delenv(name)

    def read(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return software.probe_settings(job("a"))

    return read


def test_settings(settings):
    plain = settings()
    assert_finding(software.judge_settings(job("a"), [plain]), "OK", "no CUTP_* variable")
    good = settings(CUTP_SHARE_GPU="1")
    assert_finding(software.judge_settings(job("a"), [good]), "OK", "CUTP_SHARE_GPU=1")
    assert_finding(software.judge_settings(job(*"ab"), [plain, good]), "WARN", "CUTP_SHARE_GPU", "rank 1", ranks=[1])
    unknown = settings(CUTP_SHARED_GPU="1")
    assert_finding(software.judge_settings(job("a"), [unknown]), "WARN", "CUTP_SHARED_GPU", "CUTP_COMM_TIMEOUT")
    bad = settings(CUTP_COMM_TIMEOUT="soon", CUTP_MOE="many")
    finding = software.judge_settings(job(*"ab"), [plain, bad])
    assert_finding(finding, "FAIL", "CUTP_COMM_TIMEOUT='soon'", "CUTP_MOE='many'", ranks=[1])


def test_all_settings_are_known():
    """Whatever variable `cutp.settings` reads is one that the doctor looks at."""
    assert set(re.findall(r"\bCUTP_[A-Z_]+", Path(software.settings.__file__).read_text())) == set(software._SETTINGS)


def test_facts_are_json():
    with Communicator.single() as comm:
        here = Job(comm)
        for check in (*host.CHECKS, *software.CHECKS):
            json.dumps(check.probe(here))
