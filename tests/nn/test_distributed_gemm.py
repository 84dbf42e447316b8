"""Row-parallel products in chunks whose sums overlap the next product: the same result, and really overlapped."""

from dataclasses import replace

import numpy as np
import pytest

from cutp import nn
from cutp.comm.device_group import DeviceGroup
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.kv_cache import KVCacheParams, allocate_caches
from cutp.nn.distributed_gemm import matmul_allreduce
from cutp.nn.module import sharded
from tests.nn.building import close, cpus, fill
from tests.nn.decoder import EVERYTHING, Spec, all_by_hand, build

float32 = np.dtype(np.float32)
ROWS = (0, 1, 31, 32, 63, 64, 200, 513)
CONFIG = nn.DistributedGemmConfig(True)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def row_parallel(devices, in_dim=13, has_bias=True):
    """A layer and its shards."""
    layer = nn.Linear(in_dim, 6, float32, has_bias=has_bias)
    fill(layer)
    return layer, sharded(layer, nn.ShardingStrategy.columnwise(len(devices)), devices)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_equals_the_plain_sum(n, rows):
    """In one process, and over threads: the same bits."""
    group = DeviceGroup(cpus(n))
    layer, shards = row_parallel(group)
    x = noise(rows, 13)
    parts = np.array_split(x, n, axis=1)
    got = matmul_allreduce(shards, parts, group)
    assert len(got) == n
    for y in got:
        close(y, layer(x))  # with the bias, once
        assert y.shape == (rows, 6) and y.dtype == np.float32

    def rank_main(comm):
        group = DeviceGroup.of(comm)
        _, own = row_parallel(group)
        return matmul_allreduce(own, [parts[comm.rank]], group)

    for [y] in run_threads(n, rank_main, timeout=20):
        np.testing.assert_array_equal(y, got[0])


class Recorder(DeviceGroup):
    """A group that notes when sums are started and waited for."""

    def __init__(self, n, log):
        super().__init__(cpus(n))
        self.log = log

    def all_reduce_async(self, xs, out=None):
        number = sum(event == "start" for event, _ in self.log)
        self.log.append(("start", len(xs[0])))
        pending, log = super().all_reduce_async(xs, out), self.log

        class Noted:
            def wait(self):
                log.append(("wait", number))
                return pending.wait()

        return Noted()

    def all_reduce(self, xs):
        if len(self.log) and self.log[-1][0] == "start":  # called by all_reduce_async
            return super().all_reduce(xs)
        self.log.append(("sum", len(xs[0])))
        return super().all_reduce(xs)


@pytest.mark.parametrize("rows, chunks", [(1, 1), (63, 1), (64, 2), (96, 3), (200, 4), (513, 4)])
def test_a_sum_is_under_way_while_the_next_chunk_is_computed(rows, chunks):
    log = []
    group = Recorder(2, log)
    _, shards = row_parallel(group)

    def noted(shard):
        return lambda x: log.append(("compute", len(x))) or shard(x)

    parts = np.array_split(noise(rows, 13), 2, axis=1)
    matmul_allreduce([noted(shards[0]), shards[1]], parts, group)
    sizes = [size for event, size in log if event == "compute"]
    assert len(sizes) == chunks and sum(sizes) == rows and max(sizes) - min(sizes) <= 1
    if chunks == 1:
        assert log == [("compute", rows), ("sum", rows)]
    else:
        assert log == [event for size in sizes for event in (("compute", size), ("start", size))] + [
            ("wait", i) for i in range(chunks)]


def test_a_single_row_count_is_not_split_below_the_least():
    log = []
    group = Recorder(1, log)
    layer, shards = row_parallel(group)
    for rows in (0, 31, 32, 63):
        log.clear()
        x = noise(rows, 13)
        np.testing.assert_array_equal(matmul_allreduce(shards, [x], group)[0], layer(x))
        assert log == [("sum", rows)]


def test_one_layer_for_every_input():
    group = DeviceGroup(cpus(2))
    _, shards = row_parallel(group)
    with pytest.raises(ValueError):
        matmul_allreduce(shards, [noise(4, 7)], group)


def prompts_of(rows):
    return [np.arange(rows) % 13, [4, 2]]


