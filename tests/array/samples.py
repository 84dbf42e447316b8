"""Kernel sources for the tests, and the marks of tests that need something."""

import json
from pathlib import Path

import pytest

from cutp.array import nvrtc

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=f"no NVRTC: {nvrtc.missing()}")

ARCHS = ("sm_80", "sm_90a", "sm_100")

SCALE = """\
// archs: sm_80 sm_90a sm_100
// variants: FACTOR=2,3
#include <cuda_bf16.h>
#include "helper.cuh"

extern "C" __global__ void scale(const float* x, float* y, int n) {
  __shared__ float tile[64];
  int i = blockIdx.x * 64 + threadIdx.x;
  tile[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  if (i < n) y[i] = multiply(tile[threadIdx.x], FACTOR);
}
"""

HELPER = "__device__ float multiply(float a, float b) { return a * b; }\n"

SPILLING = """\
// archs: sm_80
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x, int n) {
  float v[64];
  for (int i = 0; i < 64; i++) v[i] = x[i * threadIdx.x];
  for (int j = 0; j < n; j++)
    for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i + 7) % 64] + 1;
  for (int i = 0; i < 64; i++) x[i * threadIdx.x] = v[i];
}
"""

# For the tests on a GPU; here, so that they are compiled where there is none.
GPU_KERNELS = """\
// archs: sm_80 sm_90a sm_100
// variants: FACTOR=2,3
struct Pair { int a; float b; };

extern "C" __global__ void scale(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = FACTOR * x[i];
}

// Every kind of argument, one after the other.
extern "C" __global__ void arguments(float* out, const float* missing, short s, Pair pair, float f, unsigned char c,
                                     unsigned short bits, long long big) {
  out[0] = missing == nullptr ? 1 : 0;
  out[1] = s; out[2] = pair.a; out[3] = pair.b; out[4] = f; out[5] = c; out[6] = bits; out[7] = (float)big;
}

// Thread i reads what thread n - 1 - i wrote to the far end of a large shared array.
extern "C" __global__ void large_shared(float* y, int floats) {
  extern __shared__ float tile[];
  int n = blockDim.x, i = threadIdx.x;
  tile[floats - n + i] = (float)i;
  __syncthreads();
  y[i] = tile[floats - 1 - i];
}

// y += x, where x is written by the kernel before it in the stream.
extern "C" __global__ void add_after(const float* x, float* y, int n) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += x[i];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
"""


def write_scale(directory: Path, helper: str = HELPER) -> str:
    """Write scale.cu and its header; the path of the former."""
    (directory / "helper.cuh").write_text(helper)
    (directory / "scale.cu").write_text(SCALE)
    return str(directory / "scale.cu")


def kernel_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.kernel"))


def damage(path: Path, place: int = -10) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def about(path: Path) -> dict:
    """The description inside a cache file."""
    return json.loads(path.read_bytes().split(b"\n", 2)[1])
