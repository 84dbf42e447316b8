"""The gated feed-forward layer, whole and divided."""

import math

import ml_dtypes
import numpy as np
import pytest

from cutp.errors import UnsupportedModelError
from cutp.nn.distributed_transformer import forward_sharded_layers
from cutp.nn.mlp import MLP
from cutp.nn.module import sharded
from cutp.nn.sharding import ShardingStrategy
from tests.nn.building import DEVICE_COUNTS, close, cpus, fill

ACTIVATIONS = {"silu": lambda v: v / (1 + np.exp(-v)), "relu": lambda v: np.maximum(v, 0), "tanh": np.tanh,
               "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2)))}


def inputs(seed=0):
    return np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)


def by_hand(x, values, activation="silu", limit=None):
    def linear(name, y):
        return y @ values[f"{name}.weight"].astype(np.float64).T + values.get(f"{name}.bias", 0)

    gate, up = linear("gate_proj", x.astype(np.float64)), linear("up_proj", x.astype(np.float64))
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return linear("down_proj", ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("limit", [None, 0.3])
def test_equals_the_formula(activation, limit):
    mlp = MLP(6, 10, np.float32, activation=activation, swiglu_limit=limit, has_bias=True)
    values = fill(mlp)
    close(mlp(inputs()), by_hand(inputs(), values, activation, limit))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_shards_sum_to_the_layer(n, width, has_bias):
    mlp = MLP(6, width, np.float32, has_bias=has_bias)
    values = fill(mlp)
    shards = sharded(mlp, ShardingStrategy.tensor_parallel(n), cpus(n))
    widths = [shard.activated(inputs()).shape[1] for shard in shards]
    assert widths == [len(part) for part in np.array_split(np.arange(width), n)]
    close(sum(forward_sharded_layers(shards, [inputs()] * n)), by_hand(inputs(), values))


@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_replicas(n):
    mlp = MLP(6, 10, np.float32, has_bias=True)
    fill(mlp)
    for y in forward_sharded_layers(sharded(mlp, ShardingStrategy.replicate(n), cpus(n)), [inputs()] * n):
        np.testing.assert_array_equal(y, mlp(inputs()))


def test_bfloat16_stays_bfloat16():
    mlp = MLP(6, 10, ml_dtypes.bfloat16)
    values = fill(mlp)
    y = mlp(inputs().astype(ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    close(y.astype(np.float32), by_hand(inputs(), values), 0.03)


def test_unknown_activation():
    with pytest.raises(UnsupportedModelError, match="'mish'"):
        MLP(6, 10, np.float32, activation="mish")


@pytest.mark.parametrize("has_bias", [False, True])
def test_names(has_bias):
    kinds = ("weight", "bias") if has_bias else ("weight",)
    for fused, modules in ((False, ("gate_proj", "up_proj", "down_proj")), (True, ("gate_up_proj", "down_proj"))):
        names = [name for name, _ in MLP(6, 10, np.float32, has_bias=has_bias, fused=fused).named_weights()]
        assert names == [f"{module}.{kind}" for module in modules for kind in kinds]


@pytest.mark.parametrize("n", (1, 2, 3))
def test_gate_and_up_in_one_weight(n):
    apart, fused = MLP(6, 7, np.float32), MLP(6, 7, np.float32, fused=True)
    values = fill(apart)
    fused.load({"gate_up_proj.weight": np.concatenate([values.pop("gate_proj.weight"), values.pop("up_proj.weight")]),
                **values})
    shards = sharded(fused, ShardingStrategy.tensor_parallel(n), cpus(n))
    close(sum(forward_sharded_layers(shards, [inputs()] * n)), apart(inputs()))
