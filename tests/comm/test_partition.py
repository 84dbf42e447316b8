"""The rule for remainders and the rule for attention heads, for every small case."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.comm.partition import split_heads, split_range
from cutp.errors import ConfigError


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 64))
def test_split_range_covers_everything_once(length, size):
    shares = [split_range(length, size, rank) for rank in range(size)]
    assert shares[0][0] == 0 and shares[-1][1] == length
    assert all(stop == start for (_, stop), (start, _) in zip(shares, shares[1:], strict=False))
    lengths = [stop - start for start, stop in shares]
    more = length % size
    assert lengths == [length // size + 1] * more + [length // size] * (size - more)


CASES = [(heads, kv) for heads in range(1, 17) for kv in range(1, heads + 1) if heads % kv == 0]


@pytest.mark.parametrize("heads, kv_heads", CASES)
def test_split_heads(heads, kv_heads):
    group = heads // kv_heads
    for size in range(1, heads + 1):
        seen = []
        for rank in range(size):
            share = split_heads(heads, kv_heads, size, rank)
            q = list(range(share.q_start, share.q_stop))
            kv = list(range(share.kv_start, share.kv_stop))
            assert (share.n_heads, share.n_kv_heads) == (len(q), len(kv))
            assert q and kv and len(q) % len(kv) == 0
            # On this rank, local query head i reads local key-value head i // (local group).
            assert [h // group for h in q] == [kv[i // (len(q) // len(kv))] for i in range(len(q))]
            seen += q
            if size <= kv_heads:
                assert len(q) == group * len(kv)
            else:
                assert len(kv) == 1
        assert seen == list(range(heads))


@pytest.mark.parametrize("heads, kv_heads", CASES)
def test_key_value_heads_are_spread_evenly(heads, kv_heads):
    for size in range(1, heads + 1):
        shares = [split_heads(heads, kv_heads, size, rank) for rank in range(size)]
        if size <= kv_heads:
            counts = [share.n_kv_heads for share in shares]
        else:
            counts = [sum(share.kv_start == kv for share in shares) for kv in range(kv_heads)]
        assert max(counts) - min(counts) <= 1


def test_errors():
    with pytest.raises(ConfigError, match="6 query heads cannot share 4 key-value heads"):
        split_heads(6, 4, 1, 0)
    with pytest.raises(ConfigError, match="4 heads cannot be divided among 5 ranks; at most 4"):
        split_heads(4, 2, 5, 0)
