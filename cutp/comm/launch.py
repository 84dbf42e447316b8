"""What this process was started as: one of N ranks, or alone.

Nobody has to say so. `world()` looks for the traces of a launcher in the environment and imports mpi4py only
if there are any (or if the program has done so already), so a plain `python` run needs no MPI at all.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from cutp.comm.communicator import Communicator
from cutp.errors import ConfigError, LauncherMismatchError

if TYPE_CHECKING:
    from mpi4py import MPI

# (launcher, its variable for the number of ranks, its variable for the rank), the innermost launcher first:
# inside a Slurm job step, for example, mpirun decides.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("Hydra or another PMI launcher", "PMI_SIZE", "PMI_RANK"),
    ("PALS", "PALS_SIZE", "PALS_RANKID"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("PMIx", "PMIX_SIZE", "PMIX_RANK"),
)
# Set by a launcher next to the above, or alone by one that does not tell the number of ranks.
_OTHER_TRACES = ("MPI_LOCALNRANKS", "PMI_FD", "PMI_PORT")


def launcher_size() -> int | None:
    """The number of ranks that a launcher says it has started; None if none says so. Does not touch MPI."""
    found = _size_and_variable()
    return found[0] if found else None


def launcher_trace() -> str | None:
    """The variable that `launcher_size` comes from, as "NAME=VALUE"; None if there is none."""
    found = _size_and_variable()
    return f"{found[1]}={os.environ[found[1]]}" if found else None


def launcher_rank() -> int | None:
    """This process's rank as the launcher numbers it; None if there is none. Does not touch MPI."""
    for _, _, variable in _LAUNCHERS:
        rank = _integer(variable)
        if rank is not None:
            return rank
    return _integer("SLURM_PROCID") if _slurm_step_size() else None


def launched() -> bool:
    """Whether there are traces of an MPI launcher in the environment."""
    names = [v for _, size, rank in _LAUNCHERS for v in (size, rank)]
    return any(os.environ.get(v) for v in (*names, *_OTHER_TRACES)) or _slurm_step_size() is not None


def world() -> Communicator:
    """A communicator of all ranks that were started together; the caller closes it.

    Uses a duplicate of MPI's COMM_WORLD if mpi4py.MPI is imported and initialised already or if a launcher left
    traces in the environment; otherwise there is one rank and mpi4py is not imported.

    Raises LauncherMismatchError if the launcher says that it started several ranks but MPI knows of one or
    cannot be loaded: N copies of a program that each believe to be alone would all write the same files.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    ready = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    if not ready:
        if not launched():
            return Communicator.single()
        mpi = _import_mpi()
        if mpi is None:
            return Communicator.single()
    if mpi.COMM_WORLD.Get_size() == 1:
        _check_alone(f"the MPI library that mpi4py loaded, {_library(mpi)}, knows of one rank")
    return Communicator.from_mpi(mpi.COMM_WORLD)


def as_communicator(comm: Communicator | MPI.Intracomm | None) -> tuple[Communicator, bool]:
    """(communicator, owned): what a `comm` argument stands for, and whether the caller must close it.

    None stands for `world()`; a cutp communicator for itself (not owned); an mpi4py communicator is duplicated.
    Raises ConfigError for anything else, MPI.COMM_NULL included.
    """
    if comm is None:
        return world(), True
    if isinstance(comm, Communicator):
        return comm, False
    # An mpi4py communicator can exist only if mpi4py.MPI is imported; so there is no need to import it to ask.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(comm, mpi.Comm):
        return Communicator.from_mpi(comm), True
    raise ConfigError(
        f"comm is a {type(comm).__module__}.{type(comm).__qualname__}",
        hint="pass None, a cutp Communicator or an mpi4py communicator",
    )


def _import_mpi() -> Any | None:
    """mpi4py.MPI, initialised; None if it cannot be had and the launcher started no more than one rank."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        missing = getattr(error, "name", None) == "mpi4py"
        _check_alone("mpi4py is not installed" if missing else f"mpi4py cannot be imported: {error}", error)
        return None
    except RuntimeError as error:
        # What mpi4py raises when it finds no MPI library.
        _check_alone(f"mpi4py cannot load an MPI library: {_first_line(error)}", error)
        return None
    if MPI.Is_finalized():
        _check_alone("MPI was finalised in this process")
        return None
    if not MPI.Is_initialized():
        raise ConfigError("mpi4py is imported but MPI is not initialised", hint="call mpi4py.MPI.Init() before")
    return MPI


def _check_alone(finding: str, cause: BaseException | None = None) -> None:
    """Raise LauncherMismatchError if the launcher says that this process has peers, although `finding`."""
    found = _size_and_variable()
    if found is not None and found[0] > 1:
        _raise_mismatch(*found, finding, cause)


def _raise_mismatch(size: int, variable: str, finding: str, cause: BaseException | None) -> NoReturn:
    raise LauncherMismatchError(
        f"the launcher started {size} ranks ({variable}={os.environ[variable]}), but {finding}",
        rank=launcher_rank(),
        hint="launch with the mpirun that belongs to this MPI library; or build mpi4py for the launcher's MPI: "
        "pip install --no-binary mpi4py mpi4py; on Slurm try srun --mpi=pmix or --mpi=pmi2; "
        "or bring an MPI along: pip install 'cutp[mpich]', with its own mpirun. "
        "For separate single-rank runs pass comm=Communicator.single()",
    ) from cause


def _size_and_variable() -> tuple[int, str] | None:
    for _, variable, _ in _LAUNCHERS:
        size = _integer(variable)
        if size is not None:
            return size, variable
    size = _slurm_step_size()
    return (size, "SLURM_STEP_NUM_TASKS") if size is not None else None


def _slurm_step_size() -> int | None:
    """The size of a Slurm job step of several tasks.

    Only `srun` sets SLURM_STEP_NUM_TASKS above 1; SLURM_NTASKS is also set in a batch script, which runs alone.
    """
    size = _integer("SLURM_STEP_NUM_TASKS")
    return size if size is not None and size > 1 and _integer("SLURM_PROCID") is not None else None


def _integer(variable: str) -> int | None:
    try:
        value = int(os.environ.get(variable, ""))
    except ValueError:
        return None
    return value if value >= 0 else None


def _library(mpi: Any) -> str:
    return _first_line(mpi.Get_library_version())


def _first_line(text: object) -> str:
    return " ".join((str(text).strip("\0").splitlines() or [""])[0].split())
