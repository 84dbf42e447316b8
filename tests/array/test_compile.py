"""compile_cubin: cubins, resource usage and errors, without a GPU."""

import sys

import pytest

from cutp.array import nvrtc
from cutp.array.compile import canonical_defines, compile_cubin, parse_arch, parse_resources
from cutp.errors import ConfigError, CutpError, DeviceError, KernelCompileError
from tests.array.samples import ARCHS, GPU_KERNELS, HELPER, SCALE, SPILLING, needs_nvrtc

INCLUDE = {"helper.cuh": HELPER}


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_becomes_a_cubin_with_known_resources(arch):
    kernel = compile_cubin(SCALE, "scale.cu", arch, ["FACTOR=3"], INCLUDE)
    assert kernel.cubin[:4] == b"\x7fELF"
    assert kernel.cubin[0x12:0x14] == (190).to_bytes(2, "little")  # EM_CUDA
    (usage,) = kernel.resources.values()
    assert usage.kernel == "scale" and 4 <= usage.registers <= 32
    assert (usage.spill_stores, usage.spill_loads, usage.stack) == (0, 0, 0)
    assert usage.shared == (256 if arch != "sm_100" else usage.shared) and usage.shared >= 256
    assert usage.barriers == 1


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_of_the_gpu_tests_compile(arch):
    kernel = compile_cubin(GPU_KERNELS, "sample.cu", arch, ["FACTOR=2"])
    assert sorted(kernel.resources) == ["add_after", "arguments", "large_shared", "scale"]


@needs_nvrtc
def test_cubins_of_different_variants_differ():
    two, three = (compile_cubin(SCALE, "scale.cu", "sm_90a", [f"FACTOR={f}"], INCLUDE).cubin for f in (2, 3))
    assert two != three


@needs_nvrtc
def test_spills_are_counted():
    usage = compile_cubin(SPILLING, "spilling.cu", "sm_80").resources["spilling"]
    assert usage.registers == 32 and usage.stack > 0
    assert usage.spill_stores > 50 and usage.spill_loads > 50
    assert usage.spills == usage.spill_stores + usage.spill_loads


def test_resources_are_read_kernel_by_kernel_and_include_called_functions():
    found = parse_resources("""\
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
ptxas         .     32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 22 registers, used 2 barriers, 32 bytes cumulative stack size, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for callee
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
""")
    assert list(found) == ["b", "a"]
    b, a = found["b"], found["a"]
    assert (b.registers, b.barriers, b.shared, b.stack, b.spill_stores, b.spill_loads) == (22, 2, 1024, 32, 20, 40)
    assert (a.registers, a.barriers, a.shared, a.stack, a.spills) == (10, 0, 0, 0, 0)


@needs_nvrtc
def test_the_first_error_of_the_compiler_is_in_the_message():
    source = 'extern "C" __global__ void f(int* x) {\n  *x = missing;\n  *x = absent;\n}\n'
    with pytest.raises(KernelCompileError) as caught:
        compile_cubin(source, "broken.cu", "sm_90a", ["A=1"])
    error = caught.value
    assert str(error) == (
        'kernel broken.cu does not compile for sm_90a with A=1: broken.cu(2): error: identifier "missing" is undefined'
    )
    assert '"absent"' in error.log
    again = CutpError.from_dict(error.to_dict())
    assert type(again) is KernelCompileError and str(again) == str(error) and again.log == ""


@needs_nvrtc
def test_an_error_of_the_assembler_is_reported_too():
    source = 'extern "C" __global__ void f() { asm volatile("wgmma.fence.sync.aligned;"); }'
    compile_cubin(source, "fence.cu", "sm_90a")
    with pytest.raises(KernelCompileError, match="fence.cu does not compile for sm_80: ptxas.*wgmma"):
        compile_cubin(source, "fence.cu", "sm_80")


@needs_nvrtc
def test_an_unknown_header_is_named_with_a_hint():
    with pytest.raises(KernelCompileError, match=r'cannot open source file "helper.cuh" \(headers are looked for'):
        compile_cubin(SCALE, "scale.cu", "sm_80", ["FACTOR=2"])


@needs_nvrtc
@pytest.mark.parametrize(("arch", "which"), [("sm_999", "a newer CUDA toolkit"), ("sm_35", "an older CUDA toolkit")])
def test_an_architecture_that_this_compiler_does_not_know(arch, which):
    with pytest.raises(DeviceError, match=f"does not compile for {arch}, only for sm_.*{which}"):
        compile_cubin(SCALE, "scale.cu", arch)


@pytest.mark.parametrize("arch", ["90", "sm_9", "sm_90b", "compute_90", "sm_90a ", None])
def test_a_malformed_architecture(arch):
    with pytest.raises(ConfigError, match="is not like sm_80 or sm_90a"):
        parse_arch(arch)


def test_definitions_are_sorted_and_checked():
    assert canonical_defines(("B=1", "A")) == ("A", "B=1")
    for bad in ("A B", "1A", "A=", "-DA", "A=1;", 3):
        with pytest.raises(ConfigError, match="neither NAME=VALUE nor NAME"):
            canonical_defines((bad,))
    with pytest.raises(ConfigError, match="A is given twice"):
        canonical_defines(("A=1", "A=2"))


@pytest.fixture
def fresh_nvrtc():
    nvrtc.nvrtc.cache_clear()
    yield
    nvrtc.nvrtc.cache_clear()


def test_without_the_package_that_finds_nvrtc(monkeypatch, fresh_nvrtc):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(DeviceError, match=r'cuda-pathfinder.*is not installed \(pip install "cutp\[cuda13\]"'):
        compile_cubin(SCALE, "scale.cu", "sm_80")


def test_without_nvrtc(monkeypatch, fresh_nvrtc):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def not_found(name):
        raise pathfinder.DynamicLibNotFoundError(f"no {name}\nmany lines")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    with pytest.raises(DeviceError, match=r'NVRTC was not found \(no nvrtc\) \(pip install "cutp\[cuda13\]"'):
        compile_cubin(SCALE, "scale.cu", "sm_80")
    assert nvrtc.missing().startswith("CUDA kernels cannot be compiled: NVRTC was not found")
