"""The kernel of decode_plan.cu, and what decode attention needs memory for."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.decode_attention_cuda import decode_plan, decode_workspace, max_splits


def expected_items(lengths, kv_heads, window, together=False):
    """The splits of each request: multiples of 64 tokens, as many as there should be or fewer; of every 256 requests
    those with the most tokens in a split first."""
    chunks, items = [], []
    firsts = [max(0, length - window) if window else 0 for length in lengths]
    everything = sum(length - first // 16 * 16 for length, first in zip(lengths, firsts, strict=True))
    for request, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        start = first // 16 * 16
        wanted = max(1, 256 // kv_heads)
        if together:
            wanted = max(1, int(length - start) * wanted // max(1, int(everything)))
        size = min(2048, 64 * max(1, -(-(length - start) // (64 * wanted))))
        begins = range(start, length, size)
        if request % 256 == 0:
            chunks.append([])
        chunks[-1].append((min(size, length - first), [
            (request, split | len(begins) << 16, max(begin, first), min(begin + size, length))
            for split, begin in enumerate(begins)]))
    for chunk in chunks:
        for _, splits in sorted(chunk, key=lambda pair: -pair[0]):
            items += splits
    return np.array(items, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("kv_heads", "window"), [(8, None), (8, 1000), (1, None), (64, 20), (512, None)])
def test_plan(device, kv_heads, window, together):
    rng = np.random.default_rng(kv_heads)
    lengths = np.concatenate([[0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 70000], rng.integers(0, 5000, 50)])
    plan = device.poisoned(decode_workspace(len(lengths), 70000, kv_heads, kv_heads, 64).plan, np.int32)
    decode_plan(device.array(lengths.astype(np.int32)), kv_heads, window=window, together=together, plan=plan,
                pdl=True)
    got, expected = device.numpy(plan), expected_items(lengths, kv_heads, window, together)
    assert got[0, 0] == len(expected)
    np.testing.assert_array_equal(got[1 : 1 + len(expected)], expected)
    assert (got[1 + len(expected) :] == np.iinfo(np.int32).max).all()


@pytest.mark.parametrize("together", [False, True])
def test_plan_of_more_requests_than_threads(device, together):
    lengths = np.random.default_rng(0).integers(0, 300, 600).astype(np.int32)
    lengths[400] = 90000
    plan = device.poisoned(decode_workspace(600, 90000, 4, 4, 64).plan, np.int32)
    decode_plan(device.array(lengths), 4, together=together, plan=plan)
    expected = expected_items(lengths, 4, None, together)
    assert device.numpy(plan)[0, 0] == len(expected)
    np.testing.assert_array_equal(device.numpy(plan)[1 : 1 + len(expected)], expected)


def test_a_plan_that_is_too_short_is_not_overrun(device):
    plan = device.poisoned((3, 4), np.int32)
    decode_plan(device.array(np.array([200, 10], np.int32)), 4, plan=plan)
    assert device.numpy(plan)[0, 0] == 2


@pytest.mark.parametrize(("lengths", "splits"), [
    ([1025] * 8, [4] * 8), ([1000] * 3, [8] * 3), ([1024] * 20, [1] * 20), ([1024] * 48, [1] * 48), ([0] * 4, []),
    ([1024, 0, 1024, 0] * 4, [4] * 8), ([100] * 7 + [32000], [30] + [1] * 7), ([500] * 31 + [16000], [16] + [1] * 31),
])
def test_requests_divided_together(device, lengths, splits):
    """Equal ones alike, into no more tasks than occupy the GPU; a long one among short ones into many."""
    plan = device.poisoned(decode_workspace(len(lengths), max(lengths), 8, 8, 64).plan, np.int32)
    decode_plan(device.array(np.array(lengths, np.int32)), 8, together=True, plan=plan)
    (count, *_), *items = device.numpy(plan).tolist()
    assert count == sum(splits)
    assert [place >> 16 for _, place, *_ in items[:count] if place & 0xFFFF == 0] == splits


def test_one_long_request_fills_the_machine():
    """8 key-value heads, 1000 tokens or more: tasks for 132 multiprocessors, but few partial results."""
    for length in (1024, 2048, 4096, 8192, 32768):
        assert 128 <= 8 * len(expected_items([length], 8, None)) <= 264


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 96])
def test_workspace_holds_every_length(kv_heads):
    longest = [len(expected_items([length], kv_heads, None)) for length in range(1, 20000, 61)]
    for i, length in enumerate(range(1, 20000, 61)):
        assert max_splits(length, kv_heads) >= max(longest[: i + 1])
    assert max_splits(19947, kv_heads) <= max(longest)
    shapes = decode_workspace(3, 5000, 2 * kv_heads, kv_heads, 128)
    assert shapes.bytes == 4 * sum(np.prod(s) for s in (shapes.plan, shapes.partials, shapes.counters))


@pytest.mark.parametrize(("change", "message"), [
    ({"kv_lengths": np.zeros((2, 1), np.int32)}, "kv_lengths has shape"),
    ({"kv_lengths": np.zeros(2, np.int64)}, "kv_lengths has dtype int64"),
    ({"plan": np.zeros((5, 4), np.float32)}, "plan has dtype float32"),
    ({"plan": np.zeros((2, 4), np.int32)}, "plan has room for 1 items, fewer than the 2 requests"),
    ({"window": 0}, "window is 0"),
    ({"n_kv_heads": 0}, "n_kv_heads is 0"),
])
def test_plan_arguments_that_do_not_fit(change, message):
    given = {"kv_lengths": np.zeros(2, np.int32), "n_kv_heads": 2, "plan": np.zeros((5, 4), np.int32), **change}
    with pytest.raises(ConfigError, match=message):
        decode_plan(**given)
