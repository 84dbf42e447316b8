"""Layers on (emulated) device arrays: what the tests of whole models on a GPU cannot see."""

import shutil

import numpy as np
import pytest

from cutp.array.scratch import Scratch
from cutp.kv_cache.params import KVCacheParams
from cutp.nn import device_latent
from cutp.nn.device_latent import LatentShape
from cutp.nn.linear import Linear
from cutp.nn.mlp import MLP
from cutp.nn.moe import Experts, MoE
from cutp.nn.moe_router import GroupLimitedRouter, SoftmaxRouter, TopKSoftmaxRouter
from cutp.nn.storage import DeviceStorage
from cutp.ops import decode_attention_cuda, prefill_attention_cuda
from cutp.ops.launch_arguments import ATTENTION_HEAD_DIMS
from tests.device_arrays import emulated_device
from tests.ops.kernel_results import bfloat16, float32
from tests.ops.test_latent_decode_cuda import Case, assert_close

HIDDEN = 32


@pytest.fixture
def memory(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("the emulation of kernels needs g++")
    with emulated_device(monkeypatch) as memory, Scratch(memory).use():
        yield memory


def uploaded(memory, host):
    there = memory.empty(host.shape, host.dtype)
    memory.upload(there, np.ascontiguousarray(host))
    return there


def both(memory, make, seed=0):
    """The same module on the host and on the device."""
    host, rng = make(), np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(weight.shape).astype(np.float32) * np.float32(0.3)
               for name, weight in host.named_weights()}
    host.load(tensors)
    with DeviceStorage(memory).use():
        device = make()
        device.load(tensors)
    return host, device


ROUTERS = {
    "softmax": lambda: SoftmaxRouter(HIDDEN, 6, 2, float32, renormalize=True),
    "top_k_softmax": lambda: TopKSoftmaxRouter(HIDDEN, 6, 3, float32, has_bias=True),
    "group_limited": lambda: GroupLimitedRouter(HIDDEN, 6, 2, float32, num_groups=3, top_groups=2, scaling=2.0),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_without_a_slot_have_no_experts(memory, router):
    host, device = both(memory, lambda: MoE(ROUTERS[router](), Experts(6, HIDDEN, 21, float32, has_bias=True)))
    x = np.random.default_rng(1).standard_normal((7, HIDDEN)).astype(np.float32)
    slots = np.array([3, -1, 0, 8, -1, -1, 5])
    expected = np.where(slots[:, None] >= 0, host(x), 0)
    got = memory.numpy(device(uploaded(memory, x), uploaded(memory, slots)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert not got[slots < 0].any()
    np.testing.assert_allclose(memory.numpy(device(uploaded(memory, x))), host(x), rtol=1e-5, atol=1e-5)


def test_a_gate_of_the_shared_experts(memory):
    host, device = both(memory, lambda: MoE(
        ROUTERS["softmax"](), Experts(6, HIDDEN, 16, float32), shared_experts=MLP(HIDDEN, 24, float32),
        shared_expert_gate=Linear(HIDDEN, 1, float32)))
    x = np.random.default_rng(2).standard_normal((5, HIDDEN)).astype(np.float32)
    np.testing.assert_allclose(memory.numpy(device(uploaded(memory, x))), host(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 2 * 4 * 3 * 514 * 4, 1 << 29])
def test_requests_in_as_many_launches_as_there_is_room(memory, monkeypatch, limit):
    """One row a launch, two, all."""
    monkeypatch.setattr(device_latent, "_PARTIALS_BYTES", limit)
    case = Case(bfloat16, [70, 0, 130, 64, 1], 3, page_size=64)
    params = KVCacheParams(bfloat16, 3, 1, 576, 1, latent=True)
    work = LatentShape(3, 576, 512, ()).workspace(memory, 5, case.table.shape[1], params.page_size, 2, bfloat16)
    assert work.fast and len(work.plans) == {1: 5, 1 << 29: 1}.get(limit, 3)
    q, pages, table, lengths = (uploaded(memory, a) for a in (case.q, case.pages, case.table, case.lengths))
    out = memory.empty((5, 3, 512), bfloat16)
    work.prepare(lengths)
    work.attend_decode(q, pages, table, lengths, case.scale, out)
    assert_close(memory.numpy(out), case)
    # The same as tokens of prompts.
    again, rows = memory.empty((5, 3, 512), bfloat16), uploaded(memory, np.arange(5))
    work.attend_prompts(q, pages, table, lengths, rows, case.scale, again)
    assert_close(memory.numpy(again), case)


def test_cache_of_kernels():
    assert ATTENTION_HEAD_DIMS == decode_attention_cuda._HEAD_DIMS == prefill_attention_cuda._HEAD_DIMS
    for dtype, head_dim, expected in ((float32, 4, 64), (bfloat16, 64, 64), (bfloat16, 72, 80), (bfloat16, 112, 128),
                                      (float32, 192, 256), (bfloat16, 256, 256)):
        assert KVCacheParams(dtype, 2, 1, head_dim, 1).for_kernels().head_dim == expected
    latent = KVCacheParams(bfloat16, 2, 1, 576, 1, latent=True)
    assert latent.for_kernels() == latent