def model_result(spec, devices, values, rows):
    model = build(spec, devices)
    fill(model, values)
    prompts = prompts_of(rows)
    batch = nn.RaggedBatch.of(prompts, 3)
    (last,) = model(batch, allocate_caches(model.kv_params, 2 * -(-rows // 3), model.group))
    return last


@pytest.mark.parametrize("rows", (1, 31, 64, 130))
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_a_whole_model(n, rows):
    """Blocks and attention; biases of both row-parallel layers, uneven heads, a residual multiplier."""
    spec = replace(EVERYTHING, heads=5, kv_heads=1)
    values = fill(build(spec, cpus(1)))
    overlap = replace(spec, overlap=True)
    plain, got = (model_result(s, cpus(n), values, rows) for s in (spec, overlap))
    close(got, plain, 1e-5)
    close(got, all_by_hand(values, spec, prompts_of(rows)).logits[[rows - 1, rows + 1]], 2e-4)
    for other in run_threads(n, lambda comm: model_result(overlap, comm, values, rows), timeout=30):
        np.testing.assert_array_equal(other, got)


@pytest.mark.parametrize("rows", (40, 100))
def test_a_block_and_its_attention_sum_in_chunks_only_when_asked(rows):
    for config, expected in ((CONFIG, 6 if rows == 100 else 0), (nn.DistributedGemmConfig(), 0), (None, 0)):
        group, started = DeviceGroup(cpus(2)), []
        plain = group.all_reduce_async
        group.all_reduce_async = lambda xs, out=None, plain=plain, started=started: (
            started.append(len(xs[0])) or plain(xs, out))
        attention = nn.AttentionWithRope(6, 3, 1, 2, float32, None)
        block = nn.DistributedTransformerBlock(
            nn.TensorParallelAttentionWithRope(attention, group, config), nn.MLP(6, 5, float32), nn.RMSNorm(6, float32),
            nn.RMSNorm(6, float32), group, config)
        fill(block)
        caches = allocate_caches(KVCacheParams(float32, 3, 1, 2, 1, page_size=8), 13, group)
        block(0, [noise(rows, 6)] * 2, caches, nn.RaggedBatch.of([[0] * rows], 8))
        assert len(started) == expected and sum(started) == (2 * rows if expected else 0), "40 rows are one chunk"


def test_only_an_mlp_has_a_down_projection_to_split():
    class Other(nn.Linear):
        def _accepts(self, strategy):
            return strategy.kind == "tensor_parallel"

        def _shard(self, strategy, rank):
            return super()._shard(nn.ShardingStrategy.replicate(strategy.num_devices), rank)

    def block(config):
        attention = nn.TensorParallelAttentionWithRope(nn.AttentionWithRope(6, 2, 2, 2, float32, None), cpus(2))
        return nn.DistributedTransformerBlock(attention, Other(6, 6, float32), nn.RMSNorm(6, float32),
                                              nn.RMSNorm(6, float32), cpus(2), config)

    block(None)
    block(nn.DistributedGemmConfig(False))
    with pytest.raises(ConfigError, match="enable_matmul_allreduce needs an MLP, not a Other"):
        block(CONFIG)


@pytest.mark.parametrize("value, enabled", [(None, False), ("", False), ("0", False), ("1", True)])
def test_generate_reads_the_environment(value, enabled, monkeypatch):
    monkeypatch.delenv("CUTP_MATMUL_ALLREDUCE", raising=False)
    if value is not None:
        monkeypatch.setenv("CUTP_MATMUL_ALLREDUCE", value)
    assert nn.DistributedGemmConfig.generate() == nn.DistributedGemmConfig(enabled)
    assert nn.DistributedGemmConfig().enable_matmul_allreduce is False


@pytest.mark.parametrize("value", ["yes", "2", "true", " 1", "off"])
def test_other_values_are_refused(value, monkeypatch):
    monkeypatch.setenv("CUTP_MATMUL_ALLREDUCE", value)
    with pytest.raises(ConfigError, match=f"CUTP_MATMUL_ALLREDUCE='{value}'"):
        nn.DistributedGemmConfig.generate()


def test_the_default_model_does_not_overlap():
    assert not build(Spec(), cpus(1)).layers[0].overlap_down_proj
