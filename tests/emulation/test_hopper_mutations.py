"""A test of the tests, as test_mutations.py: kernels with one mistake in them, each of which must be
noticed.

A changed kernel must raise or give other results than NumPy, under at least one of the order seeds.
"""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cutp.array.kernel import launch, use_backend
from cutp.array.tensor_map import TensorMap
from tests.emulation.emulator import EmulationError, EmulatorBackend, needs_compiler

pytestmark = needs_compiler
bfloat16 = np.dtype(ml_dtypes.bfloat16)
REPOSITORY = Path(__file__).resolve().parents[2]
PROBES, PRODUCTS = Path("tests/emulation/probes_hopper.cu"), Path("tests/emulation/probes_wgmma.cu")
HEADERS = [Path("cutp/ops/device.cuh"), Path("cutp/ops/hopper.cuh")]
SEEDS = (0, 1, 2)

RING_MUTATIONS = {
    "a producer that is a round ahead": ("barrier_wait(ring.emptied(i), Ring::parity(i) ^ 1);",
                                         "if (i >= 2 * stages) barrier_wait(ring.emptied(i), Ring::parity(i) ^ 1);"),
    "a producer that does not wait": ("barrier_wait(ring.emptied(i), Ring::parity(i) ^ 1);", ""),
    "a producer with the wrong parity": ("Ring::parity(i) ^ 1", "Ring::parity(i)"),
    "consumers that do not wait": ("barrier_wait(ring.filled(i), Ring::parity(i));", ""),
    "a parity that never changes": ("return i / stages % 2;", "return i / stages * 0;"),
    "too few bytes expected": ("barrier_arrive_expect(ring.filled(i), stage_bytes)",
                               "barrier_arrive_expect(ring.filled(i), stage_bytes - w_bytes)"),
    "too many bytes expected": ("barrier_arrive_expect(ring.filled(i), stage_bytes)",
                                "barrier_arrive_expect(ring.filled(i), stage_bytes + 128)"),
    "one consumer too few": ("barrier_init(ring.emptied(i), 2)", "barrier_init(ring.emptied(i), 1)"),
    "one consumer too many": ("barrier_init(ring.emptied(i), 2)", "barrier_init(ring.emptied(i), 3)"),
    "all threads arrive": ("if (step > 0 && t == 0) barrier_arrive", "if (step > 0) barrier_arrive"),
    "a stage given back that is still in use": ("barrier_arrive(ring.emptied(i - 1));\n        }",
                                                "barrier_arrive(ring.emptied(i));\n        }"),
    "a stage given back before its products are finished": ("wgmma_wait<1>();", "wgmma_wait<2>();"),
    "results taken before they are there": ("wgmma_wait<0>();\n        keep_registers(d);\n        if",
                                            "wgmma_wait<1>();\n        keep_registers(d);\n        if"),
    "activations before the wait": ("                pdl_wait();\n", ""),
    "activations in the cache of before": ("                async_global_fence();\n", ""),
    "no fence before products": ("            wgmma_fence();\n#pragma unroll\n", "#pragma unroll\n"),
    "sums that do not begin at zero": ("step > 0 || k > 0", "true"),
    "sums that begin at every step": ("step > 0 || k > 0", "k > 0"),
    "k steps too short": ("descriptor_at(x, 32 * k)", "descriptor_at(x, 16 * k)"),
    "a consumer that reads the other's rows": ("+ consumer * x_bytes, 16", ", 16"),
    "groups of 8 rows in the wrong place": ("const u64 w = matrix_descriptor(ring.stage(i), 16, 1024)",
                                            "const u64 w = matrix_descriptor(ring.stage(i), 16, 2048)"),
    "a turn that is never given": ("if (consumer == 1) named_barrier_arrive(1, 256);", ""),
    "a turn given to oneself": ("named_barrier_arrive(2 - consumer, 256);", "named_barrier_arrive(1 + consumer, 256);"),
    "half the threads of a turn": ("named_barrier_sync(1 + consumer, 256)", "named_barrier_sync(1 + consumer, 128)"),
    "barriers without fence": ("        barrier_init_fence();\n    }\n    __syncthreads();\n    pdl_launch",
                               "    }\n    __syncthreads();\n    pdl_launch"),
    "barriers not awaited": ("    __syncthreads();\n    pdl_launch_dependents();", "    pdl_launch_dependents();"),
    "barriers in the last stage": ("full(begin + stages * stage_bytes)", "full(begin + stages * stage_bytes - 64)"),
    "a budget too large": ("registers_increase<232>", "registers_increase<240>"),
    "rows below the array": ("if (r < rows) out[", "if (r <= rows) out["),
}

