"""Weights and the module tree: shapes, names, shards, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.device_group import DeviceGroup
from cutp.comm.threads import run_threads
from cutp.errors import ConfigError, ShapeMismatchError
from cutp.nn.embedding import Embedding
from cutp.nn.linear import Linear, StackedLinear
from cutp.nn.mlp import MLP
from cutp.nn.module import Module, ShardableModule, Shards, Weight, cut, sharded
from cutp.nn.norm import LayerNorm, RMSNorm
from cutp.nn.sharding import EvenSegment, ShardingStrategy
from tests.nn.building import DEVICE_COUNTS, cpus, fill

float32 = np.dtype(np.float32)
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def test_a_weight_takes_no_memory_before_it_is_loaded():
    weight = Weight((10**6, 10**6), bfloat16)
    assert weight.data is None and weight.num_elements == 10**12 and weight.local_bytes == 2 * 10**12
    assert weight.axis is None and weight.ranges is None and weight.local_shape == weight.shape


@pytest.mark.parametrize("size", DEVICE_COUNTS)
def test_shards_know_their_part_with_and_without_data(size):
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    for loaded in (False, True):
        weight = Weight((7, 5), float32)
        if loaded:
            weight.store(values)
        parts = [weight.share(ShardingStrategy.rowwise(size), rank) for rank in range(size)]
        for part, expected in zip(parts, np.array_split(values, size), strict=True):
            assert part.shape == (7, 5) and part.num_elements == 35 and part.axis == 0
            assert part.local_shape == expected.shape and part.local_bytes == 4 * expected.size
            if loaded:
                np.testing.assert_array_equal(part.data, expected)
            else:
                assert part.data is None


def test_replicated_weight():
    weight = Weight((3,), float32).share(ShardingStrategy.replicate(2), 1)
    assert weight.axis is None and weight.ranges is None and weight.local_shape == (3,)


def test_store_rounds_to_the_dtype_and_keeps_float32():
    weight = Weight((2,), bfloat16)
    weight.store(np.array([257.5, 1.0]))
    assert weight.data.dtype == float32
    np.testing.assert_array_equal(weight.data, [258, 1])
    before = weight.data
    weight.store(np.array([2, 3], bfloat16))
    assert weight.data is before  # views of a stacked buffer stay valid


@pytest.mark.parametrize("shape", [(3,), (1, 2), ()])
def test_store_refuses_another_shape(shape):
    with pytest.raises(ShapeMismatchError, match=r"\(2,\)"):
        Weight((2,), float32).store(np.zeros(shape))


def test_store_takes_the_local_shape():
    part = Weight((5,), float32).share(ShardingStrategy.rowwise(2), 1)
    with pytest.raises(ShapeMismatchError, match=r"shape \(5,\).*shape \(2,\)"):
        part.store(np.zeros(5))
    part.store(np.arange(2))


def test_a_shard_cannot_be_sharded_again():
    for strategy in (ShardingStrategy.rowwise(2), ShardingStrategy.replicate(2)):
        part = Weight((4,), float32).share(strategy, 0)
        with pytest.raises(ConfigError, match="already a shard"):
            part.share(ShardingStrategy.rowwise(2), 0)


def test_a_strategy_that_does_not_fit_is_refused_at_once():
    with pytest.raises(ConfigError, match="axis 1"):
        Weight((4,), float32).share(ShardingStrategy.columnwise(2), 0)
    with pytest.raises(NotImplementedError):
        Weight((4,), float32).share(ShardingStrategy.tensor_parallel(2), 0)


def test_cut_joins_ranges():
    x = np.arange(12).reshape(3, 4)
    assert cut(x, None, None) is x
    np.testing.assert_array_equal(cut(x, 1, [(0, 1), (2, 4), (4, 4)]), x[:, [0, 2, 3]])
    assert cut(x, 0, [(1, 1)]).shape == (0, 4)


MODULES = {
    "Linear": lambda: Linear(4, 6, float32, has_bias=True),
    "StackedLinear": lambda: StackedLinear(4, ("a", "b"), [EvenSegment(3), EvenSegment(5)], float32),
    "Embedding": lambda: Embedding(9, 4, float32),
    "RMSNorm": lambda: RMSNorm(4, float32),
    "LayerNorm": lambda: LayerNorm(4, float32),
    "MLP": lambda: MLP(4, 6, float32),
}
STRATEGIES = {"replicate": ShardingStrategy.replicate(2), "rowwise": ShardingStrategy.rowwise(2),
              "columnwise": ShardingStrategy.columnwise(2), "tensor_parallel": ShardingStrategy.tensor_parallel(2)}
ACCEPTED = {"Linear": {"replicate", "rowwise", "columnwise"}, "StackedLinear": {"replicate", "tensor_parallel"},
            "Embedding": {"replicate", "rowwise"}, "RMSNorm": {"replicate"}, "LayerNorm": {"replicate"},
            "MLP": {"replicate", "tensor_parallel"}}


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("name", MODULES)
def test_strategies_each_module_accepts(name, kind):
    module = MODULES[name]()
    if kind in ACCEPTED[name]:
        module.sharding_strategy = STRATEGIES[kind]
        assert module.sharding_strategy is STRATEGIES[kind]
        assert len(module.shard(cpus(2))) == 2
    else:
        with pytest.raises(ConfigError, match=f"{name} cannot be sharded by strategy '{kind}'"):
            module.sharding_strategy = STRATEGIES[kind]
        assert module.sharding_strategy is None


@pytest.mark.parametrize("name", MODULES)
def test_errors_of_shard(name):
    module = MODULES[name]()
    with pytest.raises(ConfigError, match=f"{name} has no sharding strategy"):
        module.shard(cpus(2))
    module.sharding_strategy = ShardingStrategy.replicate(2)
    with pytest.raises(ConfigError, match="for 2 devices, but 3 were given"):
        module.shard(cpus(3))
    [part, _] = module.shard(cpus(2))
    assert part.sharding_strategy is None
    with pytest.raises(ConfigError, match="already a shard"):
        sharded(part, ShardingStrategy.replicate(2), cpus(2))


@pytest.mark.parametrize("name", MODULES)
def test_sharding_leaves_the_module_as_it_was(name):
    module = MODULES[name]()
    fill(module)
    before = {key: weight.data.copy() for key, weight in module.named_weights()}
    kind = "tensor_parallel" if "tensor_parallel" in ACCEPTED[name] else "replicate"
    for part in sharded(module, STRATEGIES[kind], cpus(2)):
        for _, weight in part.named_weights():
            weight.data[...] = np.nan
    for key, weight in module.named_weights():
        assert weight.strategy is None
        np.testing.assert_array_equal(weight.data, before[key])


def test_under_a_communicator_there_is_one_shard():
    def rank_main(comm):
        [part] = sharded(Linear(4, 7, float32), ShardingStrategy.rowwise(3), comm)
        return part.weight.ranges

    assert run_threads(3, rank_main) == [[(0, 3)], [(3, 5)], [(5, 7)]]
    [part] = sharded(Linear(4, 7, float32), ShardingStrategy.rowwise(3), DeviceGroup.planned(3, 2))
    assert part.weight.local_shape == (2, 4)


class Leaf(Module):
    def __init__(self):
        self.weight = Weight((2,), float32)


class Glass(Leaf):
    transparent = True


class Tree(Module):
    def __init__(self):
        self.first = Leaf()
        self.layers = [Leaf(), Leaf()]
        self.halves = Shards([Leaf(), Leaf()])
        self.shards = Shards([Leaf()])
        self.glass = Glass()
        self.tied = self.first
        self.nothing = None
        self.numbers = [1, 2]


def test_names_of_the_tree():
    assert [name for name, _ in Tree().named_weights("top.")] == [
        "top.first.weight", "top.layers.0.weight", "top.layers.1.weight", "top.halves.weight", "top.halves.weight",
        "top.weight", "top.weight"]


def test_modules_come_parents_first():
    tree = Tree()
    modules = list(tree.modules())
    assert modules[:4] == [tree, tree.first, *tree.layers]
    assert tree.glass in modules and len(modules) == 9


def test_an_unfinished_module_says_so():
    with pytest.raises(NotImplementedError):
        ShardableModule().sharding_strategy = ShardingStrategy.replicate(1)
