"""The programs in mpi_examples run and say what they promise."""

import importlib.util
import json
import re
import sys

import numpy as np

from cutp import Communicator
from cutp.models import registry
from cutp.nn import DeviceGroup, RaggedBatch, allocate_caches
from tests.mpirun import CHECKOUT, needs_mpirun, run_mpi

EXAMPLES = CHECKOUT / "mpi_examples"


def run(name, ranks):
    done = run_mpi(ranks, [sys.executable, EXAMPLES / name])
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_mpirun
def test_handmade_transformer():
    out = run("handmade_transformer.py", 4)
    assert re.search(r"ranks 2 to 3: pi is about 3\.14", out)
    sequences = json.loads(re.search(r"ranks 0 to 1: (.*)", out)[1])
    assert [len(s) for s in sequences] == [15, 14] and sequences == unsharded_sequences()


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def unsharded_sequences():
    """The same prompts through the same model on one device, every step from scratch."""
    example = module_of("handmade_transformer")
    devices = DeviceGroup.of(Communicator.single())
    model = example.build(devices)
    model.load(example.random_arrays(model))
    sequences = [[5, 3, 8], [1, 4]]
    for _ in range(12):
        caches = allocate_caches(model.kv_params, 8, devices)
        (logits,) = model(RaggedBatch.of(sequences, model.kv_params.page_size), caches)
        sequences = [s + [int(t)] for s, t in zip(sequences, np.argmax(logits, axis=1), strict=True)]
    return sequences


@needs_mpirun
def test_two_models():
    out = run("two_models.py", 4)
    assert out.startswith("Once upon a time")
    assert 1.0 < float(re.search(r"perplexity of the story: ([0-9.]+)", out)[1]) < 50.0


@needs_mpirun
def test_llm_service():
    lines = run("llm_service.py", 4).splitlines()
    starts = [re.match(r"rank ([23]): (Once upon a time|There was a king who|The little dog).{20}", line)
              for line in lines]
    assert sorted({match.groups() for match in starts}) == sorted(
        (rank, prompt) for rank in "23" for prompt in module_of("llm_service").QUESTIONS)


@needs_mpirun
def test_simulation_loop():
    lines = run("simulation_loop.py", 2).splitlines()
    assert [re.match(r"asked at step (\d+): The fire was \d+ paces high, and .", line)[1] for line in lines[:-1]] == [
        "0", "20", "40"]
    assert lines[-1] == "after 60 steps: heat 100.0, 36 tokens generated"


@needs_mpirun
def test_register_model(tmp_path, monkeypatch):
    out = run("register_model.py", 3)
    tokens = json.loads(re.fullmatch(r"3 ranks: (.*)\n", out)[1])
    monkeypatch.setattr(registry, "_registered", {})
    example = module_of("register_model")
    example.write_checkpoint(tmp_path)
    assert len(set(tokens)) > 5 and tokens == example.generate(Communicator.single(), tmp_path)
    # Another window is another model: what the example says is special about it is really computed.
    (tmp_path / "config.json").write_text(json.dumps(example.CONFIG | {"window": 2}))
    assert tokens != example.generate(Communicator.single(), tmp_path)
