"""One file out of many: every record once, in the order asked for, whole or not at all."""

import json
import os

import pytest

from cutp.batch import merge as merge_module
from cutp.batch.journal import to_line
from cutp.batch.merge import merge_results
from cutp.batch.prepare import JobOptions
from cutp.batch.status import job_status
from cutp.errors import ConfigError, OutputError, RequestError
from tests.batch.fake_llm import run, write_lines, write_model


@pytest.fixture
def job(tmp_path):
    """A job of 20 records in two files, stopped once, and all its results; 7 of them ran twice."""
    files = [write_lines(tmp_path / "b.jsonl", [{"id": i, "prompt": f"p{i}", "max_tokens": 1 + i % 4}
                                                for i in range(12)]),
             write_lines(tmp_path / "a.txt", [f"t{i}" for i in range(8)])]
    options = JobOptions(write_model(tmp_path / "model"), files, str(tmp_path / "out"), {"max_tokens": 3}, seed=2)
    run(options, 3, stop_at=(0, 2))
    assert run(options, 2)[0] == 0
    (tmp_path / "out" / "part-9.9.jsonl").write_bytes(to_line({"id": 7, "text": "again"}))
    return options


def merged(job, tmp_path, *args, **options):
    assert merge_results(job.directory, str(tmp_path / "all.jsonl"), *args, **options)[0] == \
        len((tmp_path / "all.jsonl").read_text().splitlines())
    return [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]


IDS = [*range(12), *(f"a.txt:{i}" for i in range(1, 9))]


def test_order_of_the_input(job, tmp_path):
    lines = merged(job, tmp_path)
    assert [line["id"] for line in lines] == IDS and lines[7]["text"].startswith("p7 ")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_order_of_the_results(job, tmp_path):
    ids = [line["id"] for line in merged(job, tmp_path, "done")]
    names = sorted((name.split(".")[1], name) for name in os.listdir(job.directory) if name.startswith("part-"))
    lines = [line for _, name in names for line in (tmp_path / "out" / name).read_text().splitlines()]
    assert ids == list(dict.fromkeys(json.loads(line)["id"] for line in lines)) and ids != IDS
    for path in job.inputs:
        os.remove(path)
    assert [line["id"] for line in merged(job, tmp_path, "done")] == ids
    with pytest.raises(RequestError, match="b.jsonl is not there any more.*--order done"):
        merged(job, tmp_path)


def test_changed_input(job, tmp_path):
    with open(job.inputs[0], "a") as file:
        file.write("{}\n")
    with pytest.raises(RequestError, match="b.jsonl has changed"):
        merged(job, tmp_path)


def test_incomplete(job, tmp_path):
    for name in os.listdir(job.directory):
        if name.startswith("part-") and name != "part-9.9.jsonl":
            os.remove(f"{job.directory}/{name}")
    (tmp_path / "all.jsonl").write_text("before")
    for order in ("input", "done"):
        with pytest.raises(ConfigError, match="19 of 20 records are still to do.*--partial"):
            merge_results(job.directory, str(tmp_path / "all.jsonl"), order)
    assert (tmp_path / "all.jsonl").read_text() == "before"
    assert merge_results(job.directory, str(tmp_path / "all.jsonl"), partial=True) == (1, 19)


def test_records_that_failed_are_not_missing(job, tmp_path):
    with open(job.inputs[0], "a") as file:
        file.write('{"id": "bad", "prompt": "refuse"}\noops\n')
    assert run(JobOptions(**{**vars(job), "accept_changes": True}))[0] == 6
    assert merge_results(job.directory, str(tmp_path / "all.jsonl")) == (20, 2)
    status = job_status(job.directory)
    assert (status["records"], status["done"], status["failed"], status["remaining"]) == (22, 20, 2, 0)
    assert [(error["code"], error["count"]) for error in status["errors"]] == [("request", 2)]
    assert [attempt.get("exit") for attempt in status["attempts"]] == [75, 0, 6]
    assert status["metrics"][0]["job"]["failed"] == 2


def test_records_that_failed_before_a_change_are_to_do_again(job, tmp_path):
    with open(job.inputs[0], "a") as file:
        file.write('{"id": "bad", "prompt": "refuse"}\n')
    changing = JobOptions(**{**vars(job), "accept_changes": True})
    assert run(changing)[0] == 6
    merge_results(job.directory, str(tmp_path / "all.jsonl"))
    text = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text.replace("refuse", "right"))
    assert run(JobOptions(**{**vars(changing), "time_limit": "0"}))[0] == 75
    with pytest.raises(ConfigError, match="1 of 21 records are still to do"):
        merge_results(job.directory, str(tmp_path / "all.jsonl"))
    assert run(job)[0] == 0 and merge_results(job.directory, str(tmp_path / "all.jsonl")) == (21, 0)


def test_full_disk(job, tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module.os, "fsync", fsync)
    with pytest.raises(OutputError, match="all.jsonl cannot be written: No space"):
        merge_results(job.directory, str(tmp_path / "all.jsonl"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("all.jsonl")]


@pytest.mark.parametrize("call", [job_status, lambda path: merge_results(path, f"{path}.jsonl")])
def test_no_job(tmp_path, call):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OutputError, match="is not the directory of a batch job"):
            call(str(path))
