"""When a job must stop: durations as people write them, and the end of the job as the scheduler knows it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping

from cutp.errors import ConfigError

# Unless --margin says otherwise: at most a minute, and at most this part of the time.
_MARGIN_SECONDS, _MARGIN_PART = 60.0, 0.1
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_HINT = "give a number, such as --time-limit 90m or --time-limit 01:30:00"


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "15m", "12h", "2d", "MM:SS", "HH:MM:SS", "D-HH:MM:SS"; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match:
        return float(match[1]) * _UNITS[match[2]]
    match = re.fullmatch(r"(?:(?:(?P<d>\d+)-)?(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)", text)
    if match is None:
        raise ConfigError(f"{text!r} is not a time", hint="write seconds, 90m, 12h or HH:MM:SS")
    days, hours, minutes, seconds = (int(match[name] or 0) for name in "dhms")
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def default_margin(seconds: float) -> float:
    """Seconds before the end at which a job of `seconds` stops unless it is told otherwise."""
    return min(_MARGIN_SECONDS, seconds * _MARGIN_PART)


def seconds_left(environment: Mapping[str, str] | None = None) -> float:
    """Seconds until the scheduler ends this job.

    Asks SLURM_JOB_END_TIME, else `scontrol show job`, `qstat -f` of PBS, `flux job timeleft`. ConfigError when nothing
    gives an answer.
    """
    env = os.environ if environment is None else environment
    now = time.time()
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(env["SLURM_JOB_END_TIME"]) - now
    if env.get("SLURM_JOB_ID"):
        found = re.search(r"\bEndTime=(\S+)", _output("scontrol", "show", "job", env["SLURM_JOB_ID"]))
        end = _time(found[1], "%Y-%m-%dT%H:%M:%S") if found else None
        if end is None:
            raise ConfigError("Slurm does not say when this job ends", hint=_HINT)
        return end - now
    if env.get("PBS_JOBID"):
        return _pbs(_output("qstat", "-f", env["PBS_JOBID"]), now)
    if env.get("FLUX_JOB_ID"):
        text = _output("flux", "job", "timeleft").strip()
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
        raise ConfigError("Flux does not say when this job ends", hint=_HINT)
    raise ConfigError("--time-limit auto finds no job of Slurm, PBS or Flux", hint=_HINT)


def _pbs(text: str, now: float) -> float:
    text = re.sub(r"\n\t", "", text)  # qstat folds long lines
    remaining = re.search(r"^\s*Walltime\.Remaining = (\d+)", text, re.M)
    if remaining:
        return float(remaining[1])
    limit = re.search(r"^\s*Resource_List\.walltime = ([\d:]+)", text, re.M)
    start = re.search(r"^\s*stime = (.+?)\s*$", text, re.M)
    began = _time(start[1], "%a %b %d %H:%M:%S %Y") if start else None
    if limit is None or began is None:
        raise ConfigError("PBS does not say when this job ends", hint=_HINT)
    return began + parse_duration(limit[1]) - now


def _time(text: str, form: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, form))
    except (ValueError, OverflowError):
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]} cannot be asked when this job ends: {error}", hint=_HINT) from None
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr.strip()[:200]}", hint=_HINT)
    return done.stdout
