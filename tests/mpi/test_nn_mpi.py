"""Hand-built transformers under mpirun: the same bits as in one process, on every rank."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mpirun import needs_mpirun, run_mpi
from tests.nn import mpi_cases
from tests.nn.building import close, cpus
from tests.nn.decoder import all_by_hand

PROGRAM = Path(__file__).resolve().parent / "programs" / "nn_cases.py"


@needs_mpirun
@pytest.mark.parametrize("n", (2, 3))
def test_processes_equal_devices_of_one_process(n, tmp_path):
    done = run_mpi(n, [sys.executable, PROGRAM, tmp_path])
    assert done.returncode == 0, done.stderr
    expected = mpi_cases.run_all(cpus(n))
    for rank in range(n):
        with np.load(tmp_path / f"{rank}.npz") as got:
            assert set(got.files) == set(expected)
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name}, rank {rank}")


@pytest.mark.parametrize("n", (1, 2, 3))
def test_the_reference_is_right(n):
    """What the processes are held against, against float64."""
    for name, (spec, prompts, options) in mpi_cases.CASES.items():
        trace = all_by_hand(mpi_cases.values_of(spec), spec, prompts)
        last = trace.logits[np.cumsum([len(prompt) for prompt in prompts]) - 1]
        got = mpi_cases.run(name, cpus(n))
        close(got[0], last, 1e-3)
        if "return_hidden_states" in options:
            close(got[1], trace.normed, 1e-4)
    prompts = mpi_cases.chunked_prompts()
    expected = all_by_hand(mpi_cases.values_of(mpi_cases.ODD), mpi_cases.ODD, prompts)
    close(mpi_cases.chunked(cpus(n)), expected.logits[[5, 11, 17]], 1e-4)
