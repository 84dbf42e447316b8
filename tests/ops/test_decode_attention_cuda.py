"""The kernel of decode_attention.cu against the specification in NumPy."""

import numpy as np
import pytest

from cutp.array.kernel import use_backend
from cutp.errors import ConfigError
from cutp.ops.decode_attention_cuda import decode_attention
from tests.emulation.emulator import EmulatorBackend, needs_compiler
from tests.ops.conftest import EmulatedArrays
from tests.ops.decode_cases import (
    LARGE_LENGTHS,
    Case,
    arguments,
    assert_close,
    bfloat16,
    float16,
    float32,
    prepare,
    run_case,
)

# Tiles of 16, splits of 64, pages: one token, ends of each, padding anywhere. With 2 key-value heads a request of up
# to 8192 tokens has splits of 64.
LENGTHS = [0, 1, 17, 64, 0, 65, 15, 16, 130, 0]
CASES = [
    Case(bfloat16, LENGTHS, head_dim=128),
    Case(bfloat16, [63, 300], head_dim=128, group=16, kv_heads=1, page_size=64, has_sinks=True),
    Case(bfloat16, [100, 33, 64], head_dim=80, group=7, page_size=32, softcap=20.0, scale=0.4),
    Case(float16, LENGTHS, head_dim=64, group=8, kv_heads=1, has_sinks=True),
    Case(float16, [80, 129], head_dim=96, group=3, kv_heads=3, page_size=128),
    Case(bfloat16, [31, 145], head_dim=256, group=2, page_size=32, softcap=50.0, window=100),
    Case(bfloat16, [70], head_dim=256, group=9, kv_heads=1, page_size=48),
    Case(bfloat16, [1, 40], head_dim=128, group=20, kv_heads=2),
    Case(float32, [0, 1, 66, 17], head_dim=64, group=1, kv_heads=3),
    Case(float32, [70, 129], head_dim=80, group=9, kv_heads=1, page_size=32, softcap=10.0, scale=0.5, has_sinks=True),
    Case(float32, [40, 21], head_dim=256, group=2, kv_heads=1, window=20),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.dtype}-{c.head_dim}-group{c.group}")
def test_equals_the_reference(device, case):
    assert_close(run_case(device, case), case)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 100, 1000])
def test_window(device, window):
    case = Case(bfloat16, [1, 16, 64, 66, 150], window=window, has_sinks=window % 2 == 0, kv_heads=1)
    assert_close(run_case(device, case), case)


def test_more_splits_than_are_merged_at_once(device):
    case = Case(bfloat16, [64 * 33 - 5, 64 * 65], kv_heads=1, group=2, page_size=64)
    run, plan = prepare(device, case)
    got = run(blocks=7)
    assert device.numpy(plan)[0, 0] == 33 + 65
    assert_close(got, case)


def test_splits_of_several_rounds(device):
    """32 key-value heads: a long request has few splits, whose tiles the warps take in turn."""
    case = Case(float16, [64 * 25 + 3], kv_heads=32, group=1, page_size=64)
    run, plan = prepare(device, case)
    got = run(blocks=3)
    assert device.numpy(plan)[0, 0] == 7
    assert_close(got, case)


@pytest.mark.parametrize("dtype", [bfloat16, float32], ids=str)
def test_a_request_does_not_depend_on_the_others(device, dtype):
    case = Case(dtype, [70, 1, 0, 200, 65, 130], has_sinks=True)
    together = run_case(device, case)
    for blocks in (1, 2, 64):
        np.testing.assert_array_equal(run_case(device, case, blocks), together)
    for i in range(len(case.lengths)):
        np.testing.assert_array_equal(run_case(device, case.rows(i), 3)[0], together[i])
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_array_equal(run_case(device, case.rows(*order)), together[order])


def test_shared_pages(device):
    case = Case(bfloat16, [70, 90], page_size=16)
    case.table[1, :4] = case.table[0, :4]
    assert_close(run_case(device, case), case)


def test_repeated_launches_leave_nothing_behind(device):
    case = Case(bfloat16, [200, 0, 130], has_sinks=True)
    run, _ = prepare(device, case, extra_items=3)
    first = run()
    for _ in range(3):
        np.testing.assert_array_equal(run(), first)


def test_scores_far_apart(device):
    """One token takes all the weight; the others' underflow. Then all scores equal: the mean of the values."""
    case = Case(bfloat16, [150], scale=40.0)
    assert_close(run_case(device, case), case)
    case = Case(bfloat16, [150], scale=0.0)
    assert_close(run_case(device, case), case)


def test_a_nan_stays_in_its_request_and_head(device):
    case = Case(bfloat16, [70, 90, 40])
    clean = run_case(device, case)
    case.q[1, 2, 5] = np.nan
    got = run_case(device, case)
    assert np.isnan(got[1, 2].astype(np.float32)).all()
    clean[1, 2] = got[1, 2] = 0
    np.testing.assert_array_equal(got, clean)


