"""Positions, owners and slots of the tokens of a ragged batch."""

import numpy as np
import pytest

from cutp.nn.ragged_batch import RaggedBatch
from cutp.nn.rope_parameters import RopeParameters
from cutp.nn.rotary_embedding import RotaryEmbedding
from tests.nn.building import make_batch

LENGTHS, CACHED = (3, 0, 1, 5), (4, 2, 0, 7)


def batch():
    return make_batch([[9] * n for n in LENGTHS], CACHED, page_size=4)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32])
def test_by_hand(dtype):
    made = batch()
    made = RaggedBatch(made.tokens, made.input_row_offsets.astype(dtype), made.cache_lengths.astype(dtype),
                       made.lookup_table.astype(dtype), 4, made.rope_lengths)
    owners = [b for b, n in enumerate(LENGTHS) for _ in range(n)]
    positions = [c + i for n, c in zip(LENGTHS, CACHED, strict=True) for i in range(n)]
    assert made.lengths.tolist() == list(LENGTHS)
    assert made.request_of_token.tolist() == owners
    assert made.positions.tolist() == positions
    assert made.slots.tolist() == [int(made.lookup_table[b, p // 4]) * 4 + p % 4
                                   for b, p in zip(owners, positions, strict=True)]


def test_a_rotary_table_is_made_once():
    made, rope, other = batch(), RotaryEmbedding(4, max_seq_len=8), RotaryEmbedding(4, max_seq_len=8, theta=5.0)
    float32 = np.dtype(np.float32)
    assert made.rotary(rope, float32) is made.rotary(rope, float32)
    assert not np.array_equal(made.rotary(rope, float32)[0], made.rotary(other, float32)[0])


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_rotary_table_is_that_of_each_request(rope_type):
    rope = RotaryEmbedding(6, max_seq_len=5, parameters=RopeParameters(rope_type=rope_type, factor=3.0))
    made = batch()
    cos, sin = made.rotary(rope, np.dtype(np.float32))
    for t, (b, position) in enumerate(zip(made.request_of_token, made.positions, strict=True)):
        expected = rope.table(np.array([position]), int(made.rope_lengths[b]))
        np.testing.assert_allclose(np.stack([cos[t], sin[t]]), np.stack(expected)[:, 0], atol=1e-6)
