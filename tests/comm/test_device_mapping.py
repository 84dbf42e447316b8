"""Ranks and GPUs: one each, and all ranks of one kind."""

from types import SimpleNamespace

import pytest

from cutp import run_threads
from cutp.array.device import DeviceRef
from cutp.comm import device_mapping
from cutp.comm.device_mapping import Placement, check_mapping, place_rank
from cutp.errors import CommError, ConfigError, DeviceError, DeviceMappingError


def test_mappings_that_work():
    check_mapping([("a", "u0", 0), ("a", "u1", 1), ("b", "u2", 0)], False)
    check_mapping([("a", "u0", 0), ("b", "u0", 0)], False)  # some vendors give equal names on different hosts
    check_mapping([("a", None, 0), ("a", None, 0)], False)
    check_mapping([("a", "u0", 0), ("a", "u0", 0)], True)


def test_two_ranks_on_one_gpu():
    facts = [("b", "u9", 0), ("a", "u0", 0), ("a", "u1", 1), ("a", "u0", 0)]
    with pytest.raises(DeviceMappingError, match=r"ranks 1 and 3 would both use GPU 0 of host a \(u0\): 3 ranks run "
                                                 "there, with 2 GPUs among them .*CUTP_SHARE_GPU=1") as caught:
        check_mapping(facts, False)
    assert isinstance(caught.value, CommError) and caught.value.code == "device_mapping"
    with pytest.raises(DeviceMappingError, match="2 ranks run there, with 1 GPU among them"):
        check_mapping([("a", "u0", 0), ("a", "u0", 0)], False)


def test_gpus_for_some_ranks_only():
    for share in (False, True):
        with pytest.raises(DeviceMappingError, match=r"rank 1 \(host b\) can use no GPU, but 2 of 3 ranks can"):
            check_mapping([("a", "u0", 0), ("b", None, 0), ("a", "u1", 1)], share)


def places(monkeypatch, uuids, name="cuda"):
    """What `place_rank` gives on each rank, whose GPUs have these UUIDs; an Exception is raised instead."""
    def select(name, rank):
        if isinstance(uuids[rank], Exception):
            raise uuids[rank]
        return DeviceRef.CPU() if uuids[rank] is None else DeviceRef.GPU(rank)

    monkeypatch.setattr(device_mapping, "select_device", select)
    monkeypatch.setattr(device_mapping.cuda, "device_info",
                        lambda index: SimpleNamespace(uuid=uuids[index], pci_bus_id=f"bus {index}"))

    def rank_main(comm):
        try:
            return place_rank(name, comm)
        except CommError as error:
            return str(error)
        except (ConfigError, DeviceError) as error:
            return repr(error.rank), error.message

    return run_threads(len(uuids), rank_main)


def test_every_rank_learns_its_place(monkeypatch):
    assert places(monkeypatch, ["u0", "u1"]) == [Placement(DeviceRef.GPU(0)), Placement(DeviceRef.GPU(1))]
    assert places(monkeypatch, [None, None]) == [Placement(DeviceRef.CPU())] * 2
    assert places(monkeypatch, ["", ""]) == [Placement(DeviceRef.GPU(0)), Placement(DeviceRef.GPU(1))]  # by bus


def test_every_rank_gets_the_error(monkeypatch):
    first, second = places(monkeypatch, ["u0", "u0"])
    assert first == second and "ranks 0 and 1 would both use GPU 1" in first
    first, second = places(monkeypatch, ["u0", None])
    assert first == second and "rank 1" in first and "can use no GPU" in first
    assert places(monkeypatch, ["u0", DeviceError("the driver is too old")]) == [("1", "the driver is too old")] * 2


def test_sharing_has_to_be_asked_for(monkeypatch):
    monkeypatch.setenv("CUTP_SHARE_GPU", "1")
    assert places(monkeypatch, ["u0", "u1", "u0"]) == [
        Placement(DeviceRef.GPU(0), 2), Placement(DeviceRef.GPU(1), 1), Placement(DeviceRef.GPU(2), 2)]
    monkeypatch.setenv("CUTP_SHARE_GPU", "yes")
    assert "CUTP_SHARE_GPU='yes' is neither 0 nor 1" in places(monkeypatch, ["u0", "u1"])[0][1]
