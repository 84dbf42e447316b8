"""Writes lm_eval.json: what lm-eval finds with Hugging Face's model, for the bundled tales model in float32.

    pip install torch transformers accelerate lm-eval
    python tests/golden/make_lm_eval_golden.py

Contents of the file:
    versions   {"lm_eval", "transformers", "torch"}
    tasks      per task of `offline_tasks`: {"results": {metric: value}, "responses": those of each document}
    requests   per context length ("null" is the model's own): {"loglikelihood": [[sum, is greedy]], "rolling": [sum],
               "generation": [text]} of the requests of `offline_tasks`
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.contrib.offline_tasks import GENERATION, MAX_LENGTHS, PAIRS, ROLLING, TASKS  # noqa: E402


def model(max_length: int | None = None) -> HFLM:
    return HFLM(pretrained=str(ROOT / "cutp" / "bundled" / "tales"), device="cpu", dtype="float32",
                max_length=max_length, batch_size=1)


def instances(kind: str, requests) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(requests)]


def tasks() -> dict:
    found = simple_evaluate(model(), tasks=TASKS, bootstrap_iters=0)
    return {name: {"results": {key: value for key, value in results.items() if isinstance(value, float)},
                   "responses": [sample["resps"] for sample in found["samples"][name]]}
            for name, results in found["results"].items()}


def requests(max_length: int | None) -> dict:
    lm = model(max_length)
    # One at a time, so that no text is padded to the length of another.
    generated = [text for each in GENERATION for text in lm.generate_until(instances("generate_until", [each]))]
    return {"loglikelihood": lm.loglikelihood(instances("loglikelihood", PAIRS)),
            "rolling": lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in ROLLING])),
            "generation": generated}


def main() -> None:
    golden = {"versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")}, "tasks": tasks(),
              "requests": {json.dumps(length): requests(length) for length in MAX_LENGTHS}}
    Path(__file__).with_name("lm_eval.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
