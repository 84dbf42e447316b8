"""The token embedding, whole and divided by vocabulary."""

import ml_dtypes
import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.nn.embedding import Embedding, VocabParallelEmbedding
from tests.nn.building import DEVICE_COUNTS, cpus, fill


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("vocab", [1, 5, 8, 13])
@pytest.mark.parametrize("n", DEVICE_COUNTS)
def test_equals_the_rows_of_the_table_on_every_device(n, vocab, dtype):
    embedding = VocabParallelEmbedding(vocab, 3, dtype, cpus(n))
    table = fill(embedding)["weight"]
    tokens = np.concatenate([np.arange(vocab)[::-1], [0, vocab - 1, 0]])
    results = embedding(tokens)
    assert len(results) == n
    for y in results:
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.astype(np.float32), table[tokens])
    assert sum(shard.weight.local_shape[0] for shard in embedding.shards) == vocab


@pytest.mark.parametrize("n", (1, 2, 3))
def test_over_a_communicator(n):
    tokens = np.array([12, 0, 6, 6])

    def rank_main(comm):
        embedding = VocabParallelEmbedding(13, 3, np.float32, comm)
        table = fill(embedding)["weight"]
        return embedding(tokens), table[tokens]

    for [y], expected in run_threads(n, rank_main, timeout=20):
        np.testing.assert_array_equal(y, expected)


def test_whole_table():
    embedding = Embedding(6, 2, np.float32)
    table = fill(embedding)["weight"]
    np.testing.assert_array_equal(embedding(np.array([5, 5, 1])), table[[5, 5, 1]])


def test_no_tokens():
    embedding = VocabParallelEmbedding(5, 3, np.float32, cpus(2))
    fill(embedding)
    assert [y.shape for y in embedding(np.array([], np.int64))] == [(0, 3)] * 2
