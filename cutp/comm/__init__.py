"""How ranks talk to each other: one Communicator, whether they are MPI processes, threads or just one."""

from cutp.comm.communicator import Communicator
from cutp.comm.launch import as_communicator, launcher_rank, launcher_size, world
from cutp.comm.threads import run_threads

__all__ = ["Communicator", "as_communicator", "launcher_rank", "launcher_size", "run_threads", "world"]
