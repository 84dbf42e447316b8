"""What two ranks on GPUs must show, one section after the other:

    python tests/gpu/two_ranks.py                    # two GPUs, everything
    python tests/gpu/two_ranks.py --share parity starts   # one GPU for both ranks: right or wrong, but not how fast

    parity       log-probabilities of the shape of Llama-3.1-8B cut to 4 layers, bfloat16: two ranks and one differ from
                 one rank's float32 by as much (needs torch, which makes the checkpoint)
    overlap      the same two ranks with the sums of long prompts under the products that follow
                 (CUTP_MATMUL_ALLREDUCE=1): near each other, and with the same bits in the batch-invariant mode
    odd          3 key-value heads and a feed-forward layer of 97 on two ranks, float32: the CPU's greedy tokens
    starts       40 times `mpirun -n 2 cutp generate` with the model of the package
    setups       200 communicators made, used in a graph and closed in one job
    killed       one rank of a job that generates is killed: how soon the job ends
    tests        the tests of NCCL and of all model families on two ranks
    doctor, collectives, bench, bench_overlap, bench_70b    what the tools print; on two GPUs for the figures

Prints a line a section, and ends with 1 if one is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cutp import LLM, Communicator  # noqa: E402
from cutp.comm.device_group import DeviceGroup  # noqa: E402
from tests.mpirun import clean_environment, mpirun_command, run_mpi  # noqa: E402

CUTP = [sys.executable, "-m", "cutp"]
DIRECTORY = Path("/tmp/cutp-two-ranks")
MEAN_FACTOR = 1.15  # of one rank's distance from float32
KILLED_SECONDS = 10.0
BENCH = ["bench", "--shape", "llama-3.1-8b", "--prompt-len", "1024,4096", "--batch", "1,32"]
BENCH_70B = ["bench", "--shape", "llama-3.1-70b", "--prompt-len", "1024", "--batch", "1,8,32"]


def environment(share: bool) -> dict[str, str]:
    return {"CUTP_SHARE_GPU": "1" if share else "0"}


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128256, length).tolist() for length in (64, 257, 1000, 2048)]


def score(directory: Path, out: Path, dtype: str, invariant: bool) -> None:
    """On every rank: the log-probabilities of `texts` and how many sums ran under products; rank 0's into `out`."""
    from mpi4py import MPI

    overlapped, start = [], DeviceGroup.all_reduce_async
    DeviceGroup.all_reduce_async = lambda *args, **options: overlapped.append(0) or start(*args, **options)
    with Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        with LLM(directory, device="cuda", dtype=dtype, max_len=2049, batch_invariant=invariant, comm=comm) as llm:
            scores = llm.score(texts())
        if comm.rank == 0:
            np.savez(out, logprobs=np.concatenate([each.logprobs[1:] for each in scores]).astype(np.float64),
                     overlapped=len(overlapped))


def scored(share: bool, n: int, dtype: str, *, overlap: bool = False, invariant: bool = False) -> np.ndarray:
    """What `n` ranks make of `texts`; AssertionError if they fail, or if sums do not `overlap` as they should."""
    from tests.gpu.hf_parity import LLAMA_8B, write_checkpoint

    directory = DIRECTORY / "llama-3.1-8b-4-layers"
    if not (directory / "model.safetensors").exists():
        write_checkpoint(directory, LLAMA_8B, "cuda")
    out = DIRECTORY / "scores.npz"
    done = run_mpi(n, [sys.executable, __file__, "--score", directory, out, dtype, str(int(invariant))], timeout=300,
                   env=environment(share) | {"CUTP_MATMUL_ALLREDUCE": str(int(overlap))})
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(out)
    assert bool(found["overlapped"]) == overlap, f"{found['overlapped']} sums ran under products"
    return found["logprobs"]


def parity(share: bool) -> tuple[bool, str]:
    exact, one, two = scored(share, 1, "float32"), scored(share, 1, "bfloat16"), scored(share, 2, "bfloat16")
    of_one, of_two, apart = (np.abs(a - b) for a, b in ((one, exact), (two, exact), (two, one)))
    good = of_two.mean() <= MEAN_FACTOR * of_one.mean()
    return bool(good), (f"{len(exact)} log-probabilities, mean and greatest distance: one rank - float32 "
                        f"{of_one.mean():.5f} {of_one.max():.3f}, two ranks - float32 {of_two.mean():.5f} "
                        f"{of_two.max():.3f}, two - one {apart.mean():.5f} {apart.max():.3f}")


def overlap(share: bool) -> tuple[bool, str]:
    plain, under = (scored(share, 2, "bfloat16", overlap=overlap) for overlap in (False, True))
    invariant, both = (scored(share, 2, "bfloat16", overlap=overlap, invariant=True) for overlap in (False, True))
    apart, modes = np.abs(under - plain), np.abs(invariant - plain)
    same = bool((invariant == both).all())
    return same and apart.mean() <= modes.mean(), (
        f"mean and greatest distance from the plain sums {apart.mean():.5f} {apart.max():.3f} (of the batch-invariant "
        f"mode {modes.mean():.5f} {modes.max():.3f}); in that mode {'the same bits' if same else 'other bits'}")


