"""prefill_attention.cu against the NumPy attention, and against itself in other batches and chunks, bit for bit."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from tests.ops.prefill_batch import LARGEST_ERROR, Batch, arguments, same_bits


def test_head_dims_and_dtypes(device):
    for name, head_dim in Batch.emulated if device.emulated else Batch.kinds:
        batch = Batch(device, [(37, 45), (9, 0), (0, 1), (100, 33)], name, head_dim, n_kv_heads=2, page_size=48)
        batch.check()
        batch.check(window=29, softcap=3.0, sinks=np.linspace(-2, 2, 4, dtype=np.float32))


@pytest.mark.parametrize("name", ["bf16", "f32"])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 63, 64, 65, 1000])
def test_windows(device, window, name):
    Batch(device, [(30, 100), (0, 20)], name, 64 if name == "bf16" else 96).check(window=window)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_lengths_around_blocks_and_pages(device, length):
    Batch(device, [(0, length), (length, 1), (length - 1, 64)], group=1, page_size=64).check()


def test_every_order_of_threads_gives_the_same_bits(device):
    for name, head_dim in (("bf16", 128), ("f32", 256)):
        batch = Batch(device, [(20, 60), (0, 3)], name, head_dim)
        batch.check_every_order_of_threads(window=40)


@pytest.mark.parametrize(("name", "head_dim"), [("bf16", 64), ("f16", 80), ("bf16", 128), ("f32", 96), ("f32", 256)])
@pytest.mark.parametrize("options", [{}, {"window": 37, "softcap": 2.0, "sinks": [0.5, -3.0]}], ids=["plain", "window"])
def test_chunks_give_the_bits_of_one_shot(device, name, head_dim, options):
    length = 150 if device.emulated else 1500
    batch = Batch(device, [(0, length)], name, head_dim, size=3.0)
    batch.check_chunks_give_the_bits_of_one_shot((70, 1, 8, 57, length - 136), options)


@pytest.mark.parametrize(("name", "head_dim"), [("bf16", 128), ("f32", 96)])
def test_a_request_has_the_same_bits_in_every_batch(device, name, head_dim):
    batch = Batch(device, [(5, 40), (0, 77), (90, 1), (33, 16)], name, head_dim, group=3)
    batch.check_a_request_has_the_same_bits_in_every_batch(window=50)


def test_pages_before_the_window_are_not_looked_up(device):
    batch = Batch(device, [(200, 30)])
    table = batch.case.table.copy()
    table[0, : (200 - 20 + 1) // 16] = 10**6
    assert same_bits(batch.run(table=table, window=20), batch.run(window=20))


@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_large_scores(device, name):
    # Scores of some hundred: their own rounding moves a weight by a part in 1e4.
    batch = Batch(device, [(10, 90)], name, 64 if name == "bf16" else 96, size=8.0)
    batch.check(tolerance=max(LARGEST_ERROR[name], 1e-4))


def test_equal_scores_average_the_values(device):
    batch = Batch(device, [(0, 100)])
    batch.case.q[:] = 0
    batch.check()


def test_work_list():
    # 32 tokens an item at 4 heads; the item with the most keys first, equal ones in order.
    listed = prefill_work_list([70, 0, 33, 1], [0, 5, 100, 69], 4)
    assert listed.dtype == np.int32
    assert listed.tolist() == [[2, 32], [2, 0], [0, 64], [3, 0], [0, 32], [0, 0]]
    assert prefill_work_list([43], [0], 3).tolist() == [[0, 42], [0, 0]]
    assert prefill_work_list([], [], 1).shape == (0, 2)
    with pytest.raises(ConfigError, match="129 query heads"):
        prefill_work_list([1], [0], 129)


def test_only_listed_work_is_done(device):
    batch = Batch(device, [(3, 100), (0, 30)], "bf16", 64, group=3)  # 42 tokens an item
    # Items of no request, and of tokens that a request does not have, do nothing.
    batch.check_only_listed_work_is_done([[1, 0], [-1, 0], [0, 42], [0, 126], [1, 42], [-(1 << 24), 7]])


@pytest.mark.parametrize(("name", "value", "message"), [
    ("q", np.zeros((3, 4, 64)), "q has dtype float64"),
    ("q", np.zeros((3, 4, 72), np.float32), "q has shape .* head dim of 64, 80, 96, 128, 256"),
    ("q", np.zeros((4, 3, 64), np.float32).transpose(1, 0, 2), "q of shape .* heads of a token must be contiguous"),
    ("q", np.zeros((3, 257), np.float32)[:, :256].reshape(3, 4, 64, copy=False), "multiple of 16 bytes apart"),
    ("q", np.zeros((3, 5, 64), np.float32), "pages has 2 heads and q has 5"),
    ("out", np.zeros((2, 4, 64), np.float32), "out has shape"),
    ("out", np.zeros((3, 4, 64), np.float16), "out has dtype float16"),
    ("out", np.zeros((3, 8, 64), np.float32)[:, ::2], "out of shape .* not contiguous"),
    ("pages", np.zeros((2, 2, 2, 16, 80), np.float32), "pages has shape"),
    ("pages", np.zeros((2, 2, 2, 24, 64), np.float32), "pages of 24 tokens"),
    ("pages", np.zeros((2, 2, 2, 16, 64), np.float16), "pages has dtype"),
    ("pages", np.zeros((4, 2, 2, 16, 64), np.float32)[::2], "pages of shape .* not contiguous"),
    ("sinks", np.zeros(2, np.float32), r"sinks has shape \(2,\); it needs \(4,\)"),
    ("sinks", np.zeros(4, np.float16), "sinks has dtype float16"),
    ("lookup_table", np.zeros((2, 2), np.int32), "lookup_table has shape"),
    ("lookup_table", np.zeros((1, 2), np.int64), "lookup_table has dtype int64"),
    ("lookup_table", np.zeros((1, 4), np.int32)[:, ::2].repeat(1, 0)[:, ::-1], "lookup_table of shape .* not contig"),
    ("input_row_offsets", np.zeros(3, np.int32), r"input_row_offsets has shape \(3,\); it needs \(2,\)"),
    ("cache_lengths", np.zeros((1, 1), np.int32), "cache_lengths has shape"),
    ("work_list", np.zeros(4, np.int32), "work_list has shape"),
    ("scale", -1.0, "scale is -1.0"),
    ("window", 0, "window is 0"),
    ("softcap", 0.0, "softcap is 0.0"),
])
def test_bad_arguments(name, value, message):
    given = arguments() | {name: value}
    with pytest.raises(ConfigError, match=message):
        prefill_attention(**given)
