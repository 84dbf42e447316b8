"""Kills `cutp batch` at random moments, starts it again, and holds the results against an uninterrupted run.

    python tests/batch/kill_test.py --kills 50 --seed 1

Killed is the whole job, or one rank, or a rank while it writes a line. Some of the restarts have other numbers of ranks
and other tensor-parallel sizes. At the end of each job: every id of the input has exactly one line, and its text is
that of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.mpirun import clean_environment, mpirun_command, why_no_mpirun

TALES = Path(__file__).resolve().parents[2] / "cutp" / "bundled" / "tales"
TORN_WRITE = Path(__file__).resolve().parent / "torn_write.py"
PROMPTS = 80
# (ranks, tensor-parallel size)
SHAPES = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))
TIMEOUT = 120.0
_STARTS = ("Once upon a time", "There was a little tailor who", "The wolf said", "A king had three sons", "In the wood")
_WORDS = ("and", "the", "cat", "went", "home", "to", "his", "mother", "with", "gold")


@dataclass
class Report:
    """What happened: kills by kind, starts, jobs that came to their end, texts that differ from the reference."""

    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    jobs: int = 0
    torn_lines: int = 0
    different: list[str] = field(default_factory=list)
    shapes: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return (f"{self.kills.total()} kills ({kinds}) in {self.starts} starts of {self.jobs} jobs; {self.torn_lines} "
                f"torn lines were found; {len(self.different)} texts differ from the uninterrupted run")


def write_prompts(path: Path, dice: random.Random) -> None:
    """PROMPTS records: greedy and sampled ones, of different lengths, some as OpenAI batch lines."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(PROMPTS):
            prompt = " ".join([dice.choice(_STARTS), *(dice.choice(_WORDS) for _ in range(dice.randrange(25)))])
            params = {"max_tokens": dice.randrange(2, 24), "temperature": dice.choice((0, 0.7, 1.2))}
            if number % 4 == 3:
                line = {"custom_id": f"id {number}", "method": "POST", "url": "/v1/completions",
                        "body": {"model": "tales", "prompt": prompt, **params}}
            else:
                line = {"id": f"id {number}", "prompt": prompt, **params}
            file.write(json.dumps(line) + "\n")


def run_until(kills: int, dice: random.Random, work: Path, say=lambda text: None) -> Report:
    """Kills jobs in `work` until there are that many kills; AssertionError when a record is lost or there twice."""
    report = Report()
    prompts = work / "prompts.jsonl"
    write_prompts(prompts, dice)
    process = _start(prompts, work / "reference", (1, 1))
    assert process.wait(TIMEOUT) == 0
    reference = read_results(work / "reference", report)
    _check_ids(reference)
    shapes = SHAPES if why_no_mpirun() is None else SHAPES[:1]
    while report.kills.total() < kills:
        directory = work / f"job{report.jobs}"
        for _ in range(min(kills - report.kills.total(), dice.randrange(2, 7))):
            kind = dice.choice(("job", "rank", "write"))
            if not _killed(kind, prompts, directory, dice.choice(shapes), dice, report):
                break
            report.kills[kind] += 1
            done = len(read_results(directory, report))
            say(f"kill {report.kills.total()}: {kind}; {done} results")
            if done == PROMPTS:
                break
        shape = dice.choice(shapes)
        report.starts += 1
        process = _start(prompts, directory, shape)
        assert process.wait(TIMEOUT) == 0, f"the last start of {directory} ended with {process.returncode}"
        results = read_results(directory, report)
        _check_ids(results)
        for name, texts in results.items():
            if texts != reference[name]:
                report.different.append(f"{directory.name}: {name}: {texts} instead of {reference[name]}")
        report.jobs += 1
        say(f"job {report.jobs} is complete on {shape[0]} ranks in groups of {shape[1]}")
    return report


def read_results(directory: Path, report: Report) -> dict[str, list[str]]:
    """The texts of each id in all files, read without any of cutp's own code; a torn line may only be the last."""
    results: dict[str, list[str]] = {}
    for path in directory.glob("part-*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        report.torn_lines += lines.pop() != b""
        for line in lines:
            value = json.loads(line)
            if "custom_id" in value:
                name, text = value["custom_id"], value["response"]["body"]["choices"][0]["text"]
            else:
                name, text = value["id"], value["text"]
            results.setdefault(name, []).append(text)
    return results


def _check_ids(results: dict[str, list[str]]) -> None:
    missing = {f"id {number}" for number in range(PROMPTS)} ^ results.keys()
    twice = [name for name, texts in results.items() if len(texts) != 1]
    assert not missing and not twice, f"missing or too many: {sorted(missing)}; twice: {sorted(twice)}"


def _start(prompts: Path, directory: Path, shape: tuple[int, int], torn: tuple[int, float] | None = None):
    program = ["-m", "cutp"] if torn is None else [str(TORN_WRITE), *map(str, torn)]
    command = [sys.executable, *program, "batch", str(TALES), str(prompts), "-o", str(directory), "--seed", "7",
               "--tp", str(shape[1]), "--device", "cpu"]
    if shape[0] > 1:
        command = [*mpirun_command(shape[0]), *command]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=clean_environment(), start_new_session=True)


def _killed(kind: str, prompts: Path, directory: Path, shape: tuple[int, int], dice: random.Random,
            report: Report) -> bool:
    """Starts the job and kills it; False when it came to its end before."""
    report.starts += 1
    report.shapes[shape] += 1
    done = len(read_results(directory, Report()))
    left = max(1, (PROMPTS - done) // (shape[0] // shape[1]))
    torn = (dice.randint(1, left), dice.random()) if kind == "write" else None
    process = _start(prompts, directory, shape, torn)
    try:
        if kind != "write":
            _wait_for_the_moment(process, directory, done, dice)
            victims = [pid for pid in process_family(process.pid) if kind == "job" or is_rank(pid)]
            if kind == "rank" and victims:
                victims = [dice.choice(victims)]
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        code = process.wait(TIMEOUT)
    finally:
        for pid in process_family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return code != 0


def _wait_for_the_moment(process: subprocess.Popen, directory: Path, done: int, dice: random.Random) -> None:
    """Some time after the start, or a moment after some more results are there."""
    if dice.random() < 0.25:
        time.sleep(dice.uniform(0.0, 2.0))
        return
    wanted = dice.randint(done + 1, (done + PROMPTS + 1) // 2)
    end = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        if sum(path.read_bytes().count(b"\n") for path in directory.glob("part-*.jsonl")) >= wanted:
            break
        time.sleep(0.01)
    time.sleep(dice.uniform(0.0, 0.02))


def process_family(pid: int) -> list[int]:
    """The process and all that descend from it; none that are dead."""
    parents: dict[int, list[int]] = {}
    alive = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry))
                if fields[0] not in "ZX":
                    alive.add(int(entry))
    family, found = [pid], []
    while family:
        one = family.pop()
        found.append(one)
        family += parents.get(one, [])
    return [one for one in found if one in alive]


def is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"batch" in words and b"python" in words[0]
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    began = time.monotonic()
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_until(args.kills, random.Random(args.seed), Path(folder), lambda text: print(text, flush=True))
    print(f"{outcome} ({time.monotonic() - began:.0f} s; ranks and tp: {dict(outcome.shapes)})")
    for difference in outcome.different:
        print(difference)
    sys.exit(1 if outcome.different else 0)
