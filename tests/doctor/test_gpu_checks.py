"""The checks of GPUs, on stand-ins for CuPy and for a GPU that computes."""

from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp import run_threads
from cutp.array import cuda
from cutp.array.device import DeviceRef
from cutp.comm import nccl_link
from cutp.comm.nccl import NcclCollectives
from cutp.doctor import all_reduce, gpu, gpu_work
from cutp.doctor.check import Job
from cutp.doctor.checks import all_checks
from cutp.doctor.examination import examine
from cutp.errors import DeviceError
from tests.comm.fake_nccl import fake_cupy
from tests.device_arrays import emulated_device
from tests.doctor.jobs import assert_finding, job

USABLE = {"usable": True, "reason": None, "hint": None, "cards": 2, "driver": True, "visible": None}
NONE = {"usable": False, "reason": "there is no driver", "hint": "pass the GPUs", "cards": 0, "driver": False,
        "visible": None}


@pytest.mark.parametrize(("facts", "status", "parts", "ranks"), [
    ([USABLE], "OK", ["there is one"], ()),
    ([USABLE, USABLE], "OK", ["every rank"], ()),
    ([NONE], "OK", ["models run on the CPU", "there is no driver"], ()),
    ([NONE, NONE], "OK", ["models run on the CPU"], ()),
    ([USABLE, NONE], "FAIL", ["rank 1 can use no GPU (there is no driver), but others can", "pass the GPUs"], [1]),
    ([NONE | {"cards": 4, "reason": "too old", "hint": "update"}] * 2, "FAIL",
     ["the 4 GPUs of a cannot be used: too old. Fix: update"], [0, 1]),
    ([NONE | {"cards": 1, "hint": None}], "FAIL", ["the GPU of a cannot", "nvidia-smi"], [0]),
    ([NONE | {"cards": 2, "visible": ""}], "WARN", ["CUDA_VISIBLE_DEVICES='' hides", "unset"], [0]),
    ([NONE | {"cards": 2, "visible": "-1"}], "WARN", ["'-1' hides"], [0]),
    ([NONE | {"cards": 2, "visible": "0"}], "FAIL", ["cannot be used"], [0]),
    ([NONE | {"cards": 2, "visible": "-1"}, NONE | {"cards": 2}], "FAIL", ["cannot be used"], [0, 1]),
])
def test_availability(facts, status, parts, ranks):
    hosts = ["a"] * len(facts)
    assert_finding(gpu.judge_available(job(*hosts), facts), status, *parts, ranks=ranks)


def test_no_driver_is_found_without_cupy(monkeypatch):
    monkeypatch.setattr(cuda, "has_driver", lambda: False)
    monkeypatch.setattr(cuda, "cupy", lambda: pytest.fail("CuPy was asked for"))
    facts = gpu.probe_available(job("a"))
    assert not facts["usable"] and "no NVIDIA driver" in facts["reason"] and "--nv" in facts["hint"]


def test_why_cupy_finds_none(monkeypatch):
    def refuse():
        raise DeviceError("the driver is too old", hint="update it")

    monkeypatch.setattr(cuda, "has_driver", lambda: True)
    monkeypatch.setattr(cuda, "cupy", refuse)
    facts = gpu.probe_available(job("a"))
    assert (facts["usable"], facts["reason"], facts["hint"]) == (False, "the driver is too old", "update it")
    monkeypatch.setattr(cuda, "cupy", object)
    assert gpu.probe_available(job("a"))["usable"]


