"""Penalties and bias in NumPy, against the formulas of Hugging Face and OpenAI written out token by token."""

import numpy as np
import pytest

from cutp.errors import ConfigError, RequestError
from cutp.ops.penalties import PROMPT_FLAG, PenaltyRows, add_logit_bias, apply_penalties, count_tokens

pytestmark = pytest.mark.filterwarnings("error")


def penalties(repetition=1.0, presence=0.0, frequency=0.0, n=1):
    return PenaltyRows(*(np.full(n, v, np.float32) for v in (repetition, presence, frequency)))


def applied(x, count, **how):
    x = np.array([x], np.float32)
    apply_penalties(x, np.array([count], np.int32), np.array([0]), penalties(**how))
    return x[0].tolist()


def test_repetition_divides_positive_and_multiplies_negative_logits():
    x = [3.0, -3.0, 0.0, -np.inf, 3.0]
    assert applied(x, [1, 2, 1, 1, 0], repetition=2) == [1.5, -6, 0, -np.inf, 3]
    assert applied(x, [PROMPT_FLAG, PROMPT_FLAG + 1, 0, 0, 0], repetition=0.5) == [6, -1.5, 0, -np.inf, 3]


def test_presence_and_frequency_count_generated_tokens_only():
    x, count = [1.0, 2.0, 3.0, 4.0], [0, 1, 3, PROMPT_FLAG]
    assert applied(x, count, presence=0.5) == [1, 1.5, 2.5, 4]
    assert applied(x, count, frequency=0.5) == [1, 1.5, 1.5, 4]
    assert applied(x, count, presence=-1, frequency=0.25) == [1, 2.75, 3.25, 4]
    assert applied([4.0], [PROMPT_FLAG + 2], repetition=2, presence=0.5, frequency=1) == [-0.5]


def test_rows_take_their_own_slot_and_penalty():
    x = np.ones((4, 2), np.float32)
    counts = np.array([[1, 0], [0, 2]], np.int32)
    apply_penalties(x, counts, np.array([1, 0, -1, 1]), PenaltyRows(np.ones(4), np.arange(4), np.zeros(4)))
    assert x.tolist() == [[1, 1], [0, 1], [1, 1], [1, -2]]


def test_a_row_does_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 100_000)).astype(np.float32)  # too many for one block of rows
    counts, slots = np.zeros((9, 100_000), np.int32), np.array([8, 3, -1, 0, 5, 1, 2])
    count_tokens(counts, 0, rng.integers(0, 9, 500), rng.integers(0, 100_000, 500))
    rows = PenaltyRows(*(rng.uniform(0.5, 1.5, 7).astype(np.float32) for _ in range(3)))
    batch = logits.copy()
    apply_penalties(batch, counts, slots, rows)
    for i in range(7):
        one = logits[i : i + 1].copy()
        apply_penalties(one, counts, slots[i : i + 1], PenaltyRows(*(v[i : i + 1] for v in vars(rows).values())))
        np.testing.assert_array_equal(batch[i], one[0])
        assert (batch[i] != logits[i]).sum() == (0 if slots[i] < 0 else (counts[slots[i]] != 0).sum())


def test_bias_is_added_where_the_rank_has_the_token():
    ids = np.array([[4, 7, -1], [6, 3, 5]], np.int32)
    values = np.array([[1, -np.inf, 9], [0.5, 9, -2]], np.float32)
    x = np.zeros((2, 3), np.float32)
    add_logit_bias(x, 5, ids, values)
    assert x.tolist() == [[0, 0, -np.inf], [-2, 0.5, 0]]
    x = np.zeros((2, 1), np.float32)
    add_logit_bias(x, 0, ids, values)  # id -1 is none, not the last
    assert x.tolist() == [[0], [0]]


def test_counts():
    counts = np.zeros((2, 4), np.int32)
    count_tokens(counts, 10, [1, 1, 0, -1, 0, 1, 0], [10, 10, 13, 11, 14, 9, -1])
    assert counts.tolist() == [[0, 0, 0, 1], [2, 0, 0, 0]]
    for _ in range(2):
        count_tokens(counts, 10, [1, 1, 0, 0], [10, 12, 13, -1], in_prompt=True)
    assert counts.tolist() == [[0, 0, 0, PROMPT_FLAG + 1], [PROMPT_FLAG + 2, 0, PROMPT_FLAG, 0]]


@pytest.mark.parametrize(("name", "value"), [("repetition", 0), ("repetition", np.nan), ("repetition", np.inf),
                                             ("presence", np.nan), ("frequency", -np.inf)])
def test_penalties_out_of_range(name, value):
    rows = penalties(n=3)
    getattr(rows, name)[1] = value
    with pytest.raises(RequestError, match=f"row 1 of the batch: {name} penalty"):
        rows.checked()


def test_wrong_arguments_are_refused():
    x, counts = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32)
    with pytest.raises(ConfigError, match="float64"):
        apply_penalties(x.astype(np.float64), counts, [0, 1], penalties(n=2))
    with pytest.raises(ConfigError, match="counts must be"):
        apply_penalties(x, counts[:, :2], [0, 1], penalties(n=2))
    with pytest.raises(ConfigError, match="equally long"):
        PenaltyRows(np.ones(2), np.ones(3), np.ones(2)).checked()
