"""A stand-in for CuPy and NCCL; files that need another have a fixture of their own."""

import weakref

import pytest

from cutp.comm import nccl_link
from tests.comm.fake_nccl import fake_cupy
from tests.comm.nccl_ranks import HANG


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in for CuPy, for as many ranks as there are."""
    monkeypatch.setattr(nccl_link, "_WARM_UP_SIZES", (2, 16))
    # What ends, ends at once, however busy the machine is; tests of what does not end set these themselves.
    monkeypatch.setattr(nccl_link, "_ABORT_SECONDS", HANG)
    monkeypatch.setattr(nccl_link, "_LEAVE_SECONDS", HANG)
    monkeypatch.setattr(nccl_link, "_links", weakref.WeakSet())  # none of another test's
    with fake_cupy(monkeypatch) as cupy:
        yield cupy
