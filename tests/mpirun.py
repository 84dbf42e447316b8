"""Running test programs under mpirun, with hard limits: a test that hangs must fail, and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
_LAUNCHER_PREFIXES = ("PMI", "HYDI", "HYDRA_", "MPI", "OMPI_", "PMIX_", "PRTE_", "SLURM_")


def find_mpirun() -> str | None:
    """The mpirun beside this Python, which belongs to the MPI that mpi4py finds there; else the one on PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")


@functools.cache
def _is_open_mpi(mpirun: str) -> bool:
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return "open mpi" in (version.stdout + version.stderr).lower() or "open-mpi" in version.stdout.lower()


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without traces of a launcher, with the checkout importable and one BLAS thread a rank."""
    env = {
        name: value for name, value in os.environ.items()
        if name.startswith("MPI4PY_") or not name.startswith(_LAUNCHER_PREFIXES)
    }
    env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), env.get("PYTHONPATH")]))
    env.update(extra or {})
    return env


def mpirun_command(n: int) -> list[str]:
    """What stands before a program to run `n` ranks of it."""
    mpirun = find_mpirun()
    assert mpirun is not None, "mpirun not found: mark the test with needs_mpirun"
    command = [mpirun, "-n", str(n)]
    if _is_open_mpi(mpirun):
        command += ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        if shutil.which("ssh") is None and shutil.which("rsh") is None:
            command += ["--mca", "plm_rsh_agent", "false"]  # it wants one, even if all ranks run here
    return command


def run_mpi(
    n: int, argv: Sequence[str | os.PathLike[str]], *, timeout: float = 60, env: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`mpirun -n N argv...`, with its output as text and any exit status.

    `env` adds to a cleaned environment; `stdin` is the text on standard input (default: none). After `timeout`
    seconds AssertionError is raised, with the output so far and what the processes of the job are doing. None of them
    is left at the end, in any case.
    """
    command = [*mpirun_command(n), *(os.fspath(a) for a in argv)]
    mark = f"TEST_JOB={uuid.uuid4().hex}"
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        env=clean_environment(env) | dict([mark.split("=")]),
    )
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        processes = "\n".join(_what_it_does(pid) for pid in _processes_of(mark))
        _kill(process, mark)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {' '.join(command)}\n--- processes\n{processes}\n"
                             f"--- stdout\n{out}\n--- stderr\n{err}") from None
    finally:
        _kill(process, mark)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _processes_of(mark: str) -> list[int]:
    """What was started with `mark` in its environment, whoever its parent is: launchers make sessions of their own,
    and where one is dead, its ranks belong to nobody."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return sorted(found)


def _what_it_does(pid: int) -> str:
    """The command of a process, and of each of its threads the state and where in the system it waits."""
    try:
        words = " ".join(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split())
        threads = [f"{(thread / 'stat').read_text().rpartition(')')[2].split()[0]} {(thread / 'wchan').read_text()}"
                   for thread in sorted(Path(f"/proc/{pid}/task").iterdir())]
    except OSError as error:
        return f"{pid}: {error}"
    return f"{pid}: {words[:160]}: {', '.join(threads)}"


def _kill(process: subprocess.Popen, mark: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for pid in _processes_of(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@functools.cache
def why_no_mpirun() -> str | None:
    """Why tests cannot run under mpirun; None if they can. Starts two ranks, once."""
    if find_mpirun() is None:
        return "mpirun not found, neither beside this Python nor on PATH"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    probe = "from mpi4py import MPI; raise SystemExit(0 if MPI.COMM_WORLD.size == 2 else 'not two ranks')"
    try:
        done = run_mpi(2, [sys.executable, "-c", probe], timeout=30)
    except AssertionError as error:
        return f"mpirun and mpi4py do not work together: {error}"
    if done.returncode != 0:
        return f"mpirun and mpi4py do not work together: {done.returncode} {done.stdout} {done.stderr[-400:]}"
    return None


needs_mpirun = pytest.mark.skipif(why_no_mpirun() is not None, reason=why_no_mpirun() or "")
