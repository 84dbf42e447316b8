"""Requests for tests of the sampler, and how to sample them in plain float64 Python, one token after the other."""

import dataclasses
import math

import numpy as np

from cutp.checkpoint.generation_config import GenerationDefaults
from cutp.engine.request import Request
from cutp.engine.sampling_params import SamplingParams
from cutp.ops.philox import gumbel_noise


def make_request(slot=0, prompt=(1, 2, 3), generated=(), ends=(0,), sample_index=0, vocab_size=50, seed=7, **params):
    """A running request; bad_words are token ids."""
    params = SamplingParams(**params).with_defaults(GenerationDefaults())
    params = dataclasses.replace(params, seed=seed).resolved(None, vocab_size, ())
    return Request(id=slot, key=slot, prompt=None, prompt_token_ids=list(prompt), max_total=1000, params=params,
                   sample_index=sample_index, end_token_ids=frozenset(ends), generated=list(generated), slot=slot)


def changed_logits(x, request):
    """The logits of one row, a list, after bias, masks and penalties."""
    p, prompt, output = request.params, request.prompt_token_ids, request.generated
    before = prompt + output
    x = [float(value) for value in x]
    for token, bias in p.logit_bias:
        x[token] += bias
    if len(output) < p.min_tokens:
        for token in request.end_token_ids:
            x[token] = -math.inf
    for *start, last in p.bad_words:
        if before[len(before) - len(start) :] == start:
            x[last] = -math.inf
    for token in set(before):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return x


def survivors(z, params, slack=0.0):
    """The tokens that may be drawn, of scores z; slack: how much wider top-p and min-p are, relatively."""
    order = sorted((i for i in range(len(z)) if z[i] > -math.inf), key=lambda i: -z[i])
    if params.top_k:
        order = [i for i in order if z[i] >= z[order[min(params.top_k, len(order)) - 1]]]
    if params.top_p < 1:
        total, mass = sum(math.exp(z[i]) for i in order), 0.0
        for i in order:
            mass += math.exp(z[i])
            if mass >= params.top_p * (1 + slack) * total:
                order = [j for j in order if z[j] >= z[i]]
                break
    return {i for i in order if math.exp(z[i]) >= min(1.0, params.min_p * (1 - slack))}


def expected_token(x, request):
    """The token that follows logits x, or None where the rounding of float32 may decide."""
    x, params, close = changed_logits(x, request), request.params, 1e-4
    if params.temperature == 0:
        totals = dict(enumerate(x))
    else:
        z = [(value - max(x)) / params.temperature for value in x]
        kept = survivors(z, params)
        if any(survivors(z, params, slack) != kept for slack in (-close, close)):
            return None
        ids = np.array(sorted(kept))
        same = (np.full(len(ids), value, np.uint64) for value in (params.seed, request.sample_index, request.length))
        totals = {int(i): z[i] + float(noise) for i, noise in zip(ids, gumbel_noise(*same, ids), strict=True)}
    best = max(totals, key=totals.get)
    rivals = [i for i in totals if i != best and totals[i] > totals[best] - close]
    if params.temperature == 0 and all(totals[i] == totals[best] for i in rivals):
        return min([best, *rivals])
    return None if rivals else best