def test_cards_by_their_files(tmp_path, monkeypatch):
    assert gpu.cards_here(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
    assert gpu.cards_here(tmp_path) == 2
    opened = gpu._opens
    monkeypatch.setattr(gpu, "_opens", lambda path: path.name != "nvidia0" and opened(path))
    assert gpu.cards_here(tmp_path) == 1
    (tmp_path / "wsl").mkdir()
    (tmp_path / "wsl" / "dxg").touch()
    assert gpu.cards_here(tmp_path / "wsl") == 1


def card(index=0, uuid="GPU-a", free=70, total=80, share=False, visible=None, capability=(9, 0)):
    return {"index": index, "card": uuid, "name": "H200", "capability": list(capability), "free": free * 10**9,
            "total": total * 10**9, "visible": visible, "share": share}


def test_mapping():
    two = [card(0, "GPU-a", visible="0,1"), card(1, "GPU-b")]
    assert_finding(gpu.judge_mapping(job("x", "x"), two), "OK",
                   "rank 0 of x: GPU 0 H200 GPU-a (CUDA_VISIBLE_DEVICES=0,1); rank 1 of x: GPU 1 H200 GPU-b")
    same = [card(0, "GPU-a"), card(0, "GPU-b"), card(0, "GPU-a")]
    assert_finding(gpu.judge_mapping(job("x", "x", "x"), same), "FAIL", "ranks 0 and 2 would both use GPU 0", "GPU-b",
                   "CUTP_SHARE_GPU", ranks=[0, 2])
    assert_finding(gpu.judge_mapping(job(*"xyz"), same), "OK")
    shared = [card(share=True), card(share=True)]
    assert_finding(gpu.judge_mapping(job(*"xx"), shared), "WARN", "ranks 0-1 share GPUs", ranks=[0, 1])
    assert_finding(gpu.judge_mapping(job(*"xx"), [card(share=True), card()]), "FAIL", "ranks 0 and 1", ranks=[0, 1])


def test_nccl_needs_a_gpu_for_each_rank_unless_they_may_share():
    [check] = all_reduce.GPU_CHECKS

    def applies(hosts, cards):
        return check.applies(job(*hosts, gpu=[USABLE] * len(hosts), gpu_mapping=cards))

    assert applies("xx", [card(0, "GPU-a"), card(1, "GPU-b")]) and applies("xy", [card(), card()])
    assert not applies("xx", [card(), card()]) and not applies("x", [card()])
    assert applies("xx", [card(share=True)] * 2) and not applies("xx", [card(share=True), card()])
    assert not check.applies(job(*"xx", gpu=[NONE, NONE]))


def test_without_gpus_nothing_else_is_checked():
    j = job("a", gpu=[NONE])
    assert not any(check.applies(j) for check in all_checks() if "gpu" in check.needs)
    assert not gpu.has_gpus(job("a"))
    assert gpu.has_gpus(job("a", gpu=[USABLE])) and not gpu.has_gpus(job("a", "b", gpu=[USABLE, NONE]))


def test_capability():
    def found(*capabilities):
        facts = [card(capability=c) for c in capabilities]
        j = job(*["a"] * len(facts), gpu_mapping=facts)
        missing = []
        for j.comm.rank in range(len(facts)):
            missing.append(gpu.probe_capability(j))
        return gpu.judge_capability(j, missing)

    assert_finding(found((9, 0)), "OK", "9.0")
    assert_finding(found((8, 9), (8, 9)), "OK", "8.9")
    assert_finding(found((9, 0), (8, 0)), "WARN", "9.0 on rank 0, 8.0 on rank 1", ranks=[1])
    assert_finding(found((9, 0), (7, 5)), "FAIL", "H200 has 7.5", "activation.cu", "sm_80", ranks=[1])


def test_memory():
    def judged(*cards):
        return gpu.judge_memory(job(*["a"] * len(cards), gpu_mapping=list(cards)), [None] * len(cards))

    assert_finding(judged(card(free=70), card(free=79)), "OK", "70.0 of 80.0 GB")
    assert_finding(judged(card(free=79), card(free=40)), "WARN", "40.0 of 80.0 GB are free (rank 1)", "--kv-memory",
                   ranks=[1])
    assert_finding(judged(card(free=79), card(free=1), card(free=40)), "FAIL", "1.0 of", ranks=[1])


def test_peers(monkeypatch):
    api = SimpleNamespace(getDeviceCount=lambda: 3, deviceCanAccessPeer=lambda i, j: int({i, j} != {0, 2}))
    monkeypatch.setattr(cuda, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=api)))
    facts = gpu.probe_peers(job("a"))
    assert facts["pairs"] == [[True, True, False], [True, True, True], [False, True, True]]
    assert_finding(gpu.judge_peers(job("a", "b"), [{"pairs": [[True]]}, facts]), "WARN", "b: GPUs 2-0 cannot", "topo",
                   ranks=[1])
    whole = {"pairs": [[True] * 4] * 4}
    assert_finding(gpu.judge_peers(job("a", "a"), [whole, {"pairs": [[True]]}]), "OK", "a: all 4 GPUs can")
    assert_finding(gpu.judge_peers(job("a"), [{"pairs": [[True]]}]), "OK", "cannot be asked")


LIBRARIES = {"driver": "580.65 (CUDA 13.0)", "driver_cuda": 13, "runtime": "13.2", "nvrtc": "13.0",
             "cublaslt": "13.1.1", "nccl": "2.32.3", "cupy": "14.2.0", "nvrtc_problem": None, "cublaslt_problem": None,
             "nccl_problem": None}


