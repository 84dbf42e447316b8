"""The launcher and the MPI library: do they belong together, and are they the same on all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from cutp.comm.launch import launched, launcher_size, launcher_trace
from cutp.doctor.check import Check, Job
from cutp.doctor.report import Finding, differences, fail, ok, warn

_INSTALL = "pip install 'cutp[mpich]' brings an MPI with its mpirun; beside a site's MPI: pip install 'cutp[mpi]'"


def probe_launcher(job: Job) -> dict[str, Any]:
    return {"size": launcher_size(), "trace": launcher_trace(), "launched": launched(),
            "interface": _process_management(), "allocation": os.environ.get("SLURM_NTASKS")}


def _process_management() -> str | None:
    """The interface through which the launcher connects ranks, told from its variables."""
    for interface, names in (("PMIx", ("PMIX_RANK", "PMIX_NAMESPACE")), ("PMI", ("PMI_FD", "PMI_RANK", "PMI_PORT"))):
        if any(os.environ.get(name) for name in names):
            return interface
    return None


def judge_launcher(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "launcher"
    wrong = [rank for rank, fact in enumerate(facts) if fact["size"] is not None and fact["size"] != job.size]
    if wrong:
        return fail(name, f"the launcher started {facts[wrong[0]]['size']} ranks ({facts[wrong[0]]['trace']}), but MPI "
                    f"connects {job.size} of them", "launch with the mpirun that belongs to the MPI library that "
                    "mpi4py loads; on Slurm try srun --mpi=pmix or --mpi=pmi2", wrong)
    first = facts[0]
    through = f" over {first['interface']}" if first["interface"] else ""
    if first["size"] is not None:
        return ok(name, f"{_ranks(job.size)}, as the launcher says ({first['trace']}){through}")
    if first["launched"] or job.size > 1:
        return ok(name, f"{_ranks(job.size)}{through}; the launcher does not say how many it started")
    if (first["allocation"] or "1") != "1":
        return ok(name, f"none: one rank, in a Slurm job of {first['allocation']} tasks (srun would start them all)")
    return ok(name, "none: one rank (mpirun -n N cutp doctor examines N)")


def _ranks(n: int) -> str:
    return f"{n} rank{'s' if n > 1 else ''}"


def probe_mpi(job: Job) -> dict[str, Any]:
    mpi = _initialized_mpi()
    if mpi is not None:
        import mpi4py

        return {"mpi4py": mpi4py.__version__, "library": _first_line(mpi.Get_library_version()),
                "standard": ".".join(map(str, mpi.Get_version())), "problem": None}
    # In a process of its own: to load an MPI library here would be a lasting step, and some crash.
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"mpi4py": "?", "library": None, "standard": None, "problem": lines[-1]}


_ASK = """
import json
facts = {"mpi4py": None, "library": None, "standard": None, "problem": None}
try:
    import mpi4py
    facts["mpi4py"] = mpi4py.__version__
    mpi4py.rc.initialize = False
    from mpi4py import MPI
    facts["library"] = " ".join(MPI.Get_library_version().strip(chr(0)).splitlines()[0].split())
    facts["standard"] = ".".join(map(str, MPI.Get_version()))
except (ImportError, RuntimeError) as error:
    facts["problem"] = (str(error).splitlines() or [type(error).__name__])[0]
print(json.dumps(facts))
"""


def judge_mpi(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "mpi"
    first = facts[0]
    if first["mpi4py"] is None:
        return warn(name, "mpi4py is not installed: one rank only", _INSTALL)
    if first["problem"]:
        return warn(name, f"mpi4py {first['mpi4py']} cannot load an MPI library ({first['problem']}): one rank only",
                    f"load the site's MPI module, or: {_INSTALL}")
    different = differences(facts, {"library": "the MPI library", "standard": "the MPI standard", "mpi4py": "mpi4py"})
    if different:
        return fail(name, different[0], "use one environment on all nodes: the same module, virtual environment or "
                    "container", different[1])
    return ok(name, f"{first['library']} (MPI {first['standard']}), mpi4py {first['mpi4py']}")


def probe_threads(job: Job) -> str:
    mpi = _initialized_mpi()
    levels = {getattr(mpi, f"THREAD_{level}"): level for level in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
    return levels[mpi.Query_thread()]


def judge_threads(job: Job, facts: list[str]) -> Finding:
    low = [rank for rank, level in enumerate(facts) if level in ("SINGLE", "FUNNELED")]
    if low:
        return warn("mpi threads", f"the thread level is {facts[low[0]]}: only the main thread may use cutp",
                    "do not lower mpi4py.rc.thread_level, and use an MPI library built with threads", low)
    return ok("mpi threads", f"level {' and '.join(sorted(set(facts)))}")


_GPU_AWARE = ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "MV2_USE_CUDA", "I_MPI_OFFLOAD",
              "OMPI_MCA_opal_cuda_support")


def probe_gpu_aware(job: Job) -> list[str]:
    return [f"{name}={os.environ[name]}" for name in _GPU_AWARE
            if os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")]


def judge_gpu_aware(job: Job, facts: list[list[str]]) -> Finding:
    name = "gpu-aware mpi"
    ranks = [rank for rank, found in enumerate(facts) if found]
    if not ranks:
        return ok(name, "not asked for; cutp gives MPI host buffers only")
    found = facts[ranks[0]]
    names = " ".join(setting.partition("=")[0] for setting in found)
    return warn(name, f"{', '.join(found)}: cutp does not use it, and beside NCCL it can lead to deadlocks",
                f"unset {names}, or set it to 0 for cutp", ranks)


def _initialized_mpi() -> Any:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _first_line(text: str) -> str:
    return " ".join((text.strip("\0").splitlines() or [""])[0].split())


CHECKS = (
    Check("launcher", probe_launcher, judge_launcher),
    Check("mpi", probe_mpi, judge_mpi),
    Check("mpi threads", probe_threads, judge_threads, applies=lambda job: _initialized_mpi() is not None),
    Check("gpu-aware mpi", probe_gpu_aware, judge_gpu_aware),
)
