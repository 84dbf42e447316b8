"""Hand-built transformers whose results must not depend on what the devices are: processes, threads or a plain list."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cutp.kv_cache import allocate_caches
from cutp.nn import RaggedBatch, ReturnHiddenStates, ReturnLogits
from tests.nn.building import cpus, random_values
from tests.nn.decoder import EVERYTHING, OTHERWISE, PROMPTS, Spec, build

LONG = [[*range(13)] * 6, [5, 4], [7] * 40]
ODD = replace(EVERYTHING, vocab=17, heads=5, kv_heads=1)
CASES = {
    "plain": (Spec(), PROMPTS, {}),
    "odd vocabulary, uneven heads, every option": (ODD, PROMPTS, dict(return_logits=ReturnLogits.ALL)),
    "other options": (replace(OTHERWISE, vocab=17, heads=5, kv_heads=1), PROMPTS, {}),
    "parallel branches, overlap": (replace(OTHERWISE, norms="parallel", overlap=True), LONG, {}),
    "7 heads, tied": (Spec(heads=7, kv_heads=7, vocab=11, tied=True), PROMPTS, {}),
    "overlap": (replace(ODD, overlap=True), LONG, {}),
    "overlap, large": (Spec(hidden=520, width=64, overlap=True, mlp_bias=True, output_bias=True), LONG, {}),
    "variable": (Spec(), PROMPTS, dict(return_logits=ReturnLogits.VARIABLE)),
    "hidden states": (Spec(), PROMPTS, dict(return_hidden_states=ReturnHiddenStates.ALL_NORMALIZED)),
    "subgraphs": (Spec(layers=3), PROMPTS, dict(use_subgraphs=True, subgraph_layer_groups=[[2, 0]])),
}


def values_of(spec):
    return random_values(build(spec, cpus(1)))


def run(name, devices) -> list[np.ndarray]:
    """All arrays that one pass returns; the prompts in one shot."""
    spec, prompts, options = CASES[name]
    model = build(spec, devices, **options)
    model.load(values_of(spec))
    batch = RaggedBatch.of(prompts, 3)
    return list(model(batch, allocate_caches(model.kv_params, batch.lookup_table.size, devices), 2))


def chunked(devices) -> np.ndarray:
    """The last logits of three requests whose tokens come in chunks, with growing cache_lengths."""
    model = build(ODD, devices)
    model.load(values_of(ODD))
    caches = allocate_caches(model.kv_params, 3 * 3, devices)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        batch = RaggedBatch.of([prompt[start:stop] for prompt in chunked_prompts()], 3, [start] * 3, max_total=8)
        (last,) = model(batch, caches)
    return last


def chunked_prompts():
    return [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8], [9, 7, 9, 3, 2, 3]]


def run_all(devices) -> dict[str, np.ndarray]:
    results = {f"{name}: {i}": array for name in CASES for i, array in enumerate(run(name, devices))}
    return results | {"chunked": chunked(devices)}