PRODUCT_MUTATIONS = {
    "the wrong panel": ("panel * b_panel + inside", "inside"),
    "panels of B too close": ("const u64 b_start = matrix_descriptor(b, b_panel, 1024)",
                              "const u64 b_start = matrix_descriptor(b, 1024, 1024)"),
    "a k step of B that is too short": ("step * 16 * row_bytes", "step * 8 * row_bytes"),
    "fragments without swizzle": (" ^ (threadIdx.x % 8 * 16)", ""),
    "results in the wrong rows": ("(first + i / 2 % 2 * 8) * N", "(first + i % 2 * 8) * N"),
    "a box that is counted twice": ("k_panels * a_panel + (", "k_panels * a_panel * 2 + ("),
}

WRITTEN_MUTATIONS = {
    "written operands without fence": ("    async_shared_fence();\n    __syncthreads();\n    float d[4];",
                                       "    __syncthreads();\n    float d[4];"),
    "written operands without swizzle": ("(half ^ row % 8) * 16, load_activation(a", "half * 16, load_activation(a"),
}


def ring_is_right(root, seed):
    x, w = (np.random.default_rng(0).integers(-4, 5, shape).astype(bfloat16) for shape in ((200, 392), (64, 392)))
    out = np.full((200, 64), np.nan, bfloat16)
    args = [TensorMap(x, (128, 64)), TensorMap(w, (64, 64), weight=True), out, np.int32(200), np.int32(2), np.int32(7)]
    with use_backend(EmulatorBackend(seed, root / PROBES.parent)):
        launch(PROBES.name, "ring", 1, 384, args, shared_bytes=2 * 3 * 8192 + 64, defines=["DTYPE=BF16"], pdl=True)
    expected = (x.astype(np.float32) @ w.astype(np.float32).T).astype(bfloat16)
    return np.array_equal(out, expected)


def products_are_right(root, seed):
    a, b = (np.random.default_rng(0).integers(-4, 5, shape).astype(bfloat16) for shape in ((64, 128), (96, 128)))
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    with use_backend(EmulatorBackend(seed, root / PRODUCTS.parent)):
        for from_registers in (0, 1):
            for transposed, given in ((0, b), (1, np.ascontiguousarray(b.T))):
                out = np.full((64, 96), np.nan, np.float32)
                args = [TensorMap(a, (64, 64)), TensorMap(given, (64 if transposed else 96, 64)), out, np.int32(2),
                        np.float32(0), np.int32(from_registers), np.int32(transposed)]
                launch(PRODUCTS.name, "products_96", 1, 128, args, shared_bytes=1024 + 49152, defines=["DTYPE=BF16"])
                if not np.array_equal(out, expected):
                    return False
    return True


def written_operands_are_right(root, seed):
    a, b = (np.random.default_rng(0).integers(-4, 5, shape).astype(bfloat16) for shape in ((64, 16), (8, 16)))
    out = np.full((64, 8), np.nan, np.float32)
    with use_backend(EmulatorBackend(seed, root / PROBES.parent)):
        launch(PROBES.name, "written_operands", 1, 128, [a, b, out], shared_bytes=72 * 128, defines=["DTYPE=BF16"])
    return np.array_equal(out, a.astype(np.float32) @ b.astype(np.float32).T)


def copy_of_kernels(root):
    for name in (PROBES, PRODUCTS, *HEADERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    # One shape is enough, and compiles faster.
    text = (root / PRODUCTS).read_text()
    (root / PRODUCTS).write_text("".join(line for line in text.splitlines(keepends=True)
                                         if "products_96(" in line or "void __launch_bounds__" not in line))
    return root


KINDS = [(ring_is_right, PROBES, RING_MUTATIONS), (products_are_right, PRODUCTS, PRODUCT_MUTATIONS),
         (written_operands_are_right, PROBES, WRITTEN_MUTATIONS)]


@pytest.mark.parametrize("is_right", [kind[0] for kind in KINDS])
def test_unchanged_kernels_pass(is_right, tmp_path):
    root = copy_of_kernels(tmp_path)
    assert all(is_right(root, seed) for seed in SEEDS)


@pytest.mark.parametrize(("mutation", "is_right"), [(m, kind[0]) for kind in KINDS for m in kind[2]])
def test_a_mutation_is_noticed(mutation, is_right, tmp_path):
    file, mutations = next((file, mutations) for check, file, mutations in KINDS if check is is_right)
    old, new = mutations[mutation]
    path = copy_of_kernels(tmp_path) / file
    text = path.read_text()
    assert text.count(old) == 1, "the mutation no longer applies"
    path.write_text(text.replace(old, new))
    try:
        assert not all(is_right(tmp_path, seed) for seed in SEEDS)
    except EmulationError as error:
        assert "does not compile" not in str(error)
