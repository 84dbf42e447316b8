"""The sampler against logits processors of Hugging Face transformers (tests/golden/make_sampling_golden.py)."""

import json
from pathlib import Path

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine import sampler as sampler_module
from cutp.engine.sampler import Sampler
from cutp.ops.sampling import survivors
from tests.engine.sampling_reference import changed_logits, make_request
from tests.engine.sampling_reference import survivors as reference_survivors

FILE = np.load(Path(__file__).parents[1] / "golden" / "sampling.npz")
CASES = json.loads(str(FILE["cases"]))
VOCAB = FILE["logits"].shape[1]


def requests():
    return [make_request(slot=i, prompt=case["prompt"], generated=case["output"], ends=case["ends"], vocab_size=VOCAB,
                         **case["params"]) for i, case in enumerate(CASES)]


def test_the_file_has_every_parameter():
    used = [name for case in CASES for name in case["params"]]
    assert all(used.count(name) > 20 for name in ("top_k", "top_p", "min_p", "repetition_penalty", "min_tokens",
                                                  "logit_bias", "bad_words"))
    changed, kept = FILE["changed"] != FILE["logits"], FILE["kept"]
    assert changed.any(axis=1).sum() > 60 and np.isinf(FILE["changed"]).any(axis=1).sum() > 20
    assert len(set(kept.sum(axis=1).tolist())) > 15


def test_changed_logits_and_kept_tokens(monkeypatch):
    seen = {}

    def watch(logits, vocab_start, rows, comm):
        seen.update(changed=logits.copy(), kept=survivors(logits, vocab_start, rows, comm))
        return logits.argmax(axis=1)

    monkeypatch.setattr(sampler_module, "sample", watch)
    sampler, batch = Sampler(0, VOCAB, len(CASES), Communicator.single()), requests()
    for request in batch:
        sampler.admit(request)
    sampler.sample(FILE["logits"], batch)
    np.testing.assert_array_equal(seen["changed"], FILE["changed"])
    np.testing.assert_array_equal(seen["kept"], FILE["kept"])


def test_the_reference_of_the_other_tests_agrees():
    for i, request in enumerate(requests()):
        x = changed_logits(FILE["logits"][i].tolist(), request)
        np.testing.assert_allclose(x, FILE["changed"][i], rtol=1e-6)
        z = [(value - max(x)) / request.params.temperature for value in x]
        assert reference_survivors(z, request.params) == set(np.flatnonzero(FILE["kept"][i]).tolist())
