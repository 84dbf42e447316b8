"""The job scripts of mpi_examples, with programs in place of the scheduler's that note how they are called."""

import os
import shutil
import subprocess

import pytest

from tests.mpirun import CHECKOUT

EXAMPLES = CHECKOUT / "mpi_examples"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def run(tmp_path):
    """run(script, status, *arguments, **environment): (exit status, calls) with a `cutp batch` that ends so."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name, body):
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
        (programs / name).chmod(0o755)

    for name in ("scontrol", "qsub"):
        program(name, "")
    for name in ("srun", "mpiexec"):
        program(name, 'while [ "$1" != cutp ]; do shift; done\nexec "$@"')

    def call(script, status, *arguments, **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        program("cutp", f'[ "$2" = merge ] || exit {status}')
        env = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environment}
        done = subprocess.run(["bash", EXAMPLES / script, *arguments], env=env, capture_output=True, text=True,
                              timeout=20, cwd=tmp_path, check=False)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, calls

    return call


SLURM = "batch m in.jsonl --max-tokens 5 -o out --tp 4 --time-limit auto --margin 4m"
MERGE = "cutp batch merge out -o out/results.jsonl --order input"


@pytest.mark.parametrize(("status", "restarts", "last"), [
    (0, "0", MERGE), (6, "3", MERGE), (75, "0", "scontrol requeue 12"), (75, "50", f"cutp {SLURM}"),
    (1, "0", f"cutp {SLURM}"), (5, "0", f"cutp {SLURM}")])
def test_slurm(run, status, restarts, last):
    code, calls = run("slurm_batch.sh", status, "m", "out", "in.jsonl", "--max-tokens", "5", SLURM_JOB_ID="12",
                      SLURM_RESTART_COUNT=restarts)
    assert code == status
    assert calls[:2] == [f"srun --mpi=pmix cutp {SLURM}", f"cutp {SLURM}"] and calls[-1] == last and len(calls) <= 3


def test_slurm_without_arguments(run):
    assert run("slurm_batch.sh", 0, "m") == (2, [])


@pytest.mark.parametrize(("status", "starts", "last"), [
    (0, "1", MERGE), (6, "1", MERGE),
    (75, "1", "qsub -v MODEL,INPUT,DIR,OPTIONS,TP,SCRIPT,STARTS mpi_examples/pbs_batch.sh"), (75, "50", None),
    (3, "1", None)])
def test_pbs(run, tmp_path, status, starts, last):
    code, calls = run("pbs_batch.sh", status, PBS_O_WORKDIR=str(tmp_path), MODEL="m", INPUT="in *.jsonl", DIR="out",
                      OPTIONS="--max-tokens 5", STARTS=starts, TP="2")
    line = "cutp batch m in *.jsonl -o out --tp 2 --time-limit auto --margin 4m --max-tokens 5"
    assert code == status and calls[:2] == [f"mpiexec {line}", line] and calls[2:] == ([last] if last else [])
