"""Times as people write them, and as schedulers answer."""

import os
import time
from types import SimpleNamespace

import pytest

from cutp.batch import walltime
from cutp.batch.walltime import default_margin, parse_duration, seconds_left
from cutp.errors import ConfigError


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("0", 0), ("1.5", 1.5), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172800), ("02:03", 123),
    ("1:02:03", 3723), ("01:00:00", 3600), ("2-01:00:00", 176400), ("100:00:00", 360000)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5", "5x", "1:2:3:4", "1-00", ":30", "1h30m", "nan", "1e3", " 5"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="is not a time"):
        parse_duration(text)


def test_default_margin():
    assert default_margin(100) == 10 and default_margin(36000) == 60


NOW = 1_700_000_000


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """It is NOW, however long a test takes."""
    monkeypatch.setattr(walltime, "time", SimpleNamespace(time=lambda: NOW + 0.25, mktime=time.mktime,
                                                          strptime=time.strptime))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(name, text, status): a program on PATH that prints its arguments to a file, and `text`."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def make(name, text, status=0):
        (tmp_path / f"{name}.out").write_text(text)
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\ncat {tmp_path}/{name}.out\n'
                           f"echo no such job >&2\nexit {status}\n")
        program.chmod(0o755)
        return tmp_path / "args"

    return make


def local(seconds, form):
    return time.strftime(form, time.localtime(NOW + seconds))


def test_slurm_variable():
    assert seconds_left({"SLURM_JOB_END_TIME": str(NOW + 101), "SLURM_JOB_ID": "5"}) == 100.75


def test_slurm_command(command):
    end = local(1000, "%Y-%m-%dT%H:%M:%S")
    args = command("scontrol", f"JobId=5 JobName=x\n   StartTime=2020-01-01T00:00:00 EndTime={end} Deadline=N/A\n")
    assert seconds_left({"SLURM_JOB_ID": "5"}) == 999.75 and args.read_text() == "show job 5\n"
    command("scontrol", "JobId=5 EndTime=Unknown Deadline=N/A\n")
    with pytest.raises(ConfigError, match="Slurm does not say when this job ends.*--time-limit 90m"):
        seconds_left({"SLURM_JOB_ID": "5"})


def test_pbs(command):
    start = local(-600, "%a %b %d %H:%M:%S %Y")
    args = command("qstat", f"Job Id: 5.head\n    Job_Name = x\n    Resource_List.walltime = 00:1\n\t5:00\n"
                            f"    stime = {start}\n    Variable_List = PBS_O_HOME=/x\n")
    assert seconds_left({"PBS_JOBID": "5.head"}) == 299.75 and args.read_text() == "-f 5.head\n"
    command("qstat", "Job Id: 5\n    Walltime.Remaining = 77\n")
    assert seconds_left({"PBS_JOBID": "5"}) == 77
    for text in ("", f"    stime = {start}\n", "    stime = soon\n    Resource_List.walltime = 00:15:00\n"):
        command("qstat", text)
        with pytest.raises(ConfigError, match="PBS does not say"):
            seconds_left({"PBS_JOBID": "5"})


def test_flux(command):
    command("flux", "123.5\n")
    assert seconds_left({"FLUX_JOB_ID": "f5"}) == 123.5
    command("flux", "\n")
    with pytest.raises(ConfigError, match="Flux does not say"):
        seconds_left({"FLUX_JOB_ID": "f5"})


def test_no_answer(command, monkeypatch):
    with pytest.raises(ConfigError, match="finds no job.*--time-limit 90m"):
        seconds_left({})
    command("scontrol", "", 1)
    with pytest.raises(ConfigError, match="scontrol show job 5 failed: no such job"):
        seconds_left({"SLURM_JOB_ID": "5"})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="scontrol cannot be asked"):
        seconds_left({"SLURM_JOB_ID": "5"})
