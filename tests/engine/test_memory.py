"""What weights and cache take: sizes as users write them, the plan of a GPU, and what a refusal says."""

import logging
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cutp import LLM, run_threads
from cutp.array.device import DeviceRef
from cutp.checkpoint.config import load_config
from cutp.comm.device_group import DeviceGroup
from cutp.engine import memory as memory_plan
from cutp.engine.loading import EngineOptions, _default_dtype
from cutp.engine.memory import parse_bytes, plan_cache_pages, plan_device_memory, weight_bytes
from cutp.engine.replicas import split_replicas
from cutp.errors import CapacityError, ConfigError
from cutp.kv_cache.params import KVCacheParams
from cutp.models.registry import find_family
from cutp.nn.storage import DeviceStorage
from tests.device_arrays import EmulatedMemory

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE = 64 * 2 * 2 * 2 * 12 * 2  # of the model below: tokens, planes, layers, heads, channels, bytes


@pytest.mark.parametrize("text, count", [
    (5, 5), ("5", 5), ("20GB", 20 * 10**9), (" 1.5 GiB ", 3 * 2**29), ("3kb", 3000), ("2KiB", 2048), ("7B", 7),
    ("1TB", 10**12), ("0.5 MB", 500_000), ("4mib", 4 << 20)])
def test_sizes(text, count):
    assert parse_bytes(text, "kv_memory") == count