def odd(share: bool) -> tuple[bool, str]:
    from tests.models.test_families_device import measured
    from tests.wide_heads import write_checkpoint

    root = DIRECTORY / "odd"
    (root / "odd").mkdir(parents=True, exist_ok=True)
    directory = write_checkpoint(root / "odd", num_attention_heads=6, num_key_value_heads=3, intermediate_size=97,
                                 num_hidden_layers=2)
    program = ROOT / "tests" / "mpi" / "programs" / "families_device.py"
    done = run_mpi(2, [sys.executable, program, root], timeout=200, env=environment(share))
    if done.returncode:
        return False, done.stderr[-2000:]
    tokens, logprobs = measured(directory, "cpu", "float32")
    got = [json.loads((root / f"{rank}.json").read_text())["odd"] for rank in (0, 1)]
    distance = np.abs(np.array([each["logprobs"] for each in got]) - logprobs).max()
    good = all(each["tokens"] == tokens for each in got) and distance <= 1e-4
    return good, f"greedy tokens {'equal' if good else 'differ or log-probabilities do'}, within {distance:.1e}"


def starts(share: bool, count: int = 40) -> tuple[bool, str]:
    command = [*CUTP, "generate", "--device", "cuda", "--prompt", "Once upon a time", "--max-tokens", "8",
               "--temperature", "0"]
    seconds, said = [], set()
    for _ in range(count):
        began = time.monotonic()
        done = run_mpi(2, command, timeout=120, env=environment(share))
        seconds.append(time.monotonic() - began)
        if done.returncode:
            return False, f"start {len(seconds)} ended with {done.returncode}: {done.stderr[-2000:]}"
        said.add(done.stdout)
    return len(said) == 1, (f"{count} starts and stops, {min(seconds):.1f} to {max(seconds):.1f} s each, "
                            f"{len(said)} different outputs")


def setups(share: bool) -> tuple[bool, str]:
    program = ROOT / "tests" / "mpi" / "programs" / "nccl_cases.py"
    done = run_mpi(2, [sys.executable, program, "setups", "200"], timeout=500, env=environment(share))
    return done.returncode == 0, done.stdout.strip() or done.stderr[-2000:]


def killed(share: bool) -> tuple[bool, str]:
    command = [*mpirun_command(2), *CUTP, "generate", "--device", "cuda", *["--prompt", "Once upon a time"] * 40, "--n",
               "128", "--max-tokens", "400", "--temperature", "1", "--seed", "1"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=clean_environment(environment(share)), start_new_session=True)
    try:
        deadline, ranks = time.monotonic() + 60, []
        while job.poll() is None and (len(ranks) < 2 or not all(map(_uses_gpu, ranks))):
            if time.monotonic() > deadline:
                return False, f"after 60 s the ranks {ranks} do not use GPUs"
            time.sleep(0.1)
            ranks = _ranks_of(job.pid)
        time.sleep(2.5)
        if job.poll() is not None:
            return False, f"the job ended by itself, with {job.returncode}, before a rank was killed"
        began = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        job.wait(60)
        seconds = time.monotonic() - began
    finally:
        for pid in [*_ranks_of(job.pid), job.pid] if job.poll() is None else []:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    good = job.returncode != 0 and seconds < KILLED_SECONDS
    return good, f"the job ended {seconds:.1f} s after one of its ranks was killed, with {job.returncode}"


def _ranks_of(pid: int) -> list[int]:
    """Processes below `pid` that run cutp."""
    found, below = [], [pid]
    while below:
        parent = below.pop()
        with suppress(OSError):  # it may have ended
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                below += map(int, path.read_text().split())
            if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(os.fsencode(sys.executable) + b"\0-m\0cutp\0"):
                found.append(parent)
    return sorted(found)


def _uses_gpu(pid: int) -> bool:
    with suppress(OSError):
        return any("/dev/nvidia" in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def tests(share: bool) -> tuple[bool, str]:
    files = ["tests/mpi/test_nccl_mpi.py", "tests/mpi/test_families_mpi.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files], cwd=ROOT, capture_output=True,
                          text=True, timeout=900)
    good = done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout
    return good, "\n".join(done.stdout.splitlines()[-1 if good else -30 :])


def _tool(*command: str, **env: str) -> tuple[bool, str]:
    done = run_mpi(2, [sys.executable, "-m", *command], timeout=500, env=env)
    return done.returncode == 0, "\n" + (done.stdout if done.returncode == 0 else done.stdout + done.stderr[-2000:])


def doctor(share: bool) -> tuple[bool, str]:
    return _tool("cutp", "doctor", **environment(share))


def collectives(share: bool) -> tuple[bool, str]:
    return _tool("cutp.bench.collectives", **environment(share))


def bench(share: bool) -> tuple[bool, str]:
    return _tool("cutp", *BENCH, **environment(share))


def bench_overlap(share: bool) -> tuple[bool, str]:
    """The bench again, with the sums of long prompts under the products that follow."""
    return _tool("cutp", *BENCH, CUTP_MATMUL_ALLREDUCE="1", **environment(share))


def bench_70b(share: bool) -> tuple[bool, str]:
    """A model whose weights need both GPUs' memory."""
    return _tool("cutp", *BENCH_70B, **environment(share))


SECTIONS = {each.__name__: each for each in (
    parity, overlap, odd, starts, setups, killed, tests, doctor, collectives, bench, bench_overlap,
    bench_70b)}


def main() -> int:
    if sys.argv[1:2] == ["--score"]:
        score(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5] == "1")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--share", action="store_true", help="both ranks on one GPU")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    bad = []
    for name in args.sections or SECTIONS:
        began = time.monotonic()
        try:
            good, text = SECTIONS[name](args.share)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            good, text = False, str(error)[-3000:]
        print(f"{'ok ' if good else 'BAD'} {name} ({time.monotonic() - began:.0f} s): {text}", flush=True)
        bad += [] if good else [name]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
