"""The logits that decode steps draw from: the head's own where nothing changes their values, with the same tokens."""

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from cutp.kv_cache.params import PAGE_SIZE
from cutp.nn import distributed_transformer
from cutp.ops.dispatch import finish_logits
from tests.ops.kernel_results import DTYPES, bfloat16, float16, float32
from tests.wide_heads import VOCAB

# 211 columns: rows of 16 bits begin anywhere.
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB, length).tolist() for length in (3, 20, 7, 1, 33)]
PARAMS = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=7, max_tokens=9, ignore_eos=True)
          for temperature, top_k, top_p in ((0, 0, 1), (1.2, 0, 1), (0.8, 20, 1), (1, 0, 0.9), (0.9, 30, 0.8))]
GREEDY = SamplingParams(temperature=0, max_tokens=9, seed=0, ignore_eos=True)


@pytest.fixture
def drawn(monkeypatch):
    """The dtypes of the logits that `all_local_logits` has returned. Those of `local_logits` are float32."""
    model, found, others = distributed_transformer.DistributedTransformer, [], []

    def record(name, dtypes):
        own = getattr(model, name)

        def recorded(self, *arguments):
            parts = own(self, *arguments)
            dtypes.extend(part.dtype for part in parts)
            return parts

        monkeypatch.setattr(model, name, recorded)

    record("all_local_logits", found)
    record("local_logits", others)
    yield found
    assert set(others) == {float32}


def tokens_of(path, dtype, **settings):
    """Of batches of mixed and of greedy requests; settings: of the model."""
    with LLM(path, device="cuda", dtype=dtype.name, max_running=8, kv_tokens=16 * PAGE_SIZE) as llm:
        for name, value in settings.items():
            setattr(llm.model, name, value)
        return [[output.token_ids for output in llm.generate(PROMPTS, params)] for params in (PARAMS, GREEDY)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_those_of_logits_in_float32(cuda, wide, drawn, monkeypatch, dtype):
    tokens = tokens_of(wide(), dtype)
    assert set(drawn) == {dtype}
    drawn.clear()
    monkeypatch.setattr(distributed_transformer, "logits_to_draw_from", finish_logits)
    assert tokens_of(wide(), dtype) == tokens
    assert set(drawn) == {float32}


@pytest.mark.parametrize("settings", [{"logits_scaling": 0.3}, {"logit_softcapping": 2.0},
                                      {"logits_scaling": 0.5, "logit_softcapping": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_logits_that_are_scaled_or_capped_are_drawn_in_float32(cuda, wide, drawn, dtype, settings):
    assert tokens_of(wide(), dtype, **settings) != tokens_of(wide(), dtype)
    first, *_ = drawn
    assert first == float32 and set(drawn) == {float32, dtype}
