"""The GPUs: whether ranks can use any, which rank has which, what they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cutp import settings
from cutp.array import cuda
from cutp.array.cuda_memory import CudaMemory
from cutp.array.device import select_device
from cutp.array.kernel_source import choose_arch, kernel_sources
from cutp.comm.device_mapping import check_mapping
from cutp.doctor.check import Check, Job
from cutp.doctor.report import Finding, by_value, fail, ok, ranks_text, warn
from cutp.errors import DeviceError, DeviceMappingError

GPU_NEEDS = ("gpu", "gpu mapping")
"""What a check that works on a rank's GPU needs."""
_HIDING = ("", "-1", "NoDevFiles")


def has_gpus(job: Job) -> bool:
    """Whether every rank can use a GPU, once "gpu" was checked."""
    return all(fact["usable"] for fact in job.facts.get("gpu", [{"usable": False}]))


def can_connect(job: Job) -> bool:
    """Whether every rank has a GPU of its own, or all may share; unknown before "gpu mapping" counts as yes."""
    facts = job.facts.get("gpu mapping", ())
    cards = [(host, fact["card"]) for host, fact in zip(job.hosts, facts, strict=False)]
    return has_gpus(job) and (len(set(cards)) == len(cards) or all(fact["share"] for fact in facts))


def use_gpu(job: Job) -> CudaMemory:
    """The memory of this rank's GPU, which becomes the calling thread's current one."""
    index = job.facts["gpu mapping"][job.rank]["index"]
    cuda.cupy().cuda.runtime.setDevice(index)
    return CudaMemory(index)


