"""Weights that are made up: the same model on any number of ranks."""

import json

import ml_dtypes
import numpy as np
import pytest

from cutp import LLM, SamplingParams
from cutp.checkpoint.config import load_config
from cutp.comm.device_group import DeviceGroup
from cutp.models.random_weights import randomize_weights
from cutp.models.registry import find_family
from cutp.nn.module import cut
from cutp.nn.storage import DeviceStorage
from tests.device_arrays import DeviceArray, EmulatedMemory

BF16 = np.dtype(ml_dtypes.bfloat16)


def made(directory, ranks=1, rank=0, seed=0, dtype=BF16, progress=None):
    config = load_config(directory)
    model = find_family(config).build(config, DeviceGroup.planned(ranks, rank), dtype, 64)
    randomize_weights(model, seed, progress)
    return dict(model.named_weights())


@pytest.mark.parametrize("case", ["gqa", "phi3_defaults", "mixtral_window", "deepseek_v3_biases"])
def test_ranks_hold_shares_of_the_same_model(tiny, case):
    whole = made(tiny(case))
    for rank in range(2):
        for name, weight in made(tiny(case), 2, rank).items():
            np.testing.assert_array_equal(weight.data, cut(whole[name].data, weight.axis, weight.ranges), name)


def test_values(tiny):
    done = []
    weights = made(tiny("gqa"), progress=done.append)
    assert sum(done) == sum(weight.local_bytes for weight in weights.values())
    matrices = []
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.data, weight.data.astype(BF16).astype(np.float32))
        if name.endswith("norm.weight"):
            assert abs(weight.data - 1).max() < 0.15 and weight.data.std() > 0.005, name
        else:
            assert 0.015 < weight.data.std() < 0.025 and abs(weight.data.mean()) < 0.01, name
            matrices.append(weight.data.ravel()[:64].tobytes())
            assert len({row.tobytes() for row in weight.data[:1000]}) == len(weight.data[:1000])
    assert len(set(matrices)) == len(matrices)
    again, other = made(tiny("gqa")), made(tiny("gqa"), seed=1)
    name = next(iter(weights))
    assert (again[name].data == weights[name].data).all() and (other[name].data != weights[name].data).any()


def test_on_a_device(tiny):
    with DeviceStorage(EmulatedMemory()).use():
        device = made(tiny("odd_ffn"))
    host = made(tiny("odd_ffn"))
    for name, weight in device.items():
        assert type(weight.data) is DeviceArray and weight.data.dtype == BF16
        if weight.padding is None:
            np.testing.assert_array_equal(weight.data.host.astype(np.float32), host[name].data)


def test_an_engine_needs_nothing_but_the_shape(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny("gqa") / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    with LLM(tmp_path, random_weights=True) as llm:
        assert llm.load_report is None and llm.tokenizer is None
        first, = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    with LLM(tmp_path, random_weights=True) as llm:
        again, = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    assert len(first.token_ids) == 5 and first.token_ids == again.token_ids
