"""Which device each rank of a communicator computes on."""

from __future__ import annotations

from dataclasses import dataclass

from cutp import settings
from cutp.array import cuda
from cutp.array.device import DeviceRef, select_device
from cutp.comm.communicator import Communicator
from cutp.errors import DeviceMappingError


@dataclass(frozen=True)
class Placement:
    """A rank's device, and how many ranks use it if it is a GPU."""

    device: DeviceRef
    sharers: int = 1


def place_rank(name: str, comm: Communicator) -> Placement:
    """This rank's device for `name`, see `select_device`; collective over `comm`.

    Raises, on all ranks alike, what `select_device` raises on one, and DeviceMappingError where two ranks of a host
    would use one GPU (unless `CUTP_SHARE_GPU=1`), or where "auto" finds GPUs for some ranks only.
    """
    with comm.host.agree("choosing devices"):
        device, share, uuid = select_device(name, comm.local_rank), settings.share_gpu(), None
        if device.is_gpu():
            info = cuda.device_info(device.id)
            uuid = info.uuid or info.pci_bus_id
    found = comm.host.all_gather_json([uuid, device.id, share])
    facts = [(host, uuid, index) for host, (uuid, index, _) in zip(comm.hosts, found, strict=True)]
    check_mapping(facts, all(share for *_, share in found))
    if uuid is None:
        return Placement(device)
    return Placement(device, sum(fact[:2] == (comm.hosts[comm.rank], uuid) for fact in facts))


def check_mapping(facts: list[tuple[str, str | None, int]], share: bool) -> None:
    """DeviceMappingError unless the (host, UUID or None for a CPU, index) of all ranks can work together."""
    without = [rank for rank, (_, uuid, _) in enumerate(facts) if uuid is None]
    if without and len(without) < len(facts):
        rank = without[0]
        raise DeviceMappingError(f"rank {rank} (host {facts[rank][0]}) can use no GPU, but {len(facts) - len(without)} "
                                 f"of {len(facts)} ranks can", hint="`--device cuda` says why; --device cpu uses none")
    users: dict[tuple[str, str], int] = {}
    for rank, (host, uuid, index) in enumerate(facts):
        if uuid is None:
            continue
        first = users.setdefault((host, uuid), rank)
        if first != rank and not share:
            on_host = [r for r, fact in enumerate(facts) if fact[0] == host]
            visible = len({facts[r][1] for r in on_host})
            raise DeviceMappingError(
                f"ranks {first} and {rank} would both use GPU {index} of host {host} ({uuid}): {len(on_host)} ranks "
                f"run there, with {visible} {'GPU' if visible == 1 else 'GPUs'} among them",
                hint="start one rank for each GPU, give each rank a GPU of its own, or set CUTP_SHARE_GPU=1 to share")
