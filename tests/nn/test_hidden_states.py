"""Hidden states beside the logits: every mode with every logits mode, and how much work it takes."""

import numpy as np
import pytest

from cutp.comm.threads import run_threads
from cutp.errors import ConfigError
from cutp.nn import ReturnHiddenStates, ReturnLogits
from tests.nn.building import close, cpus, fill
from tests.nn.decoder import EVERYTHING, PROMPTS, Spec, all_by_hand, build, ends, forward, results

SPEC = Spec(layers=3, embedding_multiplier=1.5)
Hidden = ReturnHiddenStates
COUNT = 2  # of VARIABLE
TOKENS = sum(map(len, PROMPTS))
LAST_TWO = np.array([[end - 1, end] for end in ends()]).ravel()


def options(hidden, logits=ReturnLogits.LAST_TOKEN, layers=(2, 0)):
    chosen = layers if hidden is Hidden.SELECTED_LAYERS else ()
    return dict(return_hidden_states=hidden, return_logits=logits, hidden_state_layers=chosen)


def expected_hidden(trace, hidden):
    return {Hidden.NONE: [], Hidden.LAST: [trace.after[-1][ends()]], Hidden.ALL: [trace.after[-1]],
            Hidden.ALL_NORMALIZED: [trace.normed], Hidden.SELECTED_LAYERS: [[trace.after[2], trace.after[0]]]}[hidden]


def expected_logits(trace, logits):
    last = trace.logits[ends()]
    if logits is ReturnLogits.LAST_TOKEN:
        return [last]
    if logits is ReturnLogits.VARIABLE:
        return [last, trace.logits[LAST_TWO], np.arange(0, 7, 2)]
    return [last, trace.logits, np.array([0, *(ends() + 1)])]


@pytest.mark.parametrize("n", (1, 2, 3, 4))
@pytest.mark.parametrize("logits", ReturnLogits)
@pytest.mark.parametrize("hidden", Hidden)
def test_every_mode_with_every_mode(hidden, logits, n):
    got, values = results(SPEC, cpus(n), count=COUNT, **options(hidden, logits))
    trace = all_by_hand(values, SPEC)
    expected = [*expected_logits(trace, logits), *expected_hidden(trace, hidden)]
    assert isinstance(got, tuple) and len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, list):
            assert isinstance(a, list) and len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                close(one, other, 1e-4)
        else:
            assert a.shape == b.shape
            close(a, b, 1e-4)


@pytest.mark.parametrize("hidden", Hidden)
def test_the_logits_are_those_without_hidden_states(hidden):
    (plain,), values = results(EVERYTHING, cpus(2))
    got, _ = results(EVERYTHING, cpus(2), values=values, **options(hidden))
    close(got[0], plain, 1e-6)


@pytest.mark.parametrize("n", (2, 3))
@pytest.mark.parametrize("hidden", Hidden)
def test_over_a_communicator(hidden, n):
    expected, values = results(SPEC, cpus(n), **options(hidden))
    for got, _ in run_threads(n, lambda comm: results(SPEC, comm, values=values, **options(hidden)), timeout=20):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2), (2, 1, 0), (1, 1), (2, 0, 2)], ids=str)
def test_selected_layers_come_in_the_order_asked_for_and_as_often(layers):
    (_, selected), values = results(SPEC, cpus(2), **options(Hidden.SELECTED_LAYERS, layers=layers))
    after = all_by_hand(values, SPEC).after
    assert len(selected) == len(layers)
    for got, index in zip(selected, layers, strict=True):
        assert got.shape == (TOKENS, SPEC.hidden)
        close(got, after[index], 1e-4)


def test_the_modes_agree_with_each_other():
    model = build(SPEC, cpus(1))
    values = fill(model)

    def hidden_of(mode, layers=()):
        return results(SPEC, cpus(1), values=values, **options(mode, layers=layers))[0][-1]

    every, last, normed = hidden_of(Hidden.ALL), hidden_of(Hidden.LAST), hidden_of(Hidden.ALL_NORMALIZED)
    np.testing.assert_array_equal(last, every[ends()])
    np.testing.assert_array_equal(normed, model.norm[0](every))
    np.testing.assert_array_equal(hidden_of(Hidden.SELECTED_LAYERS, (2,))[0], every)


class Spy:
    """Stands for a layer and notes the rows of every call."""

    def __init__(self, layer):
        self.layer, self.rows = layer, []

    def __call__(self, x):
        self.rows.append(len(x))
        return self.layer(x)

    def __getattr__(self, name):
        return getattr(self.layer, name)


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("logits, rows", [(ReturnLogits.LAST_TOKEN, 3), (ReturnLogits.VARIABLE, 6),
                                          (ReturnLogits.ALL, TOKENS)])
@pytest.mark.parametrize("hidden", Hidden)
def test_norm_and_head_run_once_on_the_rows_that_are_needed(hidden, logits, rows, n):
    model = build(SPEC, cpus(n), **options(hidden, logits))
    fill(model)
    model.norm = [Spy(shard) for shard in model.norm]
    model.lm_head.shards = [Spy(shard) for shard in model.lm_head.shards]
    gathers, plain = [], model.group.all_gather
    model.group.all_gather = lambda xs, axis: gathers.append(len(xs[0])) or plain(xs, axis=axis)
    forward(model, count=COUNT)
    normed = TOKENS if hidden is Hidden.ALL_NORMALIZED else rows
    assert [spy.rows for spy in model.norm] == [[normed]] * n
    assert [spy.rows for spy in model.lm_head.shards] == [[rows]] * n
    assert gathers == [rows]


@pytest.mark.parametrize("hidden, layers, message", [
    (Hidden.SELECTED_LAYERS, (), r"hidden_state_layers is \[\]; it goes with SELECTED_LAYERS"),
    (Hidden.ALL, (0,), r"hidden_state_layers is \[0\]; it goes with SELECTED_LAYERS"),
    (Hidden.NONE, (1,), r"hidden_state_layers is \[1\]; it goes with SELECTED_LAYERS"),
    (Hidden.SELECTED_LAYERS, (0, 3), r"names layer 3; the layers are 0 \.\. 2"),
    (Hidden.SELECTED_LAYERS, (-1,), "names layer -1"),
    (Hidden.SELECTED_LAYERS, ("1",), "names layer '1'"),
    (Hidden.SELECTED_LAYERS, (True,), "names layer True"),
])
def test_layers_that_cannot_be(hidden, layers, message):
    with pytest.raises(ConfigError, match=message):
        build(SPEC, cpus(1), return_hidden_states=hidden, hidden_state_layers=layers)