def probe_available(job: Job) -> dict[str, Any]:
    fact = {"usable": True, "reason": None, "hint": None, "cards": cards_here(), "driver": cuda.has_driver(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if not fact["driver"]:
        # Asked without CuPy, whose import takes a while and may fail for reasons that do not matter here.
        fact.update(usable=False, reason="there is no NVIDIA driver (libcuda.so.1)",
                    hint="in a container, pass the GPUs and the driver through (apptainer --nv, docker --gpus all)")
        return fact
    try:
        cuda.cupy()
    except DeviceError as error:
        fact.update(usable=False, reason=error.message, hint=error.hint)
    return fact


def cards_here(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that this process may open, by their device files (dxg is the one of WSL).

    A scheduler leaves the files of GPUs that it did not give to the job where they are, and forbids to open them.
    """
    cards = [path for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit() and _opens(path)]
    return len(cards) or int(_opens(devices / "dxg"))


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def judge_available(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "gpu"
    unusable = [rank for rank, fact in enumerate(facts) if not fact["usable"]]
    if not unusable:
        return ok(name, "every rank can use one" if job.size > 1 else "there is one to use")
    fact = facts[unusable[0]]
    if len(unusable) < job.size:
        return fail(name, f"{ranks_text(unusable)} can use no GPU ({fact['reason']}), but others can",
                    fact["hint"] or "give every rank a GPU, or use --device cpu", unusable)
    there = [rank for rank in unusable if facts[rank]["cards"]]
    hidden = [rank for rank in there if facts[rank]["visible"] in _HIDING]
    if there and len(hidden) == len(there):
        value = facts[there[0]]["visible"]
        return warn(name, f"CUDA_VISIBLE_DEVICES={value!r} hides the GPUs of {job.hosts[there[0]]}, models run on the "
                    "CPU", "unset CUDA_VISIBLE_DEVICES to use the GPUs", hidden)
    if there:
        fact = facts[there[0]]
        return fail(name, f"{_cards(fact['cards'])} of {job.hosts[there[0]]} cannot be used: {fact['reason']}",
                    fact["hint"] or "nvidia-smi shows whether the driver works", there)
    return ok(name, f"none can be used, so models run on the CPU: {fact['reason']}")


def _cards(n: int) -> str:
    return f"the {n} GPUs" if n > 1 else "the GPU"


def probe_mapping(job: Job) -> dict[str, Any]:
    device = select_device("cuda", job.comm.local_rank)
    info = cuda.device_info(device.id)
    free, total = CudaMemory(device.id).free_bytes()
    return {"index": info.index, "card": info.uuid or info.pci_bus_id, "name": info.name,
            "capability": list(info.capability), "free": free, "total": total,
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "share": settings.share_gpu()}


def judge_mapping(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "gpu mapping"
    places = [(host, fact["card"], fact["index"]) for host, fact in zip(job.hosts, facts, strict=True)]
    users = by_value([f"{host} {card}" for host, card, _ in places])
    sharing = [rank for ranks in users.values() if len(ranks) > 1 for rank in ranks]
    text = "; ".join(f"rank {rank} of {job.hosts[rank]}: GPU {fact['index']} {fact['name']} {fact['card']}"
                     + _visible(fact["visible"]) for rank, fact in enumerate(facts))
    try:
        check_mapping(places, all(fact["share"] for fact in facts))
    except DeviceMappingError as error:
        return fail(name, f"{error.message}. {text}", error.hint, sharing)
    if sharing:
        return warn(name, f"{ranks_text(sharing)} share GPUs, as CUTP_SHARE_GPU=1 allows, and exchange data through "
                    f"the network. {text}", "start one rank for each GPU", sharing)
    return ok(name, text)


def _visible(value: str | None) -> str:
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES={value})"


def probe_capability(job: Job) -> list[str]:
    """The kernel files that have no code for this rank's GPU."""
    capability = tuple(job.facts["gpu mapping"][job.rank]["capability"])
    # A file for special architectures only has another that does the same on all others.
    return [source.name for source in kernel_sources()
            if choose_arch(capability, source.archs) is None and not all(arch.endswith("a") for arch in source.archs)]


def judge_capability(job: Job, facts: list[list[str]]) -> Finding:
    name = "compute capability"
    cards = job.facts["gpu mapping"]
    found = [".".join(map(str, card["capability"])) for card in cards]
    bad = [rank for rank, missing in enumerate(facts) if missing]
    if bad:
        archs = sorted({arch for source in kernel_sources() for arch in source.archs})
        return fail(name, f"{cards[bad[0]]['name']} has {found[bad[0]]}, for which {', '.join(facts[bad[0]][:3])} "
                    f"{'and others ' if len(facts[bad[0]]) > 3 else ''}hold no code ({', '.join(archs)})",
                    "use a GPU of capability 8.0 or newer, or --device cpu", bad)
    groups = by_value(found)
    if len(groups) > 1:
        text = ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in groups.items())
        return warn(name, f"{text}: different kernels run, which may round differently",
                    "use GPUs of one kind in a tensor-parallel group", groups[found[-1]])
    return ok(name, f"{found[0]}, for which all kernels have code")


_LEAST_SHARE = 0.8
_LEAST_BYTES = 1 << 30


def judge_memory(job: Job, facts: list[Any]) -> Finding:
    name = "gpu memory"
    cards = job.facts["gpu mapping"]
    rank = min(range(job.size), key=lambda r: cards[r]["free"])
    text = f"at least {cards[rank]['free'] / 1e9:.1f} of {cards[rank]['total'] / 1e9:.1f} GB are free"
    fix = "nvidia-smi shows who uses the GPU; --kv-memory leaves room for others"
    full = [r for r in range(job.size) if cards[r]["free"] < _LEAST_BYTES]
    if full:
        return fail(name, f"{text} (rank {rank})", fix, full)
    used = [r for r in range(job.size) if cards[r]["free"] < _LEAST_SHARE * cards[r]["total"]]
    return warn(name, f"{text} (rank {rank})", fix, used) if used else ok(name, text)


def probe_peers(job: Job) -> dict[str, Any]:
    """Which of the GPUs that this rank sees can read each other's memory."""
    runtime = cuda.cupy().cuda.runtime
    count = runtime.getDeviceCount()
    return {"pairs": [[bool(i == j or runtime.deviceCanAccessPeer(i, j)) for j in range(count)] for i in range(count)]}


def judge_peers(job: Job, facts: list[dict[str, Any]]) -> Finding:
    name = "peer access"
    texts, bad = [], []
    for host, ranks in job.ranks_of_host().items():
        rank = max(ranks, key=lambda r: len(facts[r]["pairs"]))
        pairs = facts[rank]["pairs"]
        cut = [f"{i}-{j}" for i in range(len(pairs)) for j in range(i) if not (pairs[i][j] and pairs[j][i])]
        if cut:
            bad += ranks
            texts.append(f"{host}: GPUs {', '.join(cut[:8])}{' and more' if len(cut) > 8 else ''} cannot")
        elif len(pairs) > 1:
            texts.append(f"{host}: all {len(pairs)} GPUs can")
        else:
            texts.append(f"{host}: a rank sees one GPU, so it cannot be asked")
    text = "GPUs read each other's memory: " + "; ".join(texts)
    if bad:
        return warn(name, text, "their traffic goes through host memory; see nvidia-smi topo -p2p r, ACS in the BIOS, "
                    "and IOMMU settings", bad)
    return ok(name, text)


CHECKS = (
    Check("gpu", probe_available, judge_available),
    Check("gpu mapping", probe_mapping, judge_mapping, applies=has_gpus, needs=("gpu",)),
    Check("compute capability", probe_capability, judge_capability, applies=has_gpus, needs=GPU_NEEDS),
    Check("gpu memory", lambda job: None, judge_memory, applies=has_gpus, needs=GPU_NEEDS),
    Check("peer access", probe_peers, judge_peers, applies=has_gpus, needs=("gpu",)),
)
