"""`cutp doctor` with something wrong on rank FAILING_RANK (default 1) of the job."""

import ctypes
import os
import sys
import time

from cutp.cli.main import main
from cutp.comm import launcher_rank
from cutp.doctor import all_reduce, connect, examination, host, software


def other_version():
    software.__version__ = "9.9.9"


def raising():
    software.platform.python_version = lambda: 1 / 0


def hanging():
    software.platform.python_version = lambda: time.sleep(60)


def hanging_all_reduce():
    all_reduce.addend = lambda rank: time.sleep(60)


def wrong_sum():
    right = all_reduce.expected_sum
    all_reduce.expected_sum = lambda size: right(size) + 1


def unstoppable():
    """A hang that holds Python's lock, as one in C may."""
    software.platform.python_version = lambda: ctypes.PyDLL(None).sleep(40)


def dying():
    host.os.cpu_count = lambda: os._exit(3)


def dying_unnoticed():
    """A child keeps open all that a launcher tells the end of a rank from."""
    host.os.cpu_count = lambda: time.sleep(40) if os.fork() == 0 else os._exit(3)


def dying_at_start():
    connect.world = lambda: os._exit(3)


def crowded():
    software.os.environ["MPICH_GPU_SUPPORT_ENABLED"] = "1"


examination._LAST_WORDS_SECONDS = 1.0
what = sys.argv.pop(1)
if launcher_rank() == int(os.environ.get("FAILING_RANK", "1")):
    globals()[what]()
main()
