"""Meeting the other ranks, which is where a launcher and an MPI library that do not fit show it: by an error, by a
hang, or by a process that ends inside MPI_Init.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from cutp import settings
from cutp.comm.communicator import Communicator
from cutp.comm.launch import launched, launcher_size, launcher_trace, world
from cutp.doctor.report import EXIT_FAIL, Finding, fail
from cutp.errors import ConfigError, CutpError, LauncherMismatchError

_FIX = ("launch with the mpirun that belongs to the MPI library that mpi4py loads; on Slurm try srun --mpi=pmix or "
        "--mpi=pmi2; python -c 'import mpi4py; mpi4py.rc.initialize=False; from mpi4py import MPI; "
        "print(MPI.Get_library_version())' names the library")

_GRACE_SECONDS = 3.0


def connect(timeout: float, last_words: Callable[[Finding], str]) -> tuple[Communicator, Finding | None]:
    """(all ranks, None), or (this rank alone, why it cannot meet the others).

    last_words(finding): what to print if this process ends inside MPI, or hangs there for `timeout` seconds; it is then
    printed by another process, and this one killed.
    """
    with _usual_deadline():
        try:
            with _watched(timeout, last_words) if launched() else nullcontext():
                return world(), None
        except LauncherMismatchError as error:
            return Communicator.single(), fail("launcher", error.message, error.hint)
        except CutpError as error:
            return Communicator.single(), fail("launcher", f"the ranks do not meet: {error}", _FIX)


@contextmanager
def _usual_deadline() -> Iterator[None]:
    """Without a CUTP_COMM_TIMEOUT that cannot be read, which is for the check of settings to report."""
    name = "CUTP_COMM_TIMEOUT"
    given = os.environ.get(name)
    try:
        settings.comm_timeout()
    except ConfigError:
        del os.environ[name]
    try:
        yield
    finally:
        if given is not None:
            os.environ[name] = given


@contextmanager
def _watched(timeout: float, last_words: Callable[[Finding], str]) -> Iterator[None]:
    """A small process watches this one in the `with` block: a hang may hold Python's lock, and MPI may end us."""
    size = launcher_size()
    started = f"the launcher started {size} ranks ({launcher_trace()}), and " if size else ""
    died = fail("launcher", f"{started}this process ended inside MPI_Init or the ranks' first meeting", _FIX)
    hung = fail("launcher", f"{started}MPI_Init, or the ranks' first meeting, takes more than {timeout:g} s", _FIX)
    orders = {"pid": os.getpid(), "timeout": timeout, "died": last_words(died), "hung": last_words(hung)}
    if not orders["hung"]:
        orders["timeout"] += _GRACE_SECONDS  # the rank that speaks comes first: a launcher may end the others with it
    try:
        watcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WATCH, json.dumps(orders)],
                                   stdin=subprocess.PIPE, start_new_session=True)
    except OSError:  # a node that cannot start another process has nothing to watch with
        yield
        return
    try:
        yield
    finally:
        watcher.communicate(b"over")


_WATCH = f"""
import json, os, select, signal, sys
orders = json.loads(sys.argv[1])
ready, _, _ = select.select([0], [], [], orders["timeout"])
if not ready or not os.read(0, 1):
    sys.stdout.write(orders["died" if ready else "hung"])
    sys.stdout.flush()
    if not ready:
        os.kill(orders["pid"], signal.SIGKILL)
    sys.exit({EXIT_FAIL})
"""
