"""CUDA C++ source text -> cubin, and what each kernel in it uses of the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cutp.array.nvrtc import INSTALL_HINT, Nvrtc, nvrtc
from cutp.errors import ConfigError, DeviceError, KernelCompileError

_ARCH = re.compile(r"sm_(\d{2,3})([af]?)")
_DEFINE = re.compile(r"[A-Za-z_]\w*(=[\w.+-]+)?")


@dataclass(frozen=True)
class ResourceUsage:
    """What one kernel uses, as the assembler reports it. Bytes, except `registers` (per thread) and `barriers`.

    `stack` and the spills are per thread, `shared` (statically declared) is per block. Spills count those of
    functions that were called instead of inlined, too.
    """

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    barriers: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin with all kernels of one source variant; `log` is what the compiler said."""

    cubin: bytes
    log: str

    @cached_property
    def resources(self) -> dict[str, ResourceUsage]:
        """The usage of each kernel by its (mangled, if not extern "C") name."""
        return parse_resources(self.log)


def compile_cubin(
    source_text: str, label: str, arch: str, defines: Iterable[str] = (), include: Mapping[str, str] | None = None
) -> CompiledKernel:
    """Compile CUDA C++ for one architecture. Needs NVRTC, but no GPU, no driver and no CuPy.

    `label` names the source in messages; `arch` is "sm_80", "sm_90a", ...; `defines` are "NAME=VALUE" or "NAME";
    `include` maps the name in an #include line to that header's text. CUDA's own headers (cuda_bf16.h, ...) are
    found by themselves. Denormals are kept and division and square root are exact, as CUDA's defaults are.

    Raises KernelCompileError with the first error of the compiler (all of it in `.log`), DeviceError if NVRTC is
    not installed or too old for `arch`, ConfigError for a malformed `arch` or define.
    """
    compiler = nvrtc()
    check_arch(compiler, arch)
    options = build_options(arch, defines)
    if compiler.include_dir is not None:
        options.append(f"-I{compiler.include_dir}")
    cubin, log = compiler.compile(source_text, label, options, include or {})
    if cubin is None:
        raise _compile_error(label, arch, defines, log)
    return CompiledKernel(cubin, log)


def build_options(arch: str, defines: Iterable[str] = ()) -> list[str]:
    """The compiler's options but for the place of the CUDA headers, which differs from machine to machine."""
    # -default-device: a lambda or function without __device__ is device code, as there is no host code.
    options = [f"-arch={arch}", "-std=c++17", "-default-device", "-Xptxas=-v"]
    return options + [f"-D{d}" for d in canonical_defines(tuple(defines))]


@lru_cache(maxsize=4096)
def canonical_defines(defines: tuple[str, ...]) -> tuple[str, ...]:
    """Sorted and checked, so that equal sets of definitions are equal. ConfigError if malformed or repeated."""
    names = set()
    for define in defines:
        if not isinstance(define, str) or not _DEFINE.fullmatch(define):
            raise ConfigError(f"kernel definition {define!r} is neither NAME=VALUE nor NAME")
        name = define.partition("=")[0]
        if name in names:
            raise ConfigError(f"kernel definition {name} is given twice: {' '.join(defines)}")
        names.add(name)
    return tuple(sorted(defines))


def parse_arch(arch: str) -> tuple[int, str]:
    """(90, "a") for "sm_90a", (80, "") for "sm_80". ConfigError otherwise."""
    found = _ARCH.fullmatch(arch) if isinstance(arch, str) else None
    if not found:
        raise ConfigError(f"GPU architecture {arch!r} is not like sm_80 or sm_90a")
    return int(found.group(1)), found.group(2)


def check_arch(compiler: Nvrtc, arch: str) -> None:
    """Raise DeviceError unless this NVRTC compiles for `arch`."""
    number, _ = parse_arch(arch)
    supported = compiler.supported_archs()
    if number not in supported:
        major, minor = compiler.version
        newer = "a newer" if number > max(supported) else "an older"
        raise DeviceError(
            f"NVRTC {major}.{minor} does not compile for {arch}, only for sm_" + ", sm_".join(map(str, supported)),
            hint=f"{newer} CUDA toolkit is needed: {INSTALL_HINT}",
        )


def parse_resources(log: str) -> dict[str, ResourceUsage]:
    """Read the resource usage out of a log written under -Xptxas=-v."""
    found: dict[str, ResourceUsage] = {}
    # Each part but the first is one kernel: its own numbers, then those of the functions it calls.
    for part in re.split(r"Compiling entry function '", log)[1:]:
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        name = part.partition("'")[0]
        found[name] = ResourceUsage(
            kernel=name,
            registers=_number(r"Used (\d+) registers", part),
            spill_stores=sum(int(f[1]) for f in frames),
            spill_loads=sum(int(f[2]) for f in frames),
            stack=int(frames[0][0]) if frames else 0,
            shared=_number(r"(\d+) bytes smem", part),
            barriers=_number(r"used (\d+) barriers", part),
        )
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _compile_error(label: str, arch: str, defines: Iterable[str], log: str) -> KernelCompileError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[0] if lines else "no message")
    variant = f" with {' '.join(defines)}" if defines else ""
    hint = None
    if "cannot open source file" in first:
        hint = f"headers are looked for in cutp/ops and among those of the CUDA runtime, which come with {INSTALL_HINT}"
    error = KernelCompileError(f"kernel {label} does not compile for {arch}{variant}: {first}", hint=hint)
    error.log = log
    return error
