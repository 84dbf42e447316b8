"""Every model family on two GPUs, or on one that two ranks share: what they compute is what the CPU computes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from cutp.array import cuda
from tests.models.test_families_device import CASES, checkpoint, measured
from tests.mpirun import needs_mpirun, run_mpi

PROGRAM = Path(__file__).resolve().parent / "programs" / "families_device.py"


@pytest.mark.gpu
@needs_mpirun
@pytest.mark.parametrize("moe", ["tensor", "expert"])
def test_two_ranks_equal_the_cpu(tmp_path, moe):
    if (reason := cuda.unavailable_reason()) is not None:
        pytest.skip(reason)
    share = "1" if cuda.cupy().cuda.runtime.getDeviceCount() == 1 else "0"
    for name in CASES:
        checkpoint(tmp_path / name, name)
    done = run_mpi(2, [sys.executable, PROGRAM, tmp_path], timeout=300, env={"CUTP_MOE": moe, "CUTP_SHARE_GPU": share})
    assert done.returncode == 0, done.stderr
    for name in CASES:
        tokens, logprobs = measured(tmp_path / name, "cpu", "float32")
        for rank in (0, 1):
            got = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            assert got["tokens"] == tokens, (name, rank)
            np.testing.assert_allclose(got["logprobs"], logprobs, rtol=0, atol=1e-4, err_msg=f"{name}, rank {rank}")
