"""The token embedding, divided by vocabulary."""

from __future__ import annotations

import numpy as np

from cutp.comm.device_group import DeviceGroup
from cutp.nn.module import Module, ShardableModule, Weight, sharded
from cutp.nn.sharding import ShardingStrategy
from cutp.ops.dispatch import embedding


class Embedding(ShardableModule):
    """A table [vocab_size, hidden_dim]. Sharded rowwise, a shard gives zeros for the tokens of other ranks."""

    def __init__(self, vocab_size: int, hidden_dim: int, dtype: np.dtype):
        self.dtype = np.dtype(dtype)
        self.weight = Weight((vocab_size, hidden_dim), dtype)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens int [T] -> [T, hidden_dim]."""
        ranges = self.weight.ranges
        return embedding(tokens, self.weight.value, ranges[0][0] if ranges else 0, self.dtype)

    def _accepts(self, strategy: ShardingStrategy) -> bool:
        return strategy.kind in ("replicate", "rowwise")

    def _shard(self, strategy: ShardingStrategy, rank: int) -> Embedding:
        part = self._copy()
        part.weight = self.weight.share(strategy, rank)
        return part


class VocabParallelEmbedding(Module):
    """An `Embedding` whose rows are divided among the devices (Shoeybi et al., 2019).

    Each rank looks up the tokens it owns and gives zeros for the others; the sum over ranks is the embedding.
    """

    def __init__(self, vocab_size: int, hidden_dim: int, dtype: np.dtype, devices):
        self.group = DeviceGroup.of(devices)
        self.vocab_size, self.hidden_dim = vocab_size, hidden_dim
        table = Embedding(vocab_size, hidden_dim, dtype)
        self.shards = sharded(table, ShardingStrategy.rowwise(self.group.size), self.group)

    def __call__(self, tokens: np.ndarray) -> list[np.ndarray]:
        """tokens int [T] -> one [T, hidden_dim] a local device."""
        return self.group.all_reduce([shard(tokens) for shard in self.shards])
