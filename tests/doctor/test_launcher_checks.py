"""Launcher and MPI library, from made-up facts and from this environment."""

import os
import subprocess
import sys

import pytest

from cutp.doctor import launcher
from cutp.doctor.launcher import judge_gpu_aware, judge_launcher, judge_mpi, judge_threads, probe_launcher
from tests.doctor.jobs import assert_finding, job


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("PMI", "HYDI", "MPI", "OMPI_", "PMIX_", "SLURM_", "MV2_", "PALS_", "FLUX_", "JSM_")):
            monkeypatch.delenv(name)


def launched(env, monkeypatch):
    for pair in env.split():
        monkeypatch.setenv(*pair.split("="))
    return probe_launcher(job("a"))


@pytest.mark.parametrize(("env", "ranks", "status", "parts"), [
    ("", 1, "OK", ["none: one rank (mpirun -n N"]),
    ("SLURM_NTASKS=8 SLURM_PROCID=0", 1, "OK", ["one rank, in a Slurm job of 8 tasks"]),
    ("SLURM_NTASKS=1", 1, "OK", ["none: one rank (mpirun"]),
    ("PMI_SIZE=2 PMI_RANK=0 PMI_FD=9", 2, "OK", ["2 ranks", "PMI_SIZE=2", "over PMI"]),
    ("OMPI_COMM_WORLD_SIZE=1 PMIX_RANK=0", 1, "OK", ["1 rank,", "over PMIx"]),
    ("PMIX_RANK=0", 3, "OK", ["3 ranks over PMIx", "does not say"]),
    ("PMI_SIZE=4 PMI_RANK=0", 2, "FAIL", ["started 4 ranks (PMI_SIZE=4)", "connects 2", "--mpi=pmix"]),
    ("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0", 1, "FAIL", ["started 4 ranks (SLURM_STEP_NUM_TASKS=4)", "connects 1"]),
])
def test_launchers(monkeypatch, env, ranks, status, parts):
    facts = [launched(env, monkeypatch)] * ranks
    finding = judge_launcher(job(*["a"] * ranks), facts)
    assert_finding(finding, status, *parts, ranks=range(ranks) if status == "FAIL" else ())


MPI = {"mpi4py": "4.1.2", "library": "MPICH 5", "standard": "5.0", "problem": None}


@pytest.mark.parametrize(("changes", "status", "parts", "ranks"), [
    ([{}, {}], "OK", ["MPICH 5 (MPI 5.0), mpi4py 4.1.2"], ()),
    ([{}, {}, {"mpi4py": "4.0.0"}], "FAIL", ["mpi4py is 4.1.2 on ranks 0-1, 4.0.0 on rank 2"], [2]),
    ([{}, {"library": "Open MPI"}, {}], "FAIL", ["the MPI library is", "Open MPI on rank 1"], [1]),
    ([{}, {"standard": "4.1"}, {}], "FAIL", ["MPI standard"], [1]),
    ([{"mpi4py": None}], "WARN", ["mpi4py is not installed", "cutp[mpich]"], ()),
    ([{"problem": "cannot load MPI library"}], "WARN", ["cannot load MPI library", "one rank only"], ()),
])
def test_mpi_libraries(changes, status, parts, ranks):
    facts = [MPI | change for change in changes]
    assert_finding(judge_mpi(job(*"abc"[:len(facts)]), facts), status, *parts, ranks=ranks)


def test_the_library_is_asked_without_starting_it(monkeypatch):
    pytest.importorskip("mpi4py")
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    facts = launcher.probe_mpi(job("a"))
    assert "mpi4py.MPI" not in sys.modules
    if facts["problem"] is None:
        assert facts["library"] and facts["mpi4py"].count(".") == 2 and float(facts["standard"]) >= 3
        asked = subprocess.run([sys.executable, "-c", launcher._ASK + "print(MPI.Is_initialized())"], text=True,
                               capture_output=True, stdin=subprocess.DEVNULL, timeout=40, check=False)
        assert asked.stdout.endswith("}\nFalse\n"), asked


@pytest.mark.parametrize(("program", "part"), [
    ("import os; os.write(2, b'Attempting to use an MPI routine\\n'); os.abort()", "Attempting to use"),
    ("raise SystemExit(3)", "exit status 3")])
def test_a_library_that_crashes(monkeypatch, program, part):
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    monkeypatch.setattr(launcher, "_ASK", program)
    assert_finding(judge_mpi(job("a"), [launcher.probe_mpi(job("a"))]), "WARN", part)


def test_thread_levels():
    assert_finding(judge_threads(job(*"ab"), ["MULTIPLE"] * 2), "OK", "MULTIPLE")
    assert_finding(judge_threads(job(*"ab"), ["SERIALIZED"] * 2), "OK", "SERIALIZED")
    assert_finding(judge_threads(job(*"ab"), ["MULTIPLE", "FUNNELED"]), "WARN", "FUNNELED", ranks=[1])
    assert_finding(judge_threads(job(*"ab"), ["SINGLE", "MULTIPLE"]), "WARN", "SINGLE", ranks=[0])


@pytest.mark.parametrize(("env", "status"), [
    ("", "OK"), ("MPICH_GPU_SUPPORT_ENABLED=0", "OK"), ("MPICH_GPU_SUPPORT_ENABLED=1", "WARN"),
    ("MPIR_CVAR_ENABLE_GPU=no", "OK"), ("MPIR_CVAR_ENABLE_GPU=1", "WARN"), ("MV2_USE_CUDA=1", "WARN")])
def test_gpu_aware_mpi(monkeypatch, env, status):
    for name in launcher._GPU_AWARE:
        monkeypatch.delenv(name, raising=False)
    for pair in env.split():
        monkeypatch.setenv(*pair.split("="))
    found = launcher.probe_gpu_aware(job("a"))
    finding = judge_gpu_aware(job("a", "b"), [[], found])
    if status == "OK":
        assert_finding(finding, "OK", "host buffers only")
    else:
        assert_finding(finding, "WARN", env, f"unset {env.partition('=')[0]}", "deadlocks", ranks=[1])
