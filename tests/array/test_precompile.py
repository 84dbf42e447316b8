"""precompile: one rank per node compiles, all have the kernels."""

import threading
import warnings

import pytest

from cutp.array import precompile as precompile_module
from cutp.array.kernel_cache import KernelCache
from cutp.array.precompile import KernelSpec, build, precompile
from cutp.comm import run_threads
from cutp.errors import ConfigError, KernelCompileError
from tests.array.samples import kernel_files, needs_nvrtc, write_scale

pytestmark = needs_nvrtc


def specs(path: str) -> list[KernelSpec]:
    return [KernelSpec(path, arch, (f"FACTOR={f}",)) for arch in ("sm_80", "sm_90a") for f in (2, 3)]


def test_one_rank_compiles_for_its_node(tmp_path):
    path = write_scale(tmp_path)

    def program(comm):
        cache = KernelCache(tmp_path / "cache")  # as ranks that are processes have
        precompile(specs(path), comm, cache=cache)
        at_hand = len(cache._memory)
        return cache.compiled, at_hand, [build(s, cache).cubin for s in specs(path)], cache.compiled

    results = run_threads(3, program)
    assert [(r[0], r[1], r[3]) for r in results] == [(4, 4, 4), (0, 4, 0), (0, 4, 0)]
    assert results[0][2] == results[1][2] == results[2][2] and len(kernel_files(tmp_path / "cache")) == 4


def test_each_compiles_for_itself_where_files_cannot_be_shared(tmp_path):
    path = write_scale(tmp_path)

    def program(comm):
        cache = KernelCache(tmp_path / str(comm.rank))
        precompile(specs(path), comm, cache=cache)
        return cache.compiled

    assert run_threads(2, program) == [4, 4]


def test_a_kernel_that_does_not_compile_is_an_error_of_every_rank(tmp_path):
    path = write_scale(tmp_path, helper="nonsense")

    def program(comm):
        with pytest.raises(KernelCompileError, match="scale.cu does not compile for sm_80 with FACTOR=2: helper.cuh"):
            precompile(specs(path), comm, cache=KernelCache(tmp_path / "cache"))
        comm.barrier()  # the communicator is still usable
        return True

    assert run_threads(3, program, timeout=30) == [True] * 3


def test_without_a_communicator_and_with_repetitions(tmp_path):
    path, cache = write_scale(tmp_path), KernelCache(tmp_path / "cache")
    precompile(specs(path) * 2, cache=cache)
    precompile([], cache=cache)
    assert cache.compiled == 4


def test_only_declared_variants_are_built(tmp_path):
    with pytest.raises(ConfigError, match="declares no variant with FACTOR=9 for sm_80"):
        build(KernelSpec(write_scale(tmp_path), "sm_80", ("FACTOR=9",)), KernelCache(tmp_path / "cache"))


def test_kernels_compile_at_the_same_time(tmp_path, monkeypatch):
    met = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(precompile_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(precompile_module, "build", lambda spec, cache: met.wait())
    precompile(specs(write_scale(tmp_path))[:2])


def test_two_threads_compile_one_kernel_once(tmp_path):
    path, cache = write_scale(tmp_path), KernelCache(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels = run_threads(4, lambda comm: build(specs(path)[0], cache))
    assert cache.compiled == 1 and len({id(k) for k in kernels}) == 1
