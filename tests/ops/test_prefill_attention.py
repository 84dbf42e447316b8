"""What prefill_attention.cu and prefill_attention_hopper.cu have to do alike, against the NumPy attention."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest

from tests.ops.prefill_batch import Batch, HopperBatch, few_hopper_blocks, same_bits


@pytest.fixture(params=[Batch, HopperBatch])
def make(request, device, monkeypatch):
    with few_hopper_blocks(device, monkeypatch) if request.param is HopperBatch else nullcontext():
        yield partial(request.param, device)


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16])
def test_groups_of_query_heads(make, group):
    sinks = np.linspace(-1, 1, group, dtype=np.float32)
    make([(3, 43), (70, 2)], group=group, page_size=32).check(sinks=sinks)


def test_random_batches(device, make):
    rng = np.random.default_rng(0)
    kinds = make.func.emulated if device.emulated else make.func.kinds
    longest = make.func.longest_emulated if device.emulated else 700
    for seed in range(5 if device.emulated else 100):
        requests = [tuple(rng.integers(0, longest, 2)) for _ in range(rng.integers(1, 5))]
        group, page_size = int(rng.choice([1, 2, 3, 4, 6])), int(rng.choice([16, 32, 48, 64, 128]))
        batch = make(requests, *kinds[seed % len(kinds)], group=group, n_kv_heads=int(rng.integers(1, 3)),
                     page_size=page_size, seed=seed)
        batch.check(window=int(rng.integers(1, longest)) if rng.random() < 0.5 else None,
                    softcap=2.0 if rng.random() < 0.5 else None)


def test_requests_may_share_pages(make):
    batch = make([(64, 20), (64, 20)])
    batch.case.table[1, :4] = batch.case.table[0, :4]
    batch.check()


@pytest.mark.parametrize("sink", [-30.0, 30.0])
def test_extreme_sinks(make, sink):
    make([(0, 40)]).check(sinks=np.array([sink, 0.0], np.float32))


def test_a_query_of_nan_stays_alone(make):
    batch = make([(0, 70)])
    before = batch.run()
    batch.case.q[33, 1] = np.nan
    after = batch.run()
    assert np.isnan(after[33, 1].astype(np.float32)).all()
    before[33, 1] = after[33, 1] = 0
    assert same_bits(before, after)


def test_queries_inside_of_a_wider_array(device, make):
    batch = make([(12, 40)], group=2, n_kv_heads=2)
    q = batch.case.q
    wide = device.array(np.concatenate([q, np.full_like(q, np.nan)], axis=1))
    assert same_bits(batch.run(q=wide[:, : q.shape[1]]), batch.run())


def test_long_prompts(device, make):
    n = 1 if device.emulated else 10
    for name, head_dim in make.func.long_emulated if device.emulated else make.func.kinds:
        requests = [(0, 210 * n), (300 * n, 70 * n), (90 * n, 0), (31, 31)]
        make(requests, name, head_dim, group=4, page_size=64).check()
        make([(100 * n, 110 * n)], name, head_dim, group=4, page_size=64).check(window=51 * n, softcap=30.0)
