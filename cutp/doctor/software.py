"""Versions and settings: the same on all ranks, and valid."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numpy as np

from cutp import __version__, settings
from cutp.doctor.check import Check, Job
from cutp.doctor.report import Finding, differences, fail, ok, ranks_text, warn
from cutp.errors import ConfigError

_LABELS = {"cutp": "cutp", "python": "Python", "numpy": "NumPy", "ml_dtypes": "ml_dtypes", "cupy": "CuPy"}
_CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def probe_software(job: Job) -> dict[str, Any]:
    cupys = [f"{name} {version}" for name in _CUPY_PACKAGES if (version := _installed(name))]
    return {"cutp": __version__, "python": platform.python_version(), "numpy": np.__version__,
            "ml_dtypes": _installed("ml_dtypes"), "cupy": cupys, "container": _container()}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _container() -> str | None:
    if os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        return "Apptainer"
    return "Docker" if os.path.exists("/.dockerenv") else None


def judge_software(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "software"
    first = facts[0]
    shown = [{**fact, "cupy": " and ".join(fact["cupy"]) or "not installed"} for fact in facts]
    different = differences(shown, _LABELS)
    if different:
        return fail(name, different[0], "use one environment on all nodes: all ranks must run the same program",
                    different[1])
    if len(first["cupy"]) > 1:
        return fail(name, f"several CuPy packages are installed: {' and '.join(first['cupy'])}",
                    "uninstall all of them, then install the one of this CUDA version again")
    text = ", ".join(f"{label} {first[key]}" for key, label in _LABELS.items() if key != "cupy")
    text += f", {first['cupy'][0]}" if first["cupy"] else ", no CuPy"
    return ok(name, text + (f", in {first['container']}" if first["container"] else ""))


_SETTINGS = {"CUTP_COMM_TIMEOUT": settings.comm_timeout, "CUTP_MATMUL_ALLREDUCE": settings.matmul_allreduce,
             "CUTP_MOE": settings.moe, "CUTP_KERNEL_CACHE": settings.kernel_cache,
             "CUTP_LOAD_THREADS": settings.load_threads, "CUTP_SHARE_GPU": settings.share_gpu}


def probe_settings(job: Job) -> dict[str, Any]:
    bad = []
    for read in _SETTINGS.values():
        try:
            read()
        except ConfigError as error:
            bad.append(error.message)
    return {"set": {name: value for name, value in sorted(os.environ.items()) if name.startswith("CUTP_")}, "bad": bad}


def judge_settings(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "settings"
    bad = [rank for rank, fact in enumerate(facts) if fact["bad"]]
    if bad:
        return fail(name, "; ".join(facts[bad[0]]["bad"]), "set another value, or none for the default", bad)
    first = facts[0]["set"]
    others = [rank for rank, fact in enumerate(facts) if fact["set"] != first]
    if others:
        names = sorted({n for rank in others for n, _ in facts[rank]["set"].items() ^ first.items()})
        return warn(name, f"{', '.join(names)} not the same on {ranks_text(others)} as on rank 0",
                    "give all ranks the same environment (mpirun -genv or -x, srun --export=ALL)", others)
    unknown = [n for n in first if n not in _SETTINGS]
    if unknown:
        return warn(name, f"cutp knows no variable {', '.join(unknown)}", f"it knows {', '.join(_SETTINGS)}")
    return ok(name, ", ".join(f"{n}={value}" for n, value in first.items()) or "no CUTP_* variable is set")


CHECKS = (Check("software", probe_software, judge_software), Check("settings", probe_settings, judge_settings))
