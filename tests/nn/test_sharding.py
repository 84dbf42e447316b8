"""Sharding strategies: which ranges a rank holds, for every kind, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.errors import ConfigError
from cutp.nn.sharding import EvenSegment, HeadSegment, OwnerSegment, ShardingStrategy, qkv_segments

SIZES = (1, 2, 3, 4, 8)
S = ShardingStrategy


def held(strategy, shape, rank):
    """The indices along the divided axis that `rank` holds, in order."""
    return [i for start, stop in strategy.ranges(shape, rank) for i in range(start, stop)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(SIZES), st.integers(0, 1))
def test_even_kinds_equal_array_split(rows, columns, size, axis):
    shape = (rows, columns)
    for strategy in (S.axiswise(axis, size), S.columnwise(size) if axis else S.rowwise(size)):
        expected = np.array_split(np.arange(shape[axis]), size)
        for rank in range(size):
            assert held(strategy, shape, rank) == expected[rank].tolist()
            local = strategy.local_shape(shape, rank)
            assert local == ((rows, len(expected[rank])) if axis else (len(expected[rank]), columns))


@pytest.mark.parametrize("size", SIZES)
def test_replicate(size):
    assert S.replicate(size).is_replicate
    for rank in range(size):
        assert S.replicate(size).ranges((5, 3), rank) is None
        assert S.replicate(size).local_shape((5, 3), rank) == (5, 3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_gate_up_divides_each_half(size, axis):
    strategy = S.gate_up(size, axis)
    shape = (14, 5) if axis == 0 else (5, 14)
    halves = np.array_split(np.arange(7), size)
    for rank in range(size):
        gate = halves[rank].tolist()
        assert held(strategy, shape, rank) == gate + [7 + i for i in gate]
        assert strategy.local_shape(shape, rank)[axis] == 2 * len(gate)


@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 2), (8, 1), (9, 3), (12, 4), (10, 5)])
@pytest.mark.parametrize("size", SIZES)
def test_stacked_qkv_keeps_heads_whole_and_with_their_key_value_head(heads, kv_heads, size):
    dim, group = 2, heads // kv_heads
    strategy = S.stacked_qkv(size, heads, dim, kv_heads)
    output = S.head_aware_columnwise(size, heads, dim, kv_heads)
    total = (heads + 2 * kv_heads) * dim
    seen = []
    for rank in range(size):
        rows = held(strategy, (total, 3), rank)
        assert rows[::dim] == [row - row % dim for row in rows[1::dim]]  # both rows of every head
        parts = [row // dim for row in rows[::dim]]
        q = [h for h in parts if h < heads]
        k = [h - heads for h in parts if heads <= h < heads + kv_heads]
        v = [h - heads - kv_heads for h in parts if h >= heads + kv_heads]
        assert k == v and len(q) % len(k) == 0
        # Query head i of a rank reads its key-value head i // (local group), which is the right one of the model.
        assert [h // group for h in q] == [k[i // (len(q) // len(k))] for i in range(len(q))]
        assert [column // dim for column in held(output, (3, heads * dim), rank)[::dim]] == q
        assert output.local_shape((3, heads * dim), rank) == (3, len(q) * dim)
        seen += q
    assert seen == list(range(heads))


def test_stacked_qkv_of_plain_multi_head_attention():
    for rank in range(2):
        assert S.stacked_qkv(2, 4, 3).ranges((36, 8), rank) == S.stacked_qkv(2, 4, 3, 4).ranges((36, 8), rank)


@pytest.mark.parametrize("size", SIZES)
def test_segmented_divides_every_segment_by_itself(size):
    strategy = S.segmented(size, 0, [EvenSegment(5), OwnerSegment(2), HeadSegment(8, 3)])
    held_by_all = [held(strategy, (31,), rank) for rank in range(size)]
    assert sorted(i for indices in held_by_all for i in indices) == list(range(31))
    for rank, indices in enumerate(held_by_all):
        assert [i for i in indices if i < 5] == np.array_split(np.arange(5), size)[rank].tolist()
        assert [i for i in indices if 5 <= i < 7] == ([5, 6] if rank == 0 else [])
        assert [i for i in indices if i >= 7] == [7 + 3 * h + d for h in np.array_split(np.arange(8), size)[rank]
                                                  for d in range(3)]


def test_segment_lengths():
    assert [segment.length for segment in qkv_segments(6, 4, 2)] == [24, 8, 8]
    assert [segment.length for segment in qkv_segments(6, 4)] == [24, 24, 24]
    assert (EvenSegment(5).length, OwnerSegment(3).length) == (5, 3)


@pytest.mark.parametrize("strategy, shape", [
    (S.stacked_qkv(2, 4, 3, 2), (25, 5)),
    (S.head_aware_columnwise(2, 4, 3), (12, 11)),
    (S.segmented(2, 0, [EvenSegment(5), EvenSegment(1)]), (5, 6)),
])
def test_segments_of_another_length_are_refused(strategy, shape):
    message = rf"{strategy.kind} expects .*axis {strategy.axis}.*{shape[0]}, {shape[1]}"
    for method in (strategy.ranges, strategy.local_shape):
        with pytest.raises(ConfigError, match=message):
            method(shape, 0)


def test_a_missing_axis_is_refused():
    with pytest.raises(ConfigError, match=r"columnwise divides axis 1, but the weight has shape \(5,\)"):
        S.columnwise(2).ranges((5,), 0)


def test_tensor_parallel_does_not_divide_a_single_weight():
    with pytest.raises(NotImplementedError, match="tensor_parallel divides modules"):
        S.tensor_parallel(2).ranges((4, 4), 0)


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(ConfigError, match="4 heads cannot be divided among 8 ranks"):
        S.stacked_qkv(8, 4, 2, 2).ranges((16, 3), 0)


def test_gate_up_needs_two_equal_halves():
    with pytest.raises(ConfigError, match="two equal halves, but axis 0 has 13 entries"):
        S.gate_up(2, 0).ranges((13, 5), 0)


@pytest.mark.parametrize("make,message", [
    (lambda: S.rowwise(0), "at least 1"),
    (lambda: S.axiswise(-1, 2), "counted from 0"),
    (lambda: S.segmented(2, 0, []), "at least one segment"),
    (lambda: S.rowwise(2).ranges((4,), 2), "rank 2 is not one of the 2"),
])
def test_strategies_that_make_no_sense(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", ("tensor_parallel", "expert_parallel"))
def test_module_strategies_say_nothing_about_a_weight(kind):
    with pytest.raises(NotImplementedError, match=kind):
        getattr(S, kind)(2).ranges((4,), 0)
