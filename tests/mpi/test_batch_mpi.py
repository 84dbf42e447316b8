"""`cutp batch` under mpirun: the same lines on any shape of ranks, signals, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.kill_test import is_rank, process_family
from tests.cli.conftest import TALES
from tests.mpirun import clean_environment, mpirun_command, needs_mpirun, run_mpi

pytestmark = needs_mpirun

RECORDS = 24


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"The wolf said {i}", "max_tokens": 2 + i % 5,
                                        "temperature": i % 2}) + "\n" for i in range(RECORDS)))
    return path


def command(corpus, out, *options):
    return [sys.executable, "-m", "cutp", "batch", str(TALES), str(corpus), "-o", str(out), "--seed", "3", *options]


def merged(out, tmp_path):
    done = run_mpi(1, [sys.executable, "-m", "cutp", "batch", "merge", out, "-o", tmp_path / "all.jsonl"])
    assert done.returncode == 0, done.stderr
    return (tmp_path / "all.jsonl").read_bytes()


def test_shapes_of_ranks(corpus, tmp_path):
    files = []
    for ranks, tp in ((1, 1), (4, 2), (3, 1)):
        out = tmp_path / f"out{ranks}"
        done = run_mpi(ranks, command(corpus, out, "--tp", str(tp)))
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.count("24 of 24 records done") == 1
        assert len(list(out.glob("part-*.jsonl"))) == ranks // tp
        files.append([line for line in merged(out, tmp_path).splitlines()])
    assert files[0] == files[1] == files[2] and len(files[0]) == RECORDS


@pytest.mark.parametrize(("number", "to"), [(signal.SIGUSR1, "mpirun"), (signal.SIGTERM, "rank")])
def test_signals(corpus, tmp_path, number, to):
    corpus.write_text("".join(json.dumps({"id": i, "prompt": "The wolf", "max_tokens": 5 if i < 3 else 400,
                                          "ignore_eos": True}) + "\n" for i in range(RECORDS)))
    out = tmp_path / "out"
    process = subprocess.Popen([*mpirun_command(3), *command(corpus, out, "--tp", "1")], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
                               start_new_session=True)
    try:
        end = time.monotonic() + 40
        while not list(out.glob("part-*.jsonl")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        began = time.monotonic()
        if to == "mpirun":
            process.send_signal(number)
        else:
            os.kill([pid for pid in process_family(process.pid) if is_rank(pid)][-1], number)
        _, err = process.communicate(timeout=60)
    finally:
        for pid in process_family(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 75 and time.monotonic() - began < 20, err  # before the end by force
    assert f"stopped early ({number.name}): " in err and "Traceback" not in err
    [begin, ended] = [json.loads(line) for line in (out / "attempt-1.jsonl").read_text().splitlines()]
    assert ended["exit"] == 75 and 0 < ended["done"] < RECORDS and ended["remaining"] == RECORDS - ended["done"]


@pytest.mark.parametrize(("make", "code", "words"), [
    (lambda corpus: corpus.write_text('{"id": 1, "prompt": "a"}\n' * 2), 2, "the id 1 is in line 1 of in.jsonl and in"),
    (lambda corpus: corpus.unlink(), 2, "in.jsonl is not there"),
    (lambda corpus: (corpus.parent / "out").write_text(""), 1, "out cannot be written")])
def test_errors_are_said_once(corpus, tmp_path, make, code, words):
    make(corpus)
    done = run_mpi(3, command(corpus, tmp_path / "out", "--tp", "1"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("cutp: error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_error_records_give_exit_status_6(corpus, tmp_path):
    with corpus.open("a") as file:
        file.write('{"id": "long", "prompt": "' + "word " * 5000 + '"}\n{"id": "x", "prompt": [-1]}\noops\n')
    done = run_mpi(4, command(corpus, tmp_path / "out", "--tp", "2"))
    assert done.returncode == 6 and "24 of 27 records done, 3 failed, 0 left" in done.stderr
    errors = [json.loads(line) for path in Path(tmp_path / "out").glob("errors.*")
              for line in path.read_text().splitlines()]
    assert sorted(str(line["id"]) for line in errors) == ["None", "long", "x"]