@pytest.mark.parametrize("text", [0, -1, True, 1.5, None, "", "GB", "-1GB", "1 PB", "1e9", "1,5GB", "0GB", "0.1B",
                                  "٣GB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="kv_memory must be a positive number of bytes, not .*20GB"):
        parse_bytes(text, "kv_memory")


def test_options():
    assert EngineOptions.of({"kv_memory": "1 kB"}).kv_memory == 1000 and EngineOptions.of({}).kv_memory is None
    with pytest.raises(ConfigError, match="kv_tokens and kv_memory both"):
        EngineOptions.of({"kv_memory": 1000, "kv_tokens": 10})
    with pytest.raises(ConfigError, match="random_weights must be true or false"):
        EngineOptions.of({"random_weights": 1})


@pytest.fixture
def small(monkeypatch):
    """Reserves that suit a tiny model."""
    monkeypatch.setattr(memory_plan, "_DEVICE_RESERVE", 1000)
    monkeypatch.setattr(memory_plan, "_pass_bytes", lambda *_: 500)


def planned(tiny, frees, *, tp=None, max_len=1000, kv_tokens=None, kv_memory=None, sharers=1):
    """(the plan of each rank, its weights' bytes) where so many bytes are free; the error's text where there is one."""
    config = load_config(tiny("gqa"))

    def rank_main(comm):
        replicas = split_replicas(comm, tp)
        group = DeviceGroup.planned(replicas.group.size, replicas.group.rank)
        model = find_family(config).build(config, group, BF16, 64)
        memory = EmulatedMemory(frees[comm.rank])
        with DeviceStorage(memory).use():
            try:
                return plan_device_memory(model, max_len, kv_tokens, kv_memory, replicas, memory, max_batch_tokens=64,
                                          max_running=4, sharers=sharers), weight_bytes(model)
            except CapacityError as error:
                return str(error)

    return run_threads(len(frees), rank_main)


def test_the_cache_takes_most_of_what_is_left(tiny, small):
    (plan, weights), = planned(tiny, [10**6], max_len=10**6)
    assert plan.page_bytes == PAGE and plan.weights == weights and plan.reserve == 1500
    assert plan.pages == int((10**6 - weights - 1500) * 0.9) // PAGE and plan.tokens == plan.pages * 64
    assert str(plan) == f"weights 0.0 GB + KV 0.0 GB for {plan.tokens} tokens, of 0.0 GB free"
    (useful, _), = planned(tiny, [10**9], max_len=100)
    assert useful.pages == 64 * 2


def test_the_sentence():
    plan = memory_plan.DevicePlan(8_030_000_000, 10**9, 8 << 20, 2552, 327_680, 139_000_000_000)
    assert str(plan) == "weights 8.0 GB + KV 21.4 GB for 327k tokens, of 139.0 GB free"


def test_the_rank_with_the_least_room_decides(tiny, small):
    plans = planned(tiny, [10**6, 400_000, 10**6], tp=1, max_len=10**6)
    assert len({plan.pages for plan, _ in plans}) == 1
    assert plans[0][0].pages == int((400_000 - plans[0][1] - 1500) * 0.9) // PAGE
    assert [plan.free for plan, _ in plans] == [10**6, 400_000, 10**6]


def test_ranks_that_share_a_gpu_divide_it(tiny, small):
    (plan, weights), = planned(tiny, [10**6], max_len=10**6, sharers=2)
    assert plan.free == 500_000 and plan.pages == int((500_000 - weights - 1500) * 0.9) // PAGE


def test_a_cache_of_a_given_size(tiny, small):
    assert planned(tiny, [10**6], kv_memory=5 * PAGE + 7)[0][0].pages == 5
    assert planned(tiny, [10**6], kv_tokens=65)[0][0].pages == 2
    assert planned(tiny, [10**6, 10**6], kv_memory=5 * PAGE)[0][0].pages == 10  # a half of each page on each rank


def test_refusals_state_the_arithmetic(tiny, small, monkeypatch):
    weights = planned(tiny, [10**6])[0][1]
    monkeypatch.setattr(memory_plan, "_gb", str)
    free = weights + 1500 + PAGE
    assert planned(tiny, [free])[0][0].pages == 1
    for error in planned(tiny, [10**6, free - 1], tp=1):
        assert error.startswith("rank 1 (") and (
            f"weights {weights} + 1500 to compute with + {PAGE} for one page of the cache are {free}, and {free - 1} "
            "are free on its GPU (use more ranks") in error
    assert planned(tiny, [free + PAGE], kv_tokens=128)[0][0].pages == 2
    error, = planned(tiny, [free], kv_tokens=128)
    assert (f"weights {weights} + 1500 to compute with + KV {2 * PAGE} for 128 tokens are {free + PAGE}, and {free} "
            f"are free on its GPU (set kv_memory to at most {PAGE})") in error
    error, = planned(tiny, [free], kv_memory=PAGE - 1)
    assert f"kv_memory of {PAGE - 1} is less than one page of the cache, {PAGE}" in error


def test_the_reserve_grows_with_the_passes(tiny):
    config = load_config(tiny("gqa"))
    model = find_family(config).build(config, DeviceGroup.planned(1, 0), BF16, 64)
    one, more, wide = (memory_plan._pass_bytes(model, size, tokens, 8) for size, tokens in ((1, 64), (1, 640), (2, 64)))
    assert more > 2 * one and wide < one
    logits = 8 * model.vocab_size * 4
    assert one > 3 * logits


def test_a_given_size_on_the_host(monkeypatch):
    params = KVCacheParams(BF16, 4, 2, 12, 2)
    replicas = SimpleNamespace(
        comm=SimpleNamespace(local_size=2, host=SimpleNamespace(all_gather_json=lambda value: [value])),
        group=SimpleNamespace(size=1, rank=0))
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: 40 * PAGE)
    assert plan_cache_pages(params, 10**6, None, replicas) == 10
    assert plan_cache_pages(params, 10**6, None, replicas, 3 * PAGE + 1) == 3
    with pytest.raises(CapacityError, match="a cache of 704 tokens .*set a smaller kv_tokens or kv_memory"):
        plan_cache_pages(params, 10**6, None, replicas, 11 * PAGE)
    with pytest.raises(CapacityError, match="no rank-wide room"):
        plan_cache_pages(params, 10**6, None, replicas, PAGE - 1)


def test_kv_memory_of_an_llm(tiny, caplog, monkeypatch):
    monkeypatch.setattr("cutp.engine.loading._WORTH_TELLING", 0)
    caplog.set_level(logging.INFO, "cutp")
    with LLM(tiny("gqa"), kv_memory="1 MB", progress=None) as llm:
        memory = llm.memory()
        assert 10**6 - 2 * PAGE < memory["cache_bytes"] <= 10**6
        assert set(llm.load_report) == {"bytes", "seconds", "gb_per_second"} and llm.load_report["bytes"] > 0
    assert "read 0.0 GB of weights in" in caplog.text
    with pytest.raises(ConfigError, match="kv_memory"):
        LLM(tiny("gqa"), kv_memory="much")


def test_progress_adds_up(tiny):
    seen = []
    with LLM(tiny("odd_ffn"), progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("saved, on_gpu", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"),
                                           (None, "bfloat16"), ("float8_e4m3fn", "bfloat16")])
def test_default_dtypes(saved, on_gpu):
    assert _default_dtype(DeviceRef.CPU(), saved) == "float32"
    assert _default_dtype(DeviceRef.GPU(), saved) == on_gpu
