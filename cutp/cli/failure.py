"""What happens when a command fails: the job ends at once, and the cause is the first thing printed."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from cutp.errors import CutpError, PeerFailedError

# How long a rank that only heard of a failure leaves the failed one to print its traceback and end the job.
_GRACE_SECONDS = 3.0
# How long the launcher gets to forward what was printed: an abort may end it before it has.
_FORWARDING_SECONDS = 0.3


def exit_code_of(run: Callable[[Any], None], args: Any) -> int:
    """Runs `run(args)` and returns the exit code, after printing what went wrong.

    An error that all ranks raise alike is printed once, by rank 0, and every rank exits with its code. Anything else
    on one of several ranks is printed there, with its traceback, and aborts the whole job.
    """
    try:
        run(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader of our output went away (`cutp ... | head`); nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _abort_peers(1)
    except KeyboardInterrupt:
        return _abort_peers(130)
    except PeerFailedError as error:
        time.sleep(_GRACE_SECONDS if _job_size() > 1 else 0.0)
        _say(error)
        return _abort_peers(error.exit_code)
    except CutpError as error:
        if _agreed(error):
            if _job_rank() == 0:
                _say(error)
            return error.exit_code
        _say(error)
        return _abort_peers(error.exit_code)
    except SystemExit:
        raise
    except BaseException as error:
        where = f"[cutp rank {_job_rank()} of {_job_size()} on {socket.gethostname()}] " if _job_size() > 1 else ""
        sys.stderr.write("".join([f"{where}{type(error).__name__}: {error}\n", *traceback.format_exception(error)]))
        return _abort_peers(1)


def _say(error: CutpError) -> None:
    sys.stderr.write(f"cutp: error: {error}\n")
    sys.stderr.flush()


def _agreed(error: CutpError) -> bool:
    """Whether all ranks raise `error`: everything but trouble in communication, which each rank sees differently."""
    from cutp.errors import CommError, LauncherMismatchError

    return not isinstance(error, CommError) or isinstance(error, LauncherMismatchError)


def _mpi():
    """mpi4py.MPI while it is usable, without importing it."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _job_rank() -> int:
    from cutp.comm.launch import launcher_rank

    return _mpi().COMM_WORLD.rank if _mpi() else launcher_rank() or 0


def _job_size() -> int:
    from cutp.comm.launch import launcher_size

    return _mpi().COMM_WORLD.size if _mpi() else launcher_size() or 1


def _abort_peers(code: int) -> int:
    """Ends the other ranks, which may be waiting for this one; returns `code` where there are none."""
    sys.stderr.flush()
    if _mpi() and _mpi().COMM_WORLD.size > 1:
        time.sleep(_FORWARDING_SECONDS)
        _mpi().COMM_WORLD.Abort(code)
    return code