@pytest.mark.parametrize(("change", "status", "parts"), [
    ({}, "OK", ["driver 580.65 (CUDA 13.0), CUDA runtime 13.2, NVRTC 13.0, cuBLASLt 13.1.1, NCCL 2.32.3, CuPy 14.2.0"]),
    ({"driver": "570"}, "FAIL", ["the driver is 580.65 (CUDA 13.0) on ranks 0-1, 570 on rank 2"]),
    ({"runtime": "13.0"}, "FAIL", ["the CUDA runtime is"]), ({"nvrtc": "13.5"}, "FAIL", ["NVRTC is"]),
    ({"cublaslt": "13.0.0"}, "FAIL", ["cuBLASLt is"]), ({"nccl": "2.27.7"}, "FAIL", ["NCCL is"]),
    ({"cupy": "14.0.0"}, "FAIL", ["CuPy is"]),
    ({"nvrtc": None, "nvrtc_problem": "not found"}, "FAIL", ["NVRTC cannot be used on rank 2", "compiled: not found",
                                                             "cutp[cuda13]"]),
    ({"cublaslt": None, "cublaslt_problem": "gone"}, "FAIL", ["cuBLASLt cannot be used on rank 2", "gone"]),
    ({"nccl": None, "nccl_problem": "gone"}, "FAIL", ["NCCL cannot be used on rank 2"]),
])
def test_libraries(change, status, parts):
    finding = gpu_work.judge_libraries(job(*"aaa"), [LIBRARIES, LIBRARIES, LIBRARIES | change])
    assert_finding(finding, status, *parts, ranks=[2] if status == "FAIL" else ())


def test_libraries_of_one_rank():
    none = LIBRARIES | {"nccl": None, "nccl_problem": "gone"}
    assert_finding(gpu_work.judge_libraries(job("a"), [none]), "OK", "NCCL not found")
    assert_finding(gpu_work.judge_libraries(job("a"), [LIBRARIES | {"driver_cuda": 12}]), "FAIL", "newer CUDA than")


def test_what_the_libraries_say(monkeypatch):
    nccl = SimpleNamespace(available=True, get_version=lambda: 23203)
    runtime = SimpleNamespace(driverGetVersion=lambda: 13000, runtimeGetVersion=lambda: 13020)
    module = SimpleNamespace(__version__="14.2.0", cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda, "cupy", lambda: module)
    monkeypatch.setattr(cuda, "_import_nccl", lambda: nccl)
    monkeypatch.setattr(gpu_work, "_cublaslt_version", lambda: (13, 1, 1))
    monkeypatch.setattr(gpu_work, "nvrtc", lambda: SimpleNamespace(version=(13, 0)))
    monkeypatch.setattr(gpu_work, "driver_release", lambda: "580.65.06")
    assert gpu_work.probe_libraries(job("a")) == LIBRARIES | {"driver": "580.65.06 (CUDA 13.0)"}
    nccl.available = False

    def refuse():
        raise DeviceError("no NVRTC")

    monkeypatch.setattr(gpu_work, "nvrtc", refuse)
    facts = gpu_work.probe_libraries(job("a"))
    assert (facts["nvrtc"], facts["nvrtc_problem"], facts["nccl"]) == (None, "no NVRTC", None)
    assert "libnccl" in facts["nccl_problem"]


def test_driver_release(tmp_path):
    file = tmp_path / "version"
    assert gpu_work.driver_release(file) == ""
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC version")
    assert gpu_work.driver_release(file) == "580.65.06"


@pytest.fixture
def computing(monkeypatch):
    """A GPU that computes in the emulation: its memory."""
    with emulated_device(monkeypatch) as memory:
        monkeypatch.setattr(gpu_work, "use_gpu", lambda job: memory)
        yield memory


@pytest.mark.parametrize(("probe", "judge"), [
    (gpu_work.probe_kernel, gpu_work.judge_kernel),
    (gpu_work.probe_matrix_product, gpu_work.judge_matrix_product)])
def test_computing(computing, monkeypatch, probe, judge):
    facts = probe(job("a"))
    assert facts["wrong"] == 0
    assert_finding(judge(job("a"), [facts]), "OK", "right")
    right = computing.numpy

    def flipped(x):
        host = right(x)
        host.reshape(-1).view(np.uint16)[-1] ^= 1
        return host

    monkeypatch.setattr(computing, "numpy", flipped)
    facts = probe(job("a"))
    assert facts["wrong"] == 1
    assert_finding(judge(job("a", "a"), [facts | {"wrong": 0}, facts]), "FAIL", "1 numbers are wrong on rank 1", "Xid",
                   ranks=[1])


def test_the_kernel_is_given_distinct_numbers():
    assert gpu_work._COUNT > 4096 and np.dtype(ml_dtypes.bfloat16) == gpu_work._BF16


@pytest.mark.parametrize(("probe", "change", "status", "part"), [
    ("host", {}, "OK", "1 MB over 2 ranks is right and takes 0.50 ms (the first 3 ms)"),
    ("host", {"wrong": 7}, "FAIL", "7 of 262144 sums are wrong on rank 1"),
    ("host", {"ms": 500.0}, "WARN", "500.00 ms"),
    ("gpu", {"ms": 50.0}, "WARN", "NCCL_DEBUG=INFO"), ("gpu", {"wrong": 1}, "FAIL", "NCCL_P2P_DISABLE")])
