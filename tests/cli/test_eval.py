"""`cutp eval` on a task of one's own, without a network."""

import importlib.util
import json
import os
import sys

import pytest

from tests.cli.conftest import TALES
from tests.mpirun import needs_mpirun, run_mpi

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
QUESTIONS = [("Once upon a time there was a king who had three", [" daughters", " elephants"], 0),
             ("The wolf said to the little", [" pig", " red riding hood"], 1),
             ("She went into the", [" kitchen", " forest"], 1)]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A directory with the task `own_choice`, and one with errors."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in QUESTIONS))
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "own.yaml").write_text(f"""
task: own_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
""")
    return directory


@needs_harness
@needs_mpirun
def test_two_ranks(tasks, tmp_path):
    output = tmp_path / "results.json"
    done = run_mpi(2, [sys.executable, "-m", "cutp", "eval", TALES, "--tasks", "own_*", "--include-path", tasks,
                       "--limit", "2", "--output", output], timeout=180,
                   env={name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("own_choice") == 1 and "acc" in done.stdout
    results = json.loads(output.read_text())
    assert results["results"]["own_choice"]["acc,none"] == 0.5
    assert results["n-samples"]["own_choice"] == {"original": 3, "effective": 2}


@needs_harness
def test_errors_of_the_harness(cli, tasks, tmp_path):
    cli("eval", "/no/such/model", "--tasks", "own_choise", "--include-path", tasks).assert_error(
        2, "no task own_choise", "lm-eval ls tasks")
    cli("eval", TALES, "--tasks", "own_choice", "--include-path", tmp_path / "none").assert_error(
        2, "is not a directory")
    cli("eval", TALES, "--tasks", "own_choice", "--include-path", tasks, "--output", tmp_path).assert_error(
        2, "cannot be written")


def test_without_the_harness(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    cli("eval", "/no/such/model", "--tasks", "a").assert_error(2, "not installed", "pip install lm-eval")


def test_the_help_has_an_example(cli):
    done = cli("eval", "--help")
    assert done.code == 0 and done.out.rstrip().split("\n")[-1].startswith("example: mpirun -n 2 cutp eval ")
