"""Runs every case of tests.nn.mpi_cases over the ranks of COMM_WORLD; rank r writes its results to DIR/r.npz."""

import sys

import numpy as np

from cutp.comm import world
from tests.nn import mpi_cases

with world() as comm:
    np.savez(f"{sys.argv[1]}/{comm.rank}.npz", **mpi_cases.run_all(comm))
