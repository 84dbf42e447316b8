"""prefill_attention_hopper.cu against the NumPy attention, and against itself in other batches and chunks."""

from contextlib import nullcontext

import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops import prefill_attention_cuda
from cutp.ops import prefill_attention_hopper_cuda as hopper
from cutp.ops.prefill_attention_cuda import prefill_attention, prefill_work_list
from cutp.ops.prefill_attention_hopper_cuda import hopper_work_list
from tests.emulation.emulator import EmulatorBackend
from tests.ops.prefill_batch import DTYPES, HopperBatch, arguments, few_hopper_blocks, same_bits


@pytest.fixture(autouse=True)
def few_blocks(device, monkeypatch):
    with few_hopper_blocks(device, monkeypatch):
        yield


def test_head_dims_and_dtypes(device):
    for name, head_dim in HopperBatch.emulated if device.emulated else HopperBatch.kinds:
        batch = HopperBatch(device, [(37, 45), (9, 0), (0, 1), (100, 133)], name, head_dim, n_kv_heads=2, page_size=48)
        batch.check()
        batch.check(window=29, softcap=3.0, sinks=np.linspace(-2, 2, 4, dtype=np.float32))


@pytest.mark.parametrize("page_size", [16, 32, 64, 80, 128, 256, 384])
def test_page_sizes(device, page_size):
    for head_dim in (64, 256):
        HopperBatch(device, [(90, 60), (0, 130)], "bf16", head_dim, group=4, page_size=page_size).check()


@pytest.mark.parametrize("window", [1, 2, 63, 64, 104, 127, 128, 129, 150, 1000])
def test_windows(device, window):
    HopperBatch(device, [(230, 100), (0, 20)], group=1).check(window=window)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 79, 80, 81, 127, 128, 129, 255, 256, 257])
def test_lengths_around_blocks_and_pages(device, length):
    for head_dim in (128, 256):
        HopperBatch(device, [(0, length), (length, 1), (length - 1, 64)], "bf16", head_dim, group=1,
                    page_size=64).check()
        if device.emulated and length % 16 != 1:
            break


def test_every_order_of_threads_gives_the_same_bits(device):
    for head_dim in (64, 128):
        batch = HopperBatch(device, [(120, 160), (0, 3)], "bf16", head_dim)
        batch.check_every_order_of_threads(window=140)


@pytest.mark.parametrize(("name", "head_dim"), [("bf16", 64), ("f16", 80), ("bf16", 128), ("bf16", 256)])
@pytest.mark.parametrize("options", [{}, {"window": 137, "softcap": 2.0, "sinks": [0.5, -3.0]}],
                         ids=["plain", "window"])
def test_chunks_give_the_bits_of_one_shot(device, name, head_dim, options):
    length = 300 if device.emulated else 1500
    batch = HopperBatch(device, [(0, length)], name, head_dim, size=3.0)
    batch.check_chunks_give_the_bits_of_one_shot((70, 1, 8, 157, length - 236), options)


def test_a_request_has_the_same_bits_in_every_batch(device):
    batch = HopperBatch(device, [(5, 40), (0, 177), (190, 1), (33, 16)], "bf16", 128, group=3)
    batch.check_a_request_has_the_same_bits_in_every_batch(window=150)


