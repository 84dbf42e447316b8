"""`batch_invariant`: on a GPU, a request's bits do not depend on what runs beside it, nor on how its prompt is cut."""

import numpy as np
import pytest

from cutp import LLM, SamplingParams
from cutp.errors import ConfigError
from cutp.kv_cache.params import PAGE_SIZE
from cutp.nn.device_batch import DecodeWorkspace
from cutp.ops import dispatch
from tests.wide_heads import VOCAB

_RNG = np.random.default_rng(2)
# The second is one token longer than a pass; the last spans pages.
PROMPTS = [_RNG.integers(0, VOCAB, length).tolist() for length in (1, 49, 3, PAGE_SIZE + 1, 20, 150)]
PARAMS = [SamplingParams(temperature=0.0 if i % 2 else 0.8, max_tokens=6, seed=i, logprobs=2, prompt_logprobs=1,
                         ignore_eos=True) for i in range(len(PROMPTS))]
TOGETHER = {"max_running": 5, "max_batch_tokens": 48, "kv_tokens": 16 * PAGE_SIZE}
ALONE = {"max_running": 1, "max_batch_tokens": 512, "kv_tokens": 4 * PAGE_SIZE}


def found(output):
    """Everything that a sum could change."""
    scores = [None if one is None else (one.token_id, one.logprob, one.top)
              for one in (*output.logprobs, *output.prompt_logprobs)]
    return output.token_ids, scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_alone_and_among_others(cuda, wide, dtype):
    options = {"device": "cuda", "dtype": dtype, "batch_invariant": True, "prefix_cache": False}
    with LLM(wide(), **options, **TOGETHER) as llm:
        together = [found(output) for output in llm.generate(PROMPTS, PARAMS)]
        assert llm.stats()["preemptions"] == 0
    with LLM(wide(), **options, **ALONE) as llm:
        for prompt, params, expected in zip(PROMPTS, PARAMS, together, strict=True):
            assert found(*llm.generate([prompt], params)) == expected


def test_pages_of_another_request_have_the_same_bits(cuda, wide):
    stem = _RNG.integers(0, VOCAB, PAGE_SIZE).tolist()
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
    results = []
    for shared in (True, False):
        with LLM(wide(), device="cuda", dtype="bfloat16", batch_invariant=True, prefix_cache=shared, **TOGETHER) as llm:
            llm.generate([stem + [5, 6, 7]], params)
            [output] = llm.generate([stem + [8]], params)
            results.append((output.token_ids, [(one.token_id, one.logprob) for one in output.logprobs]))
    assert results[0] == results[1]


def test_what_the_mode_chooses(cuda, wide, monkeypatch):
    """Products, splits and kernels are those that the batch has no part in."""
    invariant, workspaces = [], []
    plain = dispatch.gemm.linear

    def linear(*args, **options):
        invariant.append(options.get("row_invariant", False))
        return plain(*args, **options)

    prepare = DecodeWorkspace.prepare
    monkeypatch.setattr(dispatch.gemm, "linear", linear)
    monkeypatch.setattr(DecodeWorkspace, "prepare", lambda self, lengths: workspaces.append(self.batch_invariant)
                        or prepare(self, lengths))
    for wanted in (True, False):
        with LLM(wide(), device="cuda", dtype="bfloat16", batch_invariant=wanted, **TOGETHER) as llm:
            llm.generate(PROMPTS[:3], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert invariant and set(invariant) == {wanted} and set(workspaces) == {wanted}
        invariant.clear()
        workspaces.clear()


def test_the_cpu_has_no_such_mode(wide):
    with pytest.raises(ConfigError, match="batch_invariant is for GPUs"):
        LLM(wide(), device="cpu", batch_invariant=True)
