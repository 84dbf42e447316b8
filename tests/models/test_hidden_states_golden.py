"""`LLM.hidden_states` against Hugging Face's output_hidden_states.

The expected values were made by tests/golden/make_hidden_golden.py.
"""

import json
import pathlib

import numpy as np
import pytest

from cutp import LLM, run_threads

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "hidden.npz") as file:
    CASES = json.loads(str(file["index"]))["cases"]
    ARRAYS = {name: file[name] for name in file.files if name != "index"}


def golden(case, field):
    return [array for name, array in ARRAYS.items() if name.startswith(f"{case}.") and name.endswith(f".{field}")]


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", CASES)
def test_every_layer_equals_hugging_face(tiny, case, ranks):
    prompts, expected = [prompt.tolist() for prompt in golden(case, "prompt")], golden(case, "states")
    layers = range(len(expected[0]))

    def rank_main(comm):
        with LLM(tiny(case), comm=comm, max_batch_tokens=16) as llm:
            assert len(llm.model.layers) + 1 == len(layers)
            return {pool: [output.array for output in llm.hidden_states(prompts, layers=layers, pool=pool)]
                    for pool in (None, "last", "mean")}

    for found in run_threads(ranks, rank_main):
        for states, got, last, mean in zip(expected, *found.values(), strict=True):
            assert got.shape == states.shape and got.dtype == np.float32
            scale = np.abs(states).max(axis=(1, 2))
            for layer in layers:
                np.testing.assert_allclose(got[layer], states[layer], rtol=0, atol=1e-5 * scale[layer])
            np.testing.assert_allclose(last, states[:, -1], rtol=0, atol=1e-5 * scale.max())
            np.testing.assert_allclose(mean, states.mean(axis=1), rtol=0, atol=1e-5 * scale.max())
