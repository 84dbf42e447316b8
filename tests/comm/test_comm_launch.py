"""What a process was started as, told from its environment; and the share of cores for BLAS."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cutp.comm import Communicator, as_communicator, blas, launch, launcher_rank, launcher_size, run_threads, world
from cutp.errors import ConfigError, LauncherMismatchError

CHECKOUT = Path(__file__).resolve().parents[2]
TRACES = ("PMI", "HYDI", "MPI", "OMPI_", "PMIX_", "SLURM_", "MV2_", "PALS_", "FLUX_", "JSM_")
has_mpi4py = importlib.util.find_spec("mpi4py") is not None


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(TRACES):
            monkeypatch.delenv(name)


def set_env(monkeypatch, text):
    for pair in text.split():
        monkeypatch.setenv(*pair.split("="))


@pytest.mark.parametrize(("env", "size", "rank", "launched"), [
    ("", None, None, False),
    ("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3", 4, 3, True),
    ("PMI_SIZE=2 PMI_RANK=1", 2, 1, True),
    ("MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_RANK=0", 2, 0, True),
    ("PMIX_RANK=5", None, 5, True),
    ("PALS_RANKID=1", None, 1, True),
    ("MPI_LOCALNRANKS=2", None, None, True),
    ("FLUX_JOB_SIZE=8 FLUX_TASK_RANK=7", 8, 7, True),
    ("JSM_NAMESPACE_SIZE=6 JSM_NAMESPACE_RANK=2", 6, 2, True),
    ("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=2", 4, 2, True),
    # A batch script on Slurm runs once, whatever the size of the allocation.
    ("SLURM_NTASKS=4 SLURM_PROCID=0", None, None, False),
    ("SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0", None, None, False),
    ("SLURM_STEP_NUM_TASKS=4", None, None, False),
    # mpirun inside a Slurm job step.
    ("SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=2 PMI_SIZE=2 PMI_RANK=1", 2, 1, True),
    ("PMI_SIZE=many PMI_RANK=", None, None, True),
])
def test_environment(monkeypatch, env, size, rank, launched):
    set_env(monkeypatch, env)
    assert (launcher_size(), launcher_rank(), launch.launched()) == (size, rank, launched)


def run_python(code, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(TRACES)}
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), clean.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )


def test_without_launcher_mpi4py_is_not_imported():
    done = run_python(
        "import sys, cutp.comm\n"
        "c = cutp.comm.world()\n"
        "print(c.size, 'mpi4py' in sys.modules)"
    )
    assert done.stdout.split() == ["1", "False"], done.stderr


REPORT = """
from cutp.comm import world
from cutp.errors import LauncherMismatchError
try:
    print("size", world().size)
except LauncherMismatchError as error:
    print("mismatch", error, "|", repr(error.__cause__))
"""
HIDE_MPI4PY = "import sys; sys.modules['mpi4py'] = None\n"


@pytest.mark.skipif(not has_mpi4py, reason="mpi4py is not installed")
@pytest.mark.parametrize(("size", "rank"), [
    ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
])
def test_mismatch_with_mpi_of_one_rank(size, rank):
    done = run_python(REPORT, **{size: "2", rank: "1"})
    assert done.stdout.startswith("mismatch rank 1: the launcher started 2 ranks"), done.stdout + done.stderr
    for part in (f"{size}=2", "mpirun", "--no-binary mpi4py", "--mpi=pmix", "cutp[mpich]"):
        assert part in done.stdout
    assert "MPI library that mpi4py loaded, " in done.stdout or "cannot load an MPI library" in done.stdout


def test_mismatch_without_mpi4py():
    done = run_python(HIDE_MPI4PY + REPORT, PMI_SIZE="3", PMI_RANK="0")
    assert "mismatch" in done.stdout and "3 ranks (PMI_SIZE=3)" in done.stdout and "mpi4py" in done.stdout, done.stderr


@pytest.mark.skipif(not has_mpi4py, reason="mpi4py is not installed")
def test_mismatch_without_an_mpi_library():
    done = run_python(REPORT, PMI_SIZE="2", PMI_RANK="0", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert "mismatch" in done.stdout and "cannot load" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("hide", [HIDE_MPI4PY, ""])
def test_a_launcher_of_one_rank_is_fine_without_mpi(hide):
    done = run_python(hide + REPORT, PMI_SIZE="1", PMI_RANK="0", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert done.stdout == "size 1\n", done.stdout + done.stderr


@pytest.mark.skipif(not has_mpi4py, reason="mpi4py is not installed")
def test_mpi_imported_by_the_program_is_used():
    done = run_python(
        "try:\n    from mpi4py import MPI\n"
        "except Exception:\n    print('no MPI')\n    raise SystemExit\n"
        "from cutp.comm import world, as_communicator\n"
        "c = world(); print(c)\n"
        "d, owned = as_communicator(MPI.COMM_SELF); print(d.size, owned)\n"
        "for bad in (MPI.COMM_NULL, MPI.Intercomm()):\n"
        "    try:\n        as_communicator(bad)\n"
        "    except ValueError as e:\n        print(type(e).__name__)\n"
        "c.close(); d.close(); c.close()\n"
        "MPI.Finalize(); print(world())"
    )
    if done.stdout == "no MPI\n":
        pytest.skip("no MPI library")
    assert done.stdout.splitlines() == [
        "<Communicator mpi rank 0 of 1>", "1 True", "ConfigError", "ConfigError", "<Communicator single rank 0 of 1>"
    ], done.stderr


def test_as_communicator():
    comm = Communicator.single()
    assert as_communicator(comm) == (comm, False)
    made, owned = as_communicator(None)
    assert made.size == 1 and owned
    assert run_threads(2, lambda c: as_communicator(c) == (c, False)) == [True, True]
    for bad, name in ((3, "builtins.int"), ("world", "builtins.str"), (object(), "builtins.object")):
        with pytest.raises(ConfigError, match=name):
            as_communicator(bad)


def test_uninitialised_mpi_is_an_error_only_under_a_launcher(monkeypatch):
    mpi = types.ModuleType("mpi4py.MPI")
    mpi.Is_initialized = lambda: False
    mpi.Is_finalized = lambda: False
    package = types.ModuleType("mpi4py")
    package.MPI = mpi
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    assert world().size == 1
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(ConfigError, match="not initialised"):
        world()


def test_finalised_mpi_under_a_launcher(monkeypatch):
    mpi = types.ModuleType("mpi4py.MPI")
    mpi.Is_initialized = mpi.Is_finalized = lambda: True
    package = types.ModuleType("mpi4py")
    package.MPI = mpi
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(LauncherMismatchError, match="finalised"):
        world()


def test_blas_cap(monkeypatch):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    asked = []
    monkeypatch.setattr(blas, "threadpool_limits", lambda n: asked.append(n) or object())
    monkeypatch.setattr(blas, "usable_cores", lambda: list(range(9)))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(blas, "_lasting_limit", None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    assert blas.cap_blas_threads(4) is None
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    assert blas.cap_blas_threads(1) is None and asked == []
    assert blas.cap_blas_threads(4) == 2 and asked == [2]
    assert blas.cap_blas_threads(2) is None, "the process has been capped already"
    assert blas.ranks_share_of_cores(100) == 1
    assert threadpoolctl.threadpool_info() is not None


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert blas.usable_cores() == list(range(6))
