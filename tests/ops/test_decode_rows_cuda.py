"""The kernels of decode_rows.cu against their specification in NumPy."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import decode_rows as reference
from cutp.ops.decode_rows_cuda import advance_rows, publish_tokens
from tests.ops.kernel_results import emulated_only, in_every_order

PAGE_SIZE = 16
FAR = 3 * 2**20  # of a page number whose slots do not fit into 32 bits with large pages


def some_rows(rows, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6 * PAGE_SIZE - 1, rows)
    # The first and the last token of a page, and the very first.
    lengths[: 3] = np.array([PAGE_SIZE - 1, PAGE_SIZE, 0])[:rows]
    temperature = rng.choice(np.array([-1, 0, 0.7, -0.0], np.float32), rows)
    return lengths, temperature, rng.integers(0, FAR, (rows, 11)).astype(np.int32)


@pytest.mark.parametrize("page_size", [PAGE_SIZE, 1, 2**20])
@pytest.mark.parametrize("rows", [1, 2, 37, 256, 300])
def test_advancing_equals_the_reference(device, rows, page_size):
    lengths, temperature, table = some_rows(rows)
    lengths //= PAGE_SIZE // min(page_size, PAGE_SIZE)
    apart = device.array(table)[:, : -2]  # the table of a batch is part of a larger one
    mine, on_device = device.array(lengths), device.array(temperature)
    got = [device.poisoned(rows, kind) for kind in (np.int64, np.int64, np.int32)]
    for _ in range(3):
        expected = reference.advance_rows(lengths, temperature >= 0, table[:, :-2], page_size)
        advance_rows(mine, on_device, apart, page_size, positions=got[0], slots=got[1], kv_lengths=got[2], pdl=True)
        np.testing.assert_array_equal(device.numpy(mine), lengths)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(device.numpy(one), other)


def test_the_reference():
    lengths, table = np.array([3, 4, 9, 5]), np.array([[7, 8, 9], [4, 6, 5], [1, 2, 3], [0, 0, 0]], np.int32)
    positions, slots, kv_lengths = reference.advance_rows(lengths, np.array([True, True, True, False]), table, 4)
    assert lengths.tolist() == [4, 5, 10, 5] and positions.tolist() == [3, 4, 9, 0]
    assert slots.tolist() == [31, 24, 13, -1] and kv_lengths.tolist() == [4, 5, 10, 0]
    assert (slots.dtype, kv_lengths.dtype) == (np.int64, np.int32)


@pytest.mark.parametrize("rows", [1, 5, 256, 300])
def test_publishing_equals_the_reference(device, rows):
    tokens = np.arange(rows) * 10**10 - 1
    published, turn = np.full((2, rows + 3), -7), np.array([1], np.int32)
    mine, my_turn = device.array(published), device.array(turn)
    for step in range(3):
        reference.publish_tokens(tokens + step, turn, published)
        publish_tokens(device.array(tokens + step), my_turn, mine, pdl=True)
        np.testing.assert_array_equal(device.numpy(mine), published)
        assert device.numpy(my_turn) == turn == step % 2
    assert (published[0, :rows] == tokens + 1).all() and (published[1, :rows] == tokens + 2).all()
    assert (published[:, rows:] == -7).all()


@emulated_only
def test_the_turn_is_known_to_all_threads_before_it_changes(device):
    def published():
        out = device.array(np.zeros((2, 300), np.int64))
        publish_tokens(device.array(np.arange(300)), device.array(np.zeros(1, np.int32)), out)
        return [device.numpy(out).astype(np.float32)]

    (out,) = in_every_order(published)
    np.testing.assert_array_equal(out, [np.arange(300), np.zeros(300)])


@emulated_only
def test_arguments_are_checked(device):
    lengths, temperature, table = some_rows(4)
    good = {"lengths": lengths, "temperature": temperature, "lookup_table": table, "page_size": 16,
            "positions": lengths, "slots": lengths, "kv_lengths": lengths.astype(np.int32)}
    for name, wrong in (("lengths", lengths.astype(np.int32)), ("temperature", temperature[:3]), ("page_size", 0),
                        ("lookup_table", table.astype(np.int64)), ("lookup_table", table[:3]),
                        ("lookup_table", table[:, ::2]), ("positions", lengths[:3]), ("slots", temperature),
                        ("kv_lengths", lengths)):
        with pytest.raises(ConfigError, match="lookup_table" if name == "page_size" else name):
            advance_rows(**good | {name: wrong})
    good = {"tokens": lengths, "turn": np.zeros(1, np.int32), "published": np.zeros((2, 4), np.int64)}
    for name, wrong in (("tokens", table[0]), ("turn", np.zeros(2, np.int32)),
                        ("published", np.zeros((2, 3), np.int64)), ("published", np.zeros((1, 4), np.int64)),
                        ("published", np.zeros((2, 4), np.int32))):
        with pytest.raises(ConfigError, match=name):
            publish_tokens(**good | {name: wrong})
