"""penalties.cu against its specification in NumPy: logits and counts exactly."""

import numpy as np
import pytest

from cutp.errors import ConfigError
from cutp.ops import penalties, penalties_cuda
from tests.ops.kernel_results import emulated_only, read_only
from tests.ops.logits_batch import f32, random_logits


@pytest.mark.parametrize("v", [1, 64, 203, 1300])
def test_penalties_equal_the_reference(device, v):
    rng = np.random.default_rng(v)
    n, slots = 5, np.array([2, -1, 0, 4, 3], np.int32)
    x = random_logits(v, n, v)
    counts = np.where(rng.random((6, v)) < 0.3, rng.integers(1, 9, (6, v)), 0).astype(np.int32)
    counts[rng.random((6, v)) < 0.2] |= penalties.PROMPT_FLAG
    rows = penalties.PenaltyRows(f32([1.3, 2, 1, 0.7, 1]), f32([0, 1, 0.3, -0.5, 0]), f32([0.1, 1, 0, 0.7, 0]))
    for given in (slots, None):
        expected, logits = x.copy(), device.array(x)
        penalties.apply_penalties(expected, counts, np.arange(n) if given is None else given, rows)
        each = read_only(device, rows.repetition, rows.presence, rows.frequency)
        on_device = None if given is None else device.array(given)
        penalties_cuda.apply_penalties(logits, *read_only(device, counts), on_device, *each)
        np.testing.assert_array_equal(device.numpy(logits), expected)


@pytest.mark.parametrize(("v", "vocab_start", "listed"), [(50, 0, 9), (50, 30, 9), (7, 41, 300), (0, 3, 2), (9, 0, 0)])
def test_bias_equals_the_reference(device, v, vocab_start, listed):
    rng = np.random.default_rng(listed)
    x = random_logits(1, 3, v) if v else np.zeros((3, 0), f32)
    ids = np.array([rng.permutation(max(90, listed))[:listed] for _ in range(3)], np.int32).reshape(3, listed)
    ids[rng.random(ids.shape) < 0.3] = -1
    values = rng.standard_normal(ids.shape).astype(f32)
    expected, logits = x.copy(), device.array(x)
    penalties.add_logit_bias(expected, vocab_start, ids, values)
    penalties_cuda.add_logit_bias(logits, vocab_start, *read_only(device, ids, values))
    np.testing.assert_array_equal(device.numpy(logits), expected)


@pytest.mark.parametrize("in_prompt", [False, True])
def test_counts_equal_the_reference(device, in_prompt):
    rng = np.random.default_rng(21)
    counts = rng.integers(0, 3, (4, 33)).astype(np.int32)
    slots, tokens = rng.integers(-1, 4, 300).astype(np.int32), rng.integers(-1, 60, 300)
    expected, on_device = counts.copy(), device.array(counts)
    penalties.count_tokens(expected, 11, slots, tokens, in_prompt=in_prompt)
    penalties_cuda.count_tokens(on_device, 11, *read_only(device, slots, tokens), in_prompt=in_prompt)
    np.testing.assert_array_equal(device.numpy(on_device), expected)
    tokens = np.array([3, -1, 40, 12])
    penalties.count_tokens(expected, 0, np.arange(4), tokens)
    penalties_cuda.count_tokens(on_device, 0, None, device.array(tokens))
    np.testing.assert_array_equal(device.numpy(on_device), expected)


@emulated_only
@pytest.mark.parametrize(("change", "message"), [
    (dict(counts=np.zeros((2, 6))), "counts has dtype float64"),
    (dict(counts=np.zeros((2, 5), np.int32)), "counts has shape"),
    (dict(slots=np.zeros(2)), "slots has dtype float64"),
    (dict(slots=None, counts=np.zeros((1, 6), np.int32)), "a line for each of 2 rows"),
    (dict(presence=np.zeros(3, f32)), "presence has shape"),
])
def test_arguments_of_penalties_that_do_not_fit(device, change, message):
    given = {"logits": np.zeros((2, 6), f32), "counts": np.zeros((2, 6), np.int32), "slots": np.zeros(2, np.int32),
             "repetition": np.ones(2, f32), "presence": np.zeros(2, f32), "frequency": np.zeros(2, f32)}
    with pytest.raises(ConfigError, match=message):
        penalties_cuda.apply_penalties(**{**given, **change})
