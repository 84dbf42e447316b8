"""Every kernel of cutp compiles for every architecture and variant it declares, and spills no registers."""

import pytest

from cutp.array.kernel_cache import KernelCache
from cutp.array.kernel_source import OPS_DIRECTORY, kernel_sources
from cutp.array.precompile import shared_cache
from tests.array.compile_check import compile_all, read_budget
from tests.array.samples import SPILLING, needs_nvrtc, write_scale

pytestmark = needs_nvrtc


@pytest.fixture(scope="module")
def outcome():
    sources = [*kernel_sources(), *kernel_sources(OPS_DIRECTORY.parent / "bench")]
    return compile_all(sources, shared_cache())


def test_every_declared_variant_compiles(outcome):
    assert not outcome.errors, "\n".join(outcome.errors)


def test_no_kernel_spills_more_registers_than_its_budget(outcome):
    over = outcome.over_budget(read_budget())
    assert not over, "\n".join(over)


def test_the_assembler_warns_of_no_loss_of_speed(outcome):
    assert not outcome.losses, "\n".join(outcome.losses)


def test_a_multiprocessor_has_room_for_two_blocks_of_decode_attention_and_no_more(outcome):
    """By their registers, which come in eights: uneven numbers of blocks cost a tenth of the speed (NOTES.md)."""
    registers = {key: usage.registers for key, usage in outcome.usage.items() if key.startswith("decode_attention.cu/")}
    blocks = {key: 65536 // (-(-count // 8) * 8 * 128) for key, count in registers.items() if key.endswith("/sm_90a")}
    assert blocks and {key: n for key, n in blocks.items() if n != 2} == {}


def test_a_multiprocessor_has_room_for_four_blocks_of_the_kernels_along_logits(outcome):
    """By their registers: the launcher's grids have four blocks for each multiprocessor of a large GPU."""
    blocks = {key: 65536 // (-(-usage.registers // 8) * 8 * 256) for key, usage in outcome.usage.items()
              if key.startswith("sampling_logits.cu/") and key.endswith("/sm_90a")}
    assert len(blocks) == 9 and {key: n for key, n in blocks.items() if n < 4} == {}


def test_the_budget_names_only_what_is_compiled(outcome):
    assert outcome.errors or outcome.unknown(read_budget()) == []


# The checks themselves, on kernels that must not pass them.

KEY = "spilling.cu/spilling//sm_80"


@pytest.fixture
def samples(tmp_path):
    write_scale(tmp_path)
    (tmp_path / "spilling.cu").write_text(SPILLING)
    return lambda: compile_all(kernel_sources(tmp_path), KernelCache(tmp_path / "cache"))


def test_spills_are_found_and_can_be_allowed(samples):
    found = samples()
    assert found.errors == [] and len(found.usage) == 7
    assert "scale.cu/scale/FACTOR=3/sm_90a" in found.usage
    (complaint,) = found.over_budget({})
    spills = found.usage[KEY].spills
    assert complaint == f"{KEY}: {spills} bytes of spills, 0 allowed (32 registers)"
    assert found.over_budget({KEY: spills}) == [] and len(found.over_budget({KEY: spills - 1})) == 1
    assert found.unknown({KEY: 1, "spilling.cu/spilling//sm_90a": 1}) == ["spilling.cu/spilling//sm_90a"]


def test_warnings_are_found(tmp_path):
    (tmp_path / "taken_too_early.cu").write_text(f"""\
// archs: sm_90a
#include "{OPS_DIRECTORY / "device.cuh"}"
#include "{OPS_DIRECTORY / "hopper.cuh"}"
extern "C" __global__ void __launch_bounds__(128, 1) taken_too_early(float* out, u64 a, u64 b) {{
    float d[4] = {{}};
    wgmma_fence();
    wgmma_shared<bf16, 8, false>(d, a, b, true);
    wgmma_commit();
    out[threadIdx.x] = d[0];
    wgmma_wait<0>();
}}
""")
    found = compile_all(kernel_sources(tmp_path), KernelCache(tmp_path / "cache"))
    assert found.errors == []
    (complaint,) = found.losses
    assert complaint.startswith("taken_too_early.cu//sm_90a: ") and "in function 'taken_too_early'" in complaint


def test_a_variant_that_does_not_compile_is_found(samples, tmp_path):
    (tmp_path / "half.cu").write_text("""\
// archs: sm_80
// variants: N=1,2
#if N == 2
#error two is too many
#endif
extern "C" __global__ void half_done(int* x) { *x = N; }
""")
    (tmp_path / "empty.cu").write_text("// archs: sm_90a\n__device__ int x;\n")
    errors = samples().errors
    assert len(errors) == 2
    assert errors[0] == "empty.cu has no kernel for sm_90a with "
    assert errors[1].startswith("kernel half.cu does not compile for sm_80 with N=2: half.cu(4): ")


def test_the_budget_file(tmp_path):
    assert read_budget(tmp_path / "none.json") == {}
    (tmp_path / "budget.json").write_text(f'{{"{KEY}": 64}}')
    assert read_budget(tmp_path / "budget.json") == {KEY: 64}
    (tmp_path / "budget.json").write_text(f'{{"{KEY}": 0}}')
    with pytest.raises(AssertionError, match="above 0"):
        read_budget(tmp_path / "budget.json")
