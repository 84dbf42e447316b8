"""The kernel cache: where it is, and what is wrong there."""

import os
from pathlib import Path

import pytest

from cutp.doctor import kernel_cache
from tests.doctor.jobs import assert_finding, job

GOOD = {"directory": "/tmp/k", "exists": True, "problem": None, "free": 9_000_000_000, "filesystem": "ext4",
        "in_home": False, "kernels": 12, "chosen": False}


@pytest.mark.parametrize(("change", "status", "parts"), [
    ({}, "OK", ["/tmp/k: 12 kernels, 9.0 GB free"]),
    ({"exists": False, "kernels": 0}, "OK", ["to be made"]),
    ({"problem": "it belongs to user 7"}, "WARN", ["/tmp/k (it belongs to user 7)", "CUTP_KERNEL_CACHE", "mode 700"]),
    ({"filesystem": "nfs4"}, "WARN", ["network file system (nfs4)", "CUTP_KERNEL_CACHE"]),
    ({"filesystem": "lustre", "in_home": True}, "WARN", ["in your home on a network file system (lustre)"]),
    ({"free": 1 << 20}, "WARN", ["1 MB are free"]),
    ({"in_home": True}, "OK", []),
])
def test_judgement(change, status, parts):
    assert_finding(kernel_cache.judge(job("a"), [GOOD | change]), status, *parts, ranks=[0] if status == "WARN" else ())
    if status == "WARN":
        assert kernel_cache.judge(job(*"abc"), [GOOD, GOOD | change, GOOD]).ranks == (1,)


def test_several_places():
    finding = kernel_cache.judge(job(*"abc"), [GOOD, GOOD | {"directory": "/scratch/k", "kernels": 3}, GOOD])
    assert_finding(finding, "OK", "/tmp/k (ranks 0, 2): 12 kernels", "/scratch/k (rank 1): 3 kernels")


@pytest.fixture
def probe(monkeypatch):
    def at(directory):
        monkeypatch.setenv("CUTP_KERNEL_CACHE", str(directory))
        return kernel_cache.probe(job("a"))

    return at


def test_a_directory_that_is_there(probe, tmp_path):
    tmp_path.chmod(0o700)
    for name in ("a.kernel", "b.kernel", ".c-tmp"):
        (tmp_path / name).touch()
    facts = probe(tmp_path)
    assert facts["directory"] == str(tmp_path) and facts["exists"] and facts["problem"] is None
    assert facts["kernels"] == 2 and facts["free"] > 0 and facts["chosen"]
    tmp_path.chmod(0o777)
    assert "others may write to it" in probe(tmp_path)["problem"]


def test_a_directory_that_is_not_there(probe, tmp_path):
    facts = probe(tmp_path / "deep" / "er")
    assert (facts["exists"], facts["problem"], facts["kernels"]) == (False, None, 0)
    assert not (tmp_path / "deep").exists()
    (tmp_path / "file").touch()
    assert "is not a directory" in probe(tmp_path / "file" / "k")["problem"]
    assert "it is not a directory" in probe(tmp_path / "file")["problem"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(probe, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in probe(tmp_path / "k")["problem"]


def test_no_permission(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache.os, "access", lambda path, mode: mode == os.R_OK)
    assert "cannot be written" in probe(tmp_path / "k")["problem"]


MOUNTS = """/dev/sda / ext4 rw 0 0
server:/users /users nfs4 rw 0 0
tmpfs /users/a/scratch tmpfs rw 0 0
lustre /mnt/a\\040b lustre rw 0 0
/dev/sdb /mnt/twice ext4 rw 0 0
server:/x /mnt/twice cifs rw 0 0
torn
"""


@pytest.mark.parametrize(("path", "kind"), [
    ("/opt/x", "ext4"), ("/users", "nfs4"), ("/users/a/k", "nfs4"), ("/usersb/x", "ext4"), ("/", "ext4"),
    ("/users/a/scratch/k", "tmpfs"), ("/mnt/a b/k", "lustre"), ("/mnt/twice/k", "cifs")])
def test_file_systems(path, kind, monkeypatch):
    monkeypatch.setattr(kernel_cache.os.path, "realpath", str)
    assert kernel_cache.filesystem_of(Path(path), MOUNTS) == kind


def test_network_file_systems():
    assert all(map(kernel_cache.is_network, ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "fuse.sshfs", "9p")))
    assert not any(map(kernel_cache.is_network, ("", "ext4", "xfs", "tmpfs", "overlay", "btrfs", "zfs", "apfs")))


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache._in_home(tmp_path / "x" / "y") and not kernel_cache._in_home(Path("/elsewhere"))
    monkeypatch.setenv("HOME", "/")
    assert not kernel_cache._in_home(tmp_path)