@needs_compiler
def test_the_result_does_not_depend_on_the_order_of_threads():
    case = Case(bfloat16, [130, 0, 64, 17], head_dim=128, group=5, has_sinks=True)
    results = []
    for seed in range(5):
        with use_backend(EmulatorBackend(order_seed=seed)):
            results.append(run_case(EmulatedArrays(), case))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert_close(results[0], case)


def test_no_requests(device):
    case = Case(bfloat16, [])
    assert run_case(device, case).shape == (0, 8, 64)


@pytest.mark.parametrize(("change", "message"), [
    ({"q": np.zeros((2, 4, 64))}, "q has dtype float64; it needs bfloat16, float16, float32"),
    ({"q": np.zeros((2, 256), np.float32)}, "q has shape"),
    ({"q": np.zeros((2, 4, 72), np.float32)}, "head dimension 72; it needs one of 64, 80"),
    ({"q": np.zeros((4, 2, 64), np.float32).transpose(1, 0, 2)}, "q of shape .* is not contiguous"),
    ({"q": np.zeros((2, 5, 64), np.float32)}, "5 heads, not a multiple of the 2 heads of pages"),
    ({"pages": np.zeros((3, 2, 2, 16, 64), np.float16)}, "pages has dtype float16; it needs float32"),
    ({"pages": np.zeros((3, 1, 2, 16, 64), np.float32)}, "pages has shape .* it needs .any, 2, any, any, 64."),
    ({"pages": np.zeros((3, 2, 2, 24, 64), np.float32)}, "pages have 24 tokens; it must be a multiple of 16"),
    ({"lookup_table": np.zeros((2, 5), np.int64)}, "lookup_table has dtype int64; it needs int32"),
    ({"lookup_table": np.zeros((3, 5), np.int32)}, "lookup_table has shape"),
    ({"lookup_table": np.zeros((2, 9), np.int32)}, "plan has room for 4 items; 2 requests of up to 144 .* need 6"),
    ({"kv_lengths": np.zeros(3, np.int32)}, "kv_lengths has shape"),
    ({"plan": np.zeros((5, 3), np.int32)}, "plan has shape"),
    ({"plan": np.zeros((2, 4), np.int32)}, "plan has room for 1 items"),
    ({"sinks": np.zeros(2, np.float32)}, "sinks has shape"),
    ({"sinks": np.zeros(4, np.float16)}, "sinks has dtype"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"partials": np.zeros(4 * 4 * 66 - 1, np.float32)}, "partials has 1055 elements; a plan of 4 items needs 1056"),
    ({"counters": np.zeros(63, np.uint32)}, "counters has 63 elements"),
    ({"counters": np.zeros(64, np.int32)}, "counters has dtype int32"),
    ({"blocks": 0}, "blocks is 0"),
    ({"out": np.zeros((2, 4, 64), np.float16)}, "out has dtype"),
])
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ConfigError, match=message):
        decode_attention(**arguments(**change))


# ---- on a GPU only: real sizes


GPU_CASES = [
    Case(bfloat16, [0], head_dim=dim, group=group, kv_heads=kv_heads, page_size=page)
    for dim, group, kv_heads, page in [(128, 4, 8, 64), (64, 8, 8, 16), (80, 1, 32, 64), (96, 5, 2, 128),
                                       (256, 8, 1, 32), (256, 16, 2, 64), (128, 16, 4, 64), (128, 40, 1, 64)]
]


@pytest.mark.parametrize("dtype", [bfloat16, float16, float32], ids=str)
@pytest.mark.parametrize("shape", GPU_CASES, ids=lambda c: f"{c.head_dim}-{c.group}-{c.kv_heads}-{c.page_size}")
def test_large(device, shape, dtype):
    if device.emulated:
        pytest.skip("too large to emulate")
    for window, softcap, has_sinks in ((None, None, False), (1000, 30.0, True)):
        case = Case(dtype, LARGE_LENGTHS, head_dim=shape.head_dim, group=shape.group, kv_heads=shape.kv_heads,
                    page_size=shape.page_size, window=window, softcap=softcap, has_sinks=has_sinks)
        got = run_case(device, case, blocks=396)
        assert_close(got, case)
        for blocks in (132, 50, 1000):
            np.testing.assert_array_equal(run_case(device, case, blocks=blocks), got)
        for i in (4, 9, 13):
            np.testing.assert_array_equal(run_case(device, case.rows(i), blocks=264)[0], got[i])


def test_a_hundred_launches_of_a_large_batch_agree(device):
    if device.emulated:
        pytest.skip("too large to emulate")
    rng = np.random.default_rng(0)
    case = Case(bfloat16, list(rng.integers(1, 2500, 64)), head_dim=128, kv_heads=8, page_size=64)
    run, _ = prepare(device, case)
    first = run(blocks=396)
    for _ in range(100):
        np.testing.assert_array_equal(run(blocks=396), first)
