"""The CUDA libraries, and whether a GPU computes what it should: a kernel of cutp's, a matrix product."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cutp.array import cuda, gemm
from cutp.array.nvrtc import nvrtc
from cutp.doctor.check import Check, Job
from cutp.doctor.gpu import GPU_NEEDS, has_gpus, use_gpu
from cutp.doctor.report import Finding, differences, fail, ok, ranks_text
from cutp.ops import residual, residual_cuda

_BF16 = np.dtype(ml_dtypes.bfloat16)
_LABELS = {"driver": "the driver", "runtime": "the CUDA runtime", "nvrtc": "NVRTC", "cublaslt": "cuBLASLt",
           "nccl": "NCCL", "cupy": "CuPy"}


def probe_libraries(job: Job) -> dict[str, Any]:
    cupy = cuda.cupy()
    runtime = cupy.cuda.runtime
    driver = runtime.driverGetVersion()
    return {"cupy": cupy.__version__, "driver": f"{driver_release()} (CUDA {_dotted(driver)})".strip(),
            "runtime": _dotted(runtime.runtimeGetVersion()), "driver_cuda": driver // 1000,
            **_versions(nvrtc=lambda: nvrtc().version, nccl=_nccl_version, cublaslt=_cublaslt_version)}


def _versions(**readers: Callable[[], tuple[int, ...]]) -> dict[str, str | None]:
    """{name: version or None, name_problem: why there is none}"""
    found: dict[str, str | None] = {}
    for name, read in readers.items():
        found[name] = found[f"{name}_problem"] = None
        try:
            found[name] = ".".join(map(str, read()))
        except Exception as error:
            found[f"{name}_problem"] = str(error) or type(error).__name__
    return found


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def driver_release(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The release of the driver, for example "580.65.06"; "" if it is not told."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", path.read_text(errors="replace"))
    except OSError:
        return ""
    return found.group(1) if found else ""


def _nccl_version() -> tuple[int, int, int]:
    version = cuda.nccl().get_version()
    return version // 10000, version % 10000 // 100, version % 100


def _cublaslt_version() -> tuple[int, int, int]:
    from nvmath.bindings import cublasLt

    version = cublasLt.get_version()
    return version // 10000, version % 10000 // 100, version % 100


def judge_libraries(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "gpu libraries"
    for key, purpose in (("nvrtc", "kernels cannot be compiled"), ("cublaslt", "there are no matrix products"),
                         ("nccl", "GPUs cannot talk to each other")):
        ranks = [rank for rank, fact in enumerate(facts) if fact[key] is None]
        if ranks and (key != "nccl" or job.size > 1):
            return fail(name, f"{_LABELS[key]} cannot be used on {ranks_text(ranks)}, without which {purpose}: "
                        f"{facts[ranks[0]][f'{key}_problem']}", cuda.INSTALL_HINT, ranks)
    different = differences(facts, _LABELS)
    if different:
        return fail(name, different[0], "use one environment and one driver on all nodes, and see that LD_LIBRARY_PATH "
                    "names no other libraries", different[1])
    first = facts[0]
    if int(first["nvrtc"].partition(".")[0]) > first["driver_cuda"]:
        return fail(name, f"NVRTC {first['nvrtc']} compiles for a newer CUDA than the driver {first['driver']} runs",
                    "install the packages of the driver's CUDA version, or a newer driver")
    return ok(name, ", ".join(f"{label.removeprefix('the ')} {first[key] or 'not found'}"
                              for key, label in _LABELS.items()))


_COUNT = 5000


def probe_kernel(job: Job) -> dict[str, Any]:
    """Compiles (or finds) one kernel, runs it twice and compares all it wrote."""
    memory = use_gpu(job)
    numbers = np.arange(_COUNT)
    x, y = (numbers % 64).astype(_BF16), (numbers % 7).astype(_BF16)
    on_gpu = [memory.empty(_COUNT, _BF16) for _ in range(3)]
    memory.upload(on_gpu[0], x)
    memory.upload(on_gpu[1], y)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        residual_cuda.residual_add(on_gpu[0], on_gpu[1], 0.5, out=on_gpu[2])
        memory.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    expected = residual.residual_add(x, y, 0.5)
    return {"wrong": int(np.count_nonzero(memory.numpy(on_gpu[2]) != expected)), "first": times[0], "again": times[1]}


def judge_kernel(job: Job, facts: list[dict[str, Any]]) -> Finding:
    first, again = (max(fact[key] for fact in facts) for key in ("first", "again"))
    return _judged("gpu kernel", facts, f"found or compiled, launched and right; the first launch took {first:.0f} ms, "
                   f"the next {again:.2f} ms")


_M, _N, _K = 24, 40, 64


def probe_matrix_product(job: Job) -> dict[str, Any]:
    memory = use_gpu(job)
    # Small integers, whose sums are exact in any order; the bfloat16 result is one rounding of them.
    x = (np.arange(_M * _K) % 5).reshape(_M, _K).astype(_BF16)
    w = (np.arange(_N * _K) % 3 - 1).reshape(_N, _K).astype(_BF16)
    x_gpu, w_gpu, out = memory.empty((_M, _K), _BF16), memory.empty((_N, _K), _BF16), memory.empty((_M, _N), _BF16)
    workspace = memory.empty(gemm.WORKSPACE_BYTES, np.uint8)
    memory.upload(x_gpu, x)
    memory.upload(w_gpu, w)
    gemm.linear(x_gpu, w_gpu, out, workspace=workspace)
    expected = (x.astype(np.float32) @ w.astype(np.float32).T).astype(_BF16)
    return {"wrong": int(np.count_nonzero(memory.numpy(out) != expected))}


def judge_matrix_product(job: Job, facts: list[dict[str, Any]]) -> Finding:
    return _judged("gpu matrix product", facts, "cuBLASLt multiplies, and is right")


def _judged(name: str, facts: list[dict[str, Any]], text: str) -> Finding:
    wrong = [rank for rank, fact in enumerate(facts) if fact["wrong"]]
    if wrong:
        return fail(name, f"{facts[wrong[0]]['wrong']} numbers are wrong on {ranks_text(wrong)}",
                    "see dmesg for Xid errors and nvidia-smi -q for memory errors; empty the kernel cache, try again",
                    wrong)
    return ok(name, text)


CHECKS = (
    Check("gpu libraries", probe_libraries, judge_libraries, applies=has_gpus, needs=("gpu",)),
    Check("gpu kernel", probe_kernel, judge_kernel, applies=has_gpus, needs=GPU_NEEDS),
    Check("gpu matrix product", probe_matrix_product, judge_matrix_product, applies=has_gpus, needs=GPU_NEEDS),
)
