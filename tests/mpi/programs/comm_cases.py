"""Prints the digests of all collective cases, one line a rank."""

import json

from cutp.comm import world
from tests.comm import collective_cases

with world() as comm:
    print(json.dumps([comm.rank, comm.local_rank, comm.local_size, collective_cases.run_all(comm)]) + "\n", end="")
