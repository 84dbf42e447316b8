"""Every rank: the cases of tests/models/test_families_device.py on its GPU, greedy tokens and log-probabilities of each
into DIRECTORY/RANK.json. Arguments: DIRECTORY, in which rank 0 has found DIRECTORY/CASE/config.json and weights."""

import json
import sys
from pathlib import Path

from cutp import Communicator
from tests.models.test_families_device import measured


def main(root: Path) -> None:
    from mpi4py import MPI

    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        found = {}
        for directory in sorted(path.parent for path in root.glob("*/config.json")):
            tokens, logprobs = measured(directory, "cuda", "float32", comm=comm)
            found[directory.name] = {"tokens": tokens, "logprobs": logprobs.tolist()}
        (root / f"{comm.rank}.json").write_text(json.dumps(found))


main(Path(sys.argv[1]))