@pytest.mark.parametrize("window", [20, 25, 26])
def test_pages_before_the_window_are_not_looked_up(device, window):
    """Their entries in the table may be impossible, or name pages that others left NaN in; the window may begin
    anywhere in a page, at its first or at its last key as well."""
    batch = HopperBatch(device, [(200, 30)])
    batch.check(window=window)
    expected = batch.run(window=window)
    unused = next(n for n in range(len(batch.case.pages)) if n not in batch.case.table)
    for number in (10**6, unused, -1):
        table = batch.case.table.copy()
        table[0, : (200 - window + 1) // 16] = number
        assert same_bits(batch.run(table=table, window=window), expected)


@pytest.mark.parametrize(("heads", "together"), [(4, 1), (4, 2), (3, 1), (3, 2), (5, 4), (2, 0)])
def test_some_heads_at_a_time(device, monkeypatch, heads, together):
    """As many of them as divide the number of heads, and whose keys and values fit."""
    requests = [(30, 80), (0, 40), (0, 5)]
    batch = HopperBatch(device, requests, group=4, n_kv_heads=heads)
    expected = batch.run()
    monkeypatch.setattr(hopper, "_L2_BYTES", together * 110 * 2 * 64 * 2)
    prefill_attention_cuda._plan.cache_clear()
    assert same_bits(batch.run(), expected)
    batch.check(window=50)


@pytest.mark.parametrize("size", [8.0, 0.0])
def test_large_and_equal_scores(device, size):
    """Scores of some hundred, which raise the peak again and again, and scores of 0, which average the values."""
    batch = HopperBatch(device, [(10, 290)], size=size or 1.0)
    if not size:
        batch.case.q[:] = 0
    batch.check()


def test_peaks_that_rise_slowly(device):
    """Every block from the end to the beginning has larger scores, by less and by more than what peaks ignore."""
    for step in (0.02, 0.1):
        batch = HopperBatch(device, [(0, 520)], group=1)
        case = batch.case
        case.q[:] = 0
        case.q[..., 0] = 8
        for b, position in np.ndindex(1, 520):
            page = case.pages[case.table[b, position // 16]]
            page[0, :, position % 16, 0] = step * (520 - position)
        batch.pages = device.array(case.pages)
        batch.check()


def test_work_list():
    # 32 tokens an item at 4 heads; the item with the most keys first, equal ones in order.
    listed = hopper_work_list([70, 0, 33, 1], [0, 5, 100, 69], [0, 70, 70, 103], 4, 128)
    assert listed.dtype == np.int32
    assert listed.tolist() == [[2, 102, 132, 1], [2, 70, 100, 33], [0, 64, 64, 6], [3, 103, 69, 1], [0, 32, 32, 38],
                               [0, 0, 0, 70]]
    assert hopper_work_list([70], [0], [9], 3, 64).tolist() == [[0, 73, 64, 6], [0, 9, 0, 70]]
    assert hopper_work_list([], [], [], 1, 256).shape == (0, 4)


def test_the_list_says_which_kernel(device):
    bf16 = DTYPES["bf16"]
    here = use_backend(EmulatorBackend()) if device.emulated else nullcontext()
    with here as backend:
        if device.emulated:
            assert prefill_work_list([3], [0], 1, head_dim=64, dtype=bf16, row_offsets=[0]).shape == (1, 2)
            backend.capability = (9, 0)
        assert prefill_work_list([3], [0], 1, head_dim=64, dtype=bf16, row_offsets=[0]).shape == (1, 4)
        assert prefill_work_list([3], [0], 1, head_dim=64, dtype=np.float32, row_offsets=[0]).shape == (1, 2)
        assert prefill_work_list([3], [0], 1).shape == (1, 2)


def test_only_listed_work_is_done(device):
    batch = HopperBatch(device, [(3, 100), (0, 30)], "bf16", 128, group=3)  # 42 tokens an item
    batch.check_only_listed_work_is_done([[1, 100, 0, 30], [-1, 0, 0, 0], [0, 42, 45, 58], [-(1 << 24), 7, 7, 7]])
    assert np.isnan(batch.run(work_list=[[-1, 0, 0, 0]] * 9).astype(np.float32)).all()


def test_errors_stay_below_the_bar(device):
    """Of all of the result; other tests look at single rows, which round to more."""
    batch = HopperBatch(device, [(0, 300)], "bf16", 128, group=4)
    got, expected = batch.run().astype(np.float64), batch.reference().astype(np.float64)
    assert np.linalg.norm(got - expected) <= 4e-3 * np.linalg.norm(expected)


def test_bad_arguments():
    given = arguments() | {"work_list": np.zeros((1, 4), np.int32)}
    with pytest.raises(ConfigError, match="q has dtype float32; this work list is for bfloat16 or float16"):
        prefill_attention(**given)
    with pytest.raises(ConfigError, match="work_list has dtype int64"):
        prefill_attention(**given | {"work_list": np.zeros((1, 4), np.int64)})
