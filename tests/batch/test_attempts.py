"""Starts of a job: numbered, and never two at once."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cutp.batch import attempts
from cutp.batch.attempts import OwnAttempt, identity, read_attempts
from cutp.errors import OutputError

ME = identity()


def start(directory, said=None, **times):
    return OwnAttempt(directory, {"ranks": 1}, (said if said is not None else []).append, **times)


def write(directory, number, begin, end=None):
    lines = [json.dumps({"attempt": number, **begin})] + ([json.dumps(end)] if end else [])
    (directory / f"attempt-{number}.jsonl").write_text("\n".join(lines) + "\n")


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_numbers_and_ends(tmp_path):
    for number in (1, 2, 10):
        if number == 10:
            write(tmp_path, 9, ME, {"ended": 5})
        own = start(tmp_path)
        assert own.number == number
        own.finish({"exit": 75})
        own.finish({"exit": 0})
    found = read_attempts(tmp_path)
    assert [attempt.number for attempt in found] == [1, 2, 9, 10]
    assert found[0].end["exit"] == 75 and found[0].begin["ranks"] == 1 and found[0].begin["pid"] == os.getpid()


def test_one_that_runs_here_is_seen(tmp_path):
    own = start(tmp_path)
    with pytest.raises(OutputError, match=rf"attempt 1 \(host .*, process {os.getpid()}\) is running in"):
        start(tmp_path)
    own.finish({})
    start(tmp_path).finish({})


def test_one_that_was_killed_here_is_seen_at_once(tmp_path):
    write(tmp_path, 1, {**ME, "pid": dead_process()})
    write(tmp_path, 2, {**ME, "start": "1"})  # the process id belongs to another process by now
    write(tmp_path, 3, {**ME, "pid": None})
    began = time.monotonic()
    start(tmp_path).finish({})
    assert time.monotonic() - began < 10


def test_one_elsewhere_is_watched(tmp_path, monkeypatch):
    write(tmp_path, 1, {**ME, "machine": "elsewhere", "host": "node7", "job": "55"})
    file = tmp_path / "attempt-1.jsonl"
    said, watched, beats = [], [], True

    def sleep(seconds):
        watched.append(seconds)
        if beats:
            touched = file.stat().st_mtime_ns + 10**9
            os.utime(file, ns=(touched, touched))

    monkeypatch.setattr(attempts, "time", SimpleNamespace(sleep=sleep, time=time.time))
    with pytest.raises(OutputError, match=r"attempt 1 \(host node7, process \d+, job 55\) is running in"):
        start(tmp_path, said, watch_seconds=0.3)
    assert "watching for 0.3 s" in said[0] and watched == [0.3]
    beats = False
    own = start(tmp_path, watch_seconds=0.3)
    assert own.number == 2 and watched == [0.3, 0.3]
    own.finish({})


def test_a_job_that_the_scheduler_restarted(tmp_path, monkeypatch):
    write(tmp_path, 1, {**ME, "machine": "elsewhere", "job": "55", "restart": "0"})
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    start(tmp_path, watch_seconds=30).finish({})
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("content", ["", '{"attempt": 1, "ho', "\0\0"])
def test_one_that_has_not_said_who_it_is_is_watched(tmp_path, content):
    (tmp_path / "attempt-1.jsonl").write_text(content)
    said = []
    own = start(tmp_path, said, watch_seconds=0.1)
    assert own.number == 2 and "attempt 1" in said[0]
    own.finish({})


def test_two_at_the_same_moment(tmp_path, monkeypatch):
    # The other one creates its file after this one has looked.
    monkeypatch.setattr(attempts, "read_attempts", lambda directory: [])
    write(tmp_path, 1, ME)
    with pytest.raises(OutputError, match="attempt 1, which started at the same time, is running"):
        start(tmp_path)


def test_the_heart_beats(tmp_path):
    own = start(tmp_path, heartbeat_seconds=0.02)
    before = os.stat(own.path).st_mtime_ns
    end = time.monotonic() + 10
    while os.stat(own.path).st_mtime_ns == before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert os.stat(own.path).st_mtime_ns > before
    assert own.superseded() is False
    write(tmp_path, 2, ME)
    assert own.superseded() is True
    own.finish({})
    after = os.stat(own.path).st_mtime_ns
    time.sleep(0.1)
    assert os.stat(own.path).st_mtime_ns == after


def test_no_permission(tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(attempts.os, "open", refuse)
    with pytest.raises(OutputError, match=r"attempt-1\.jsonl cannot be written: Permission denied"):
        start(tmp_path)
