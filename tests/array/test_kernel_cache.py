"""The cache of compiled kernels: hits, damage, unusable directories, races."""

import errno
import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from cutp.array import kernel_cache, nvrtc
from cutp.array.kernel_cache import KernelCache, default_directory, directory_problem, kernel_key, unpack
from cutp.errors import KernelCompileError
from tests.array.samples import HELPER, SCALE, about, damage, kernel_files, needs_nvrtc

pytestmark = needs_nvrtc
ROOT = Path(__file__).resolve().parents[2]


def get(cache: KernelCache, factor: int = 2, helper: str = HELPER, arch: str = "sm_80"):
    return cache.get(SCALE, "scale.cu", arch, [f"FACTOR={factor}"], {"helper.cuh": helper})


def test_a_kernel_is_compiled_once_and_found_by_others(tmp_path):
    first, second = KernelCache(tmp_path / "new"), KernelCache(tmp_path / "new")
    kernel = get(first)
    assert get(first) is kernel and first.compiled == 1
    assert get(second) == kernel and second.compiled == 0
    assert second._memory and kernel.resources["scale"].barriers == 1
    (path,) = kernel_files(tmp_path / "new")
    assert about(path)["label"] == "scale.cu" and about(path)["defines"] == ["FACTOR=2"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_whatever_changes_the_code_is_in_the_key(tmp_path):
    cache = KernelCache(tmp_path)
    kernels = [get(cache), get(cache, factor=3), get(cache, arch="sm_90a"), get(cache, helper=HELPER.replace("*", "+"))]
    assert cache.compiled == 4 and len({k.cubin for k in kernels}) == 4 and len(kernel_files(tmp_path)) == 4


def test_the_key_depends_on_the_compiler_and_not_on_how_texts_are_cut(monkeypatch):
    key = kernel_key("ab", "c", "sm_80", (), {})
    assert key == kernel_key("ab", "c", "sm_80", (), {})
    assert kernel_key("a", "bc", "sm_80", (), {}) != key != kernel_key("abc", "", "sm_80", (), {})
    monkeypatch.setattr(nvrtc.nvrtc(), "identity", "nvrtc 99.0")
    assert kernel_key("ab", "c", "sm_80", (), {}) != key


@pytest.mark.parametrize("how", ["cubin", "log", "checksum", "truncated", "empty", "directory"])
def test_a_damaged_file_is_compiled_again(tmp_path, how):
    kernel = get(KernelCache(tmp_path))
    (path,) = kernel_files(tmp_path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        damage(path, {"cubin": -10, "log": 200, "checksum": 30}[how])
    cache = KernelCache(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if how != "directory" else "ignore")
        again = get(cache)
    assert cache.compiled == 1
    assert (again.cubin, again.resources) == (kernel.cubin, kernel.resources)  # the log tells the time, too
    if how != "directory":
        assert unpack(path.read_bytes()) == again


def unusable(cache: KernelCache, reason: str) -> None:
    """Two kernels come out right, one warning tells why they are not kept, and memory still works."""
    with pytest.warns(RuntimeWarning) as caught:
        first, second = get(cache, 2), get(cache, 3)
    assert [str(w.message) for w in caught if "cannot be kept" in str(w.message)] == [str(caught[0].message)]
    assert reason in str(caught[0].message) and "CUTP_KERNEL_CACHE" in str(caught[0].message)
    assert first.cubin != second.cubin and get(cache, 2) is first and cache.compiled == 2


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    unusable(KernelCache(tmp_path / "file" / "cache"), "Not a directory")


def test_a_full_disk(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    unusable(KernelCache(tmp_path), "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def spy(source, target):
        seen.append((unpack(Path(source).read_bytes()), Path(target).exists(), Path(source).parent == tmp_path))
        replace(source, target)

    monkeypatch.setattr(kernel_cache.os, "replace", spy)
    assert seen == [] and get(KernelCache(tmp_path)) == seen[0][0]
    assert [s[1:] for s in seen] == [(False, True)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    unusable(KernelCache(tmp_path), "Permission denied")
    tmp_path.chmod(0o700)


def test_a_directory_that_others_may_write_to_is_not_trusted(tmp_path):
    get(KernelCache(tmp_path), 2)
    tmp_path.chmod(0o777)
    unusable(KernelCache(tmp_path), "others may write to it, its mode is 777")


def test_a_directory_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    get(KernelCache(tmp_path), 2)
    mine = os.geteuid()
    monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: mine + 1)
    unusable(KernelCache(tmp_path), f"it belongs to user {mine}")


def test_the_default_directory_is_the_users_own_and_no_link(tmp_path, monkeypatch):
    monkeypatch.delenv("CUTP_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_directory() == tmp_path / f"cutp-kernels-{os.geteuid()}" == KernelCache().directory
    get(KernelCache())
    assert stat.S_IMODE(default_directory().stat().st_mode) == 0o700
    default_directory().rename(tmp_path / "elsewhere")
    default_directory().symlink_to(tmp_path / "elsewhere")
    unusable(KernelCache(), "it is not a directory")
    monkeypatch.delenv("TMPDIR")
    assert default_directory() == Path(f"/tmp/cutp-kernels-{os.geteuid()}")
    monkeypatch.setenv("CUTP_KERNEL_CACHE", "~/kernels")
    assert KernelCache().directory == Path.home() / "kernels"


def test_directory_problem_accepts_a_private_directory(tmp_path):
    tmp_path.chmod(0o755)
    assert directory_problem(tmp_path.stat()) is None


def test_errors_are_not_kept(tmp_path):
    cache = KernelCache(tmp_path)
    for _ in range(2):
        with pytest.raises(KernelCompileError):
            cache.get("__global__ void f() { nonsense }", "bad.cu", "sm_80")
    assert cache.compiled == 0 and kernel_files(tmp_path) == []


RACER = """
import hashlib, sys, time
from cutp.array.kernel_cache import KernelCache
from tests.array.samples import HELPER, SCALE
cache = KernelCache(sys.argv[1])
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
for factor in range(2, 7):
    kernel = cache.get(SCALE, "scale.cu", "sm_80", [f"FACTOR={factor}"], {"helper.cuh": HELPER})
    print(factor, hashlib.sha256(kernel.cubin).hexdigest())
print(cache.compiled, file=sys.stderr)
"""


def test_two_processes_race(tmp_path):
    command = [sys.executable, "-W", "error", "-c", RACER, str(tmp_path), str(time.time() + 1.5)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    ends = [r.communicate(timeout=60) for r in racers]
    assert [r.returncode for r in racers] == [0, 0], ends
    assert ends[0][0] == ends[1][0] and len(set(ends[0][0].split())) == 10
    assert 5 <= sum(int(err) for _, err in ends) <= 10
    assert len(list(tmp_path.iterdir())) == 5 == len(kernel_files(tmp_path))
    late = KernelCache(tmp_path)
    assert get(late, 2).cubin and late.compiled == 0