def test_all_reduce_judged(probe, change, status, part):
    good = {"wrong": 0, "first": 3.0, "ms": 0.5}
    finding = getattr(all_reduce, f"judge_{probe}")(job(*"aa"), [good, good | change])
    assert_finding(finding, status, part, ranks=[1] if status == "FAIL" else ())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_the_ranks_add(n):
    total = sum(all_reduce.addend(rank) for rank in range(n))
    assert total.nbytes == 1 << 20 and total.dtype == np.float32 and (total == all_reduce.expected_sum(n)).all()
    assert np.count_nonzero(total) > 200_000


def on_host_ranks(n, spoil=None):
    def body(comm):
        here = Job(comm, group=comm)
        if spoil is not None and comm.rank == spoil:
            real = comm.all_reduce

            def wrong(x, *, out):
                real(x, out=out)
                out[5] += 1

            comm.all_reduce = wrong
        return all_reduce.probe_host(here)

    return run_threads(n, body)


def test_host_all_reduce():
    facts = on_host_ranks(3)
    assert [fact["wrong"] for fact in facts] == [0, 0, 0] and all(0 < fact["ms"] < 5000 for fact in facts)
    assert [fact["wrong"] for fact in on_host_ranks(2, spoil=1)] == [0, 1]


class Gpus:
    """Two ranks' stand-in GPUs with NCCL, as far as the check of NCCL uses them."""

    def __init__(self, cupy):
        self.cupy = cupy

    def memory(self, job):
        cupy = self.cupy

        def upload(target, host):
            target[...] = cupy.upload(host)

        return SimpleNamespace(empty=cupy.empty, upload=upload, numpy=cupy.download)


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setattr(nccl_link, "_WARM_UP_SIZES", (2, 16))
    with fake_cupy(monkeypatch) as cupy:
        monkeypatch.setattr(all_reduce, "use_gpu", Gpus(cupy).memory)
        yield cupy


def nccl_examined(cupy, n=2, timeout=20, prepare=lambda gpu: None):
    """The findings of the check of NCCL, whose probe runs in a thread with its rank's GPU."""
    [check] = all_reduce.GPU_CHECKS

    def probe(job):
        with cupy.gpu(job.rank) as gpu:
            prepare(gpu)
            return check.probe(job)

    alone = replace(check, probe=probe, applies=lambda job: True, needs=())
    return run_threads(n, lambda comm: examine(comm, [alone], timeout).findings, timeout=30)[0]


def test_nccl_all_reduce(nccl, monkeypatch):
    waits = []
    waited = NcclCollectives.wait
    monkeypatch.setattr(NcclCollectives, "wait", lambda self, stream=None: waits.append(1) or waited(self, stream))
    [finding] = nccl_examined(nccl)
    assert len(waits) == 2 * 7  # what is timed is the sum, not the start of it
    assert finding.status in ("OK", "WARN") and "1 MB over 2 ranks is right" in finding.message, finding
    assert not nccl.problems and all(len(gpu.calls) >= 7 for gpu in nccl.gpus.values())


def test_nccl_that_is_refused(nccl):
    def refuse(gpu):
        gpu.refuse = "call" if gpu.index == 1 else None

    [finding] = nccl_examined(nccl, timeout=3, prepare=refuse)
    assert finding.status == "FAIL" and "NCCL" in finding.message and 1 in finding.ranks, finding


def test_use_gpu(monkeypatch):
    chosen = []
    runtime = SimpleNamespace(setDevice=chosen.append, getDevice=lambda: 3)
    monkeypatch.setattr(cuda, "cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    memory = gpu.use_gpu(job("a", gpu_mapping=[card(3)]))
    assert chosen == [3] and memory.device == 3


def test_probe_mapping(monkeypatch):
    info = SimpleNamespace(index=1, uuid="", pci_bus_id="0000:01:00.0", name="H200", capability=(9, 0))
    monkeypatch.setattr(gpu, "select_device", lambda name, local_rank: DeviceRef.GPU({"cuda": 1}[name]))
    monkeypatch.setattr(cuda, "device_info", lambda index: info if index == 1 else None)
    monkeypatch.setattr(gpu, "CudaMemory", lambda index: SimpleNamespace(free_bytes=lambda: (5, 9)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("CUTP_SHARE_GPU", raising=False)
    assert gpu.probe_mapping(job("a")) == {
        "index": 1, "card": "0000:01:00.0", "name": "H200", "capability": [9, 0], "free": 5, "total": 9,
        "visible": "4,5", "share": False}
