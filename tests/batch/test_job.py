"""Whole jobs on an engine without a model: dealing, stopping, resuming, failing, on any shape of ranks."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cutp.batch import hand_out, journal
from cutp.batch import job as job_module
from cutp.batch import manifest as manifest_module
from cutp.batch.attempts import OwnAttempt
from cutp.batch.journal import Journal
from cutp.batch.manifest import Manifest
from cutp.batch.prepare import JobOptions
from cutp.batch.records import record_seed
from cutp.errors import CapacityError, CheckpointError, CommError, ConfigError, CutpError, OutputError, RequestError
from tests.batch.fake_llm import FakeLLM, errors, results, run, write_lines, write_model

SHAPES = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)]
RECORDS = 40


@pytest.fixture(autouse=True)
def quick_meetings(monkeypatch):
    monkeypatch.setattr(hand_out, "SHORTEST", 0.005)
    monkeypatch.setattr(hand_out, "LONGEST", 0.01)


@pytest.fixture
def options(tmp_path):
    lines = [{"id": f"r{i}", "prompt": f"p{i}", "max_tokens": 1 + i % 7} for i in range(RECORDS)]
    return JobOptions(write_model(tmp_path / "model"), [write_lines(tmp_path / "in.jsonl", lines)],
                      str(tmp_path / "out"), {"temperature": 0.5}, seed=11)


def json_lines(options, name):
    return [json.loads(line) for line in Path(options.directory, name).read_text().splitlines()]


def check_complete(options, records=RECORDS):
    found = results(options.directory)
    assert {name: line["text"] for name, line in found.items()} == {
        f"r{i}": f"p{i} {record_seed(11, f'r{i}')} 0" for i in range(records)}


@pytest.mark.parametrize(("ranks", "tp"), SHAPES)
def test_a_job_from_beginning_to_end(options, ranks, tp):
    llms = {}
    code, said = run(options, ranks, tp, llms=llms)
    assert code == 0 and f"{RECORDS} of {RECORDS} records done, 0 failed, 0 left" in said
    check_complete(options)
    assert all(llm.closed for llm in llms.values())
    # All replicas have had their share.
    parts = [name for name in os.listdir(options.directory) if name.startswith("part-")]
    assert len(parts) == ranks // tp
    attempt = json_lines(options, "attempt-1.jsonl")
    assert attempt[0]["replicas"] == ranks // tp and attempt[1] | {"ended": 0} == {
        "ended": 0, "exit": 0, "done": RECORDS, "failed": 0, "remaining": 0}


def test_longest_first(options):
    llms = {}
    run(options, llms=llms)
    order = [int(prompt[1:]) for prompt in llms[0].added]
    assert order == sorted(range(RECORDS), key=lambda i: (-(i % 7), i))


def test_records_are_read_as_they_are_needed(options, tmp_path, monkeypatch):
    """However fast an engine is, only so many records lie about; and all of them are run."""
    class Eight(FakeLLM):
        max_running = 8

    monkeypatch.setattr(hand_out, "WINDOW_RECORDS", 8)
    monkeypatch.setattr(hand_out, "LEAST_BACKLOG", 4)
    monkeypatch.setattr(hand_out, "MOST_BACKLOG", 16)
    monkeypatch.setattr(job_module, "EngineOptions", lambda: SimpleNamespace(max_running=8))
    write_lines(tmp_path / "in.jsonl", [{"id": f"r{i}", "prompt": f"p{i}", "max_tokens": 1} for i in range(500)])
    most = []
    llms = {}

    def on_step(rank, number):
        most.append(len(llms[rank]._open))

    assert run(options, 2, open_llm=Eight, on_step=on_step, llms=llms)[0] == 0
    check_complete(options, 500)
    assert 8 + 4 <= max(most) <= 8 + 16


def test_an_engine_that_runs_fewer_gets_fewer(options, tmp_path, monkeypatch):
    class Narrow(FakeLLM):
        max_running = 3

    monkeypatch.setattr(hand_out, "LEAST_BACKLOG", 4)
    monkeypatch.setattr(hand_out, "MOST_BACKLOG", 4)
    monkeypatch.setattr(job_module, "EngineOptions", lambda: SimpleNamespace(max_running=50))
    write_lines(tmp_path / "in.jsonl", [{"id": f"r{i}", "prompt": f"p{i}", "max_tokens": 2} for i in range(200)])
    llms, most = {}, []

    def on_step(rank, number):
        most.append(len(llms[rank]._open))
        time.sleep(0.002)

    assert run(options, open_llm=Narrow, llms=llms, on_step=on_step)[0] == 0
    check_complete(options, 200)
    # The first share is a guess; once the engine has been seen it gets what it runs and the backlog.
    assert most[0] == 54 and max(most[54 // 3 * 2 + 2:]) <= 3 + 4


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="finds the names of open files in /proc")
def test_lines_are_forced_to_disk(options, monkeypatch):
    synced, fsync = [], os.fsync

    def counting(fd):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    with open(options.inputs[0], "a") as file:
        file.write(BAD[0] + "\n")
    monkeypatch.setattr(os, "fsync", counting)
    run(options, 2)
    for name in ("part-0.1.jsonl", "part-1.1.jsonl", "errors.0.1.jsonl", "metrics.1.1.jsonl"):
        assert synced.count(name) == 1
    synced.clear()
    monkeypatch.setattr(job_module, "_SYNC_SECONDS", 0.0)
    run(replace(options, directory=f"{options.directory}2"), on_step=lambda rank, number: time.sleep(0.01))
    assert synced.count("part-0.1.jsonl") > 1 and synced.count("errors.0.1.jsonl") == 1


def test_metrics(options):
    run(replace(options, interval=0.001), 2)
    for replica in (0, 1):
        lines = json_lines(options, f"metrics.{replica}.1.jsonl")
        assert len(lines) > 1 and [line["last"] for line in lines] == [False] * (len(lines) - 1) + [True]
        last = lines[-1]
        assert last["job"] == {"done": RECORDS, "failed": 0, "remaining": 0} and last["outstanding"] == 0
        assert last["generated_tokens"] > 0 and last["generated_tokens_per_s"] > 0 and last["load_s"] >= 0
        assert last["peak_host_bytes"] > 1e6 and "peak_device_bytes" in last


@pytest.mark.parametrize(("ranks", "tp"), SHAPES)
@pytest.mark.parametrize("step", [0, 3])
def test_stopped_and_resumed_with_other_ranks(options, ranks, tp, step):
    code, said = run(options, ranks, tp, stop_at=(ranks - 1, step))
    assert code == 75 and "stopped early (a test)" in said and "the same command goes on from here" in said
    before = results(options.directory)
    stamps = {path: os.stat(f"{options.directory}/{path}").st_size for path in os.listdir(options.directory)}
    code, said = run(options, 5 - ranks if ranks != 2 else 4, 1 if ranks != 2 else 2)
    assert code == 0
    check_complete(options)
    assert all(results(options.directory)[name] == line for name, line in before.items())
    assert all(os.stat(f"{options.directory}/{path}").st_size == size for path, size in stamps.items())


def test_a_complete_job_needs_no_model(options):
    run(options)
    code, said = run(options, open_llm=None)
    assert code == 0 and "nothing is left to do: 40 of 40 records are done" in said


def test_time_limit(options):
    code, said = run(replace(options, time_limit="0"), open_llm=None)
    assert code == 75 and "stopped early (the time limit)" in said and results(options.directory) == {}
    assert run(replace(options, time_limit="1h", margin="2h"))[0] == 75
    assert run(replace(options, time_limit="1h"))[0] == 0
    with pytest.raises(ConfigError, match="--time-limit 90m"):
        run(replace(options, time_limit="auto"), 2)


BAD = ['{"id": "b1"', '{"id": "b2", "prompt": ""}', '{"id": "b3", "prompt": "refuse"}',
       '{"id": "b4", "prompt": "too large"}', '{"id": "b5", "prompt": "x", "temperature": -1}',
       '{"custom_id": "b6", "url": "/v1/completions", "body": {"prompt": "refuse"}}']


@pytest.mark.parametrize(("ranks", "tp"), SHAPES)
def test_bad_records_become_error_lines(options, tmp_path, ranks, tp):
    with open(options.inputs[0], "a") as file:
        file.write("\n".join(BAD) + "\n")
    code, said = run(options, ranks, tp)
    assert code == 6 and "40 of 46 records done, 6 failed, 0 left" in said
    check_complete(options)
    found = {line.get("custom_id", line["id"]): line for line in errors(options.directory)}
    assert len(errors(options.directory)) == 6 and set(found) == {None, "b2", "b3", "b4", "b5", "b6"}
    assert found[None]["line"] == RECORDS + 1 and "is not JSON" in found[None]["error"]["message"]
    assert found["b3"]["error"] == {"code": "request", "message": "line 43 of in.jsonl: the prompt is refused"}
    assert found["b4"]["error"]["code"] == "capacity" and found["b6"]["response"] is None
    # Settled: they are not tried again, and the job stays one with error records.
    code, said = run(options, open_llm=None)
    assert code == 6 and "nothing is left to do: 40 of 46 records are done, 6 failed" in said
    assert len(errors(options.directory)) == 6


def test_failures_of_earlier_starts_are_counted(options):
    with open(options.inputs[0], "a") as file:
        file.write("\n".join(BAD[:3]) + "\n")
    code, said = run(options, 1, stop_at=(0, 3))
    assert code == 75 and len(errors(options.directory)) == 3 and 0 < len(results(options.directory)) < RECORDS
    code, said = run(options, 2)
    assert code == 6 and "40 of 43 records done, 3 failed, 0 left" in said
    check_complete(options)


def test_max_fails(options):
    with open(options.inputs[0], "a") as file:
        file.write("\n".join(BAD[:3]) + "\n")
    twice = replace(options, max_fails=2)
    assert [run(twice)[0], len(errors(options.directory))] == [6, 3]
    assert [run(twice)[0], len(errors(options.directory))] == [6, 6]
    assert [run(twice, open_llm=None)[0], len(errors(options.directory))] == [6, 6]
    assert run(replace(options, max_fails=3), 2)[0] == 6 and len(errors(options.directory)) == 9


def test_stop_on_error(options):
    strict = replace(options, stop_on_error=True)
    with open(options.inputs[0], "a") as file:
        file.write(BAD[2] + "\n")
    code, said = run(strict, 2)
    assert code == 6 and "stopped at the first error record" in said and len(errors(options.directory)) == 1
    assert len(results(options.directory)) < RECORDS
    # Tried again, because strict means that nothing is passed over.
    assert run(strict)[0] == 6 and len(errors(options.directory)) == 2
    with open(options.inputs[0], "a") as file:
        file.write(BAD[0] + "\n")
    with pytest.raises(RequestError, match="line 42 of in.jsonl is not JSON"):
        run(replace(strict, directory=f"{options.directory}2"), 2)
    assert not os.path.exists(f"{options.directory}2")


def test_several_samples(options, tmp_path):
    write_lines(tmp_path / "in.jsonl",
                [{"id": f"r{i}", "prompt": f"p{i}", "n": 1 + i % 3, "max_tokens": 3} for i in range(9)])
    assert run(options, 2)[0] == 0
    for i in range(9):
        line = results(options.directory)[f"r{i}"]
        texts = [line["text"]] if i % 3 == 0 else [choice["text"] for choice in line["choices"]]
        assert texts == [f"p{i} {record_seed(11, f'r{i}')} {sample}" for sample in range(1 + i % 3)]


def test_a_drawn_seed_is_kept(options):
    drawn = replace(options, seed=None)
    run(drawn, stop_at=(0, 2))
    seeds = {line["seed"] for line in results(options.directory).values()}
    assert run(drawn)[0] == 0
    manifest = json.loads(Path(options.directory, "manifest.json").read_text())
    lines = results(options.directory)
    assert seeds <= {line["seed"] for line in lines.values()}
    assert all(line["seed"] == record_seed(manifest["seed"], name) for name, line in lines.items())


def test_a_changed_job_is_refused(options, tmp_path):
    run(options, stop_at=(0, 2))
    done = set(results(options.directory))
    files = sorted(os.listdir(options.directory))
    changes = {"seed was 11 and is 12": {"seed": 12}, "temperature was 0.5 and is null": {"params": {}},
               "chat was false and is true": {"chat": True}, "top_k was null and is 3": {
                   "params": {"temperature": 0.5, "top_k": 3}}, 'dtype was null and is "bfloat16"': {
                   "engine": {"dtype": "bfloat16"}}}
    for words, change in changes.items():
        with pytest.raises(ConfigError) as raised:
            run(replace(options, **change), 2)
        assert words in str(raised.value) and "--accept-changes" in str(raised.value)
    with open(f"{options.model}/tokenizer.json", "w") as file:
        file.write("{}")
    with pytest.raises(ConfigError, match="the tokenizer is another one"):
        run(options)
    os.remove(f"{options.model}/tokenizer.json")
    with open(f"{options.model}/model.safetensors", "w") as file:
        file.write("weightz")
    with open(options.inputs[0], "a") as file:
        file.write('{"id": "r40", "prompt": "p40", "max_tokens": 2}\n')
    with pytest.raises(ConfigError, match="the input has changed; the model is another one"):
        run(options)
    assert sorted(os.listdir(options.directory)) == files and set(results(options.directory)) == done
    code, said = run(replace(options, accept_changes=True), 2)
    assert code == 0 and "41 of 41" in said
    check_complete(options, 41)
    manifest = json.loads(Path(options.directory, "manifest.json").read_text())
    assert manifest["changes"] == [{"attempt": 2, "what": ["the input has changed", "the model is another one"]}]
    assert run(options, open_llm=None)[0] == 0


def test_what_a_changed_job_keeps():
    job = Manifest([], "m", "t", {"n": 1}, 5, 1000)
    changed = job.changed_to(Manifest([], "m", "t", {"n": 2}, 5, 2000), 3)
    assert (changed.created, changed.last_change, changed.parameters) == (1000, 3, {"n": 2})
    changed = changed.changed_to(job, 7)
    assert (changed.created, changed.last_change, changed.parameters) == (1000, 7, {"n": 1})
    assert [change["what"] for change in changed.changes] == [["n was 1 and is 2"], ["n was 2 and is 1"]]


def test_a_record_that_was_put_right_runs(options):
    with open(options.inputs[0], "a") as file:
        file.write('{"id": "r40", "prompt": "refuse", "max_tokens": 2}\n')
    assert run(options)[0] == 6
    path = Path(options.inputs[0])
    path.write_text(path.read_text().replace("refuse", "p40"))
    assert run(replace(options, accept_changes=True))[0] == 0
    check_complete(options, 41)
    assert run(options, open_llm=None)[0] == 0


def test_files_may_move(options, tmp_path):
    run(options, stop_at=(0, 2))
    moved = replace(options, inputs=[shutil.move(options.inputs[0], tmp_path / "other.jsonl")],
                    model=shutil.move(options.model, tmp_path / "other_model"))
    assert run(moved)[0] == 0
    check_complete(options)
    text = replace(options, inputs=[write_lines(tmp_path / "a.txt", ["one", "two"])], directory=f"{tmp_path}/out2",
                   model=moved.model, params={"max_tokens": 2})
    assert run(text)[0] == 0 and set(results(text.directory)) == {"a.txt:1", "a.txt:2"}
    with pytest.raises(ConfigError, match="the input has changed"):  # its ids are made from its name
        run(replace(text, inputs=[shutil.move(text.inputs[0], tmp_path / "b.txt")]))


@pytest.mark.parametrize(("lines", "words"), [
    (['{"id": 1, "prompt": "a"}', "", '{"id": 1, "prompt": "b"}'],
     "the id 1 is in line 1 of in.jsonl and in line 3 of in.jsonl (ids must differ"),
    ([], "the input has no records"), (["", "  "], "the input has no records"),
    (["x", "y"], "no line of the input is a record: line 1 of in.jsonl is not JSON")])
@pytest.mark.parametrize("ranks", [1, 3])
def test_input_that_is_refused(options, tmp_path, lines, words, ranks):
    write_lines(tmp_path / "in.jsonl", lines)
    with pytest.raises(RequestError) as raised:
        run(options, ranks)
    assert words in str(raised.value) and not os.path.exists(options.directory)


def test_another_job_is_running(options, tmp_path):
    os.mkdir(options.directory)
    own = OwnAttempt(tmp_path / "out", {}, print)
    with pytest.raises(OutputError, match=r"attempt 1 .* is running in"):
        run(options, 2)
    own.finish({})
    assert run(options)[0] == 0


def test_a_later_start_has_taken_over(options, monkeypatch):
    monkeypatch.setattr(job_module, "_SYNC_SECONDS", 0.0)

    def on_step(rank, number):
        if number >= 2:
            Path(options.directory, "attempt-2.jsonl").touch()
            time.sleep(0.02)

    code, said = run(options, on_step=on_step)
    assert code == 75 and "stopped early (a later start of the job)" in said


class OneWriterFails:
    """Result lines of replica `replica` fail from the `after`-th on."""

    def __init__(self, replica, after, kind="part-"):
        self.name, self.left, self.append = f"{kind}{replica}.1.jsonl", after, Journal.append

    def __call__(self, file, value):
        if file.path.name == self.name:
            self.left -= 1
            if self.left < 0:
                raise journal.cannot_write(file.path, OSError(28, "No space left on device"))
        self.append(file, value)


@pytest.mark.parametrize(("ranks", "tp", "replica"), [(1, 1, 0), (3, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("kind", ["part-", "metrics."])
def test_a_full_disk_ends_the_job_and_loses_nothing(options, monkeypatch, ranks, tp, replica, kind):
    with monkeypatch.context() as patch:
        failing = OneWriterFails(replica, 1, kind)
        patch.setattr(Journal, "append", lambda file, value: failing(file, value))
        with pytest.raises(OutputError, match="No space left on device") as raised:
            run(replace(options, interval=0.001), ranks, tp)
        assert raised.value.rank == (None if ranks == 1 else replica * tp)
    assert "No space" in json_lines(options, "attempt-1.jsonl")[1]["error"]
    assert run(options, 2)[0] == 0
    check_complete(options)


def test_after_a_failed_write_nothing_is_written_and_the_job_ends_soon(options, monkeypatch):
    monkeypatch.setattr(hand_out, "SHORTEST", 30.0)
    monkeypatch.setattr(hand_out, "LONGEST", 30.0)
    append, calls, steps = Journal.append, [], []

    def failing_once(file, value):
        if file.path.name.startswith("part-"):
            calls.append(value["id"])
            if len(calls) == 3:
                raise journal.cannot_write(file.path, OSError(28, "No space left on device"))
        append(file, value)

    monkeypatch.setattr(Journal, "append", failing_once)
    with pytest.raises(OutputError, match="No space"):
        run(options, on_step=lambda rank, number: steps.append(number))
    assert len(calls) == 3 and len(results(options.directory)) == 2 and len(steps) == 1


def test_input_that_goes_away_while_the_job_runs(options, tmp_path):
    class Removing(FakeLLM):
        def __init__(self, comm, on_step):
            super().__init__(comm, on_step)
            if os.path.exists(options.inputs[0]):
                os.remove(options.inputs[0])

    with pytest.raises(RequestError, match="in.jsonl is not there"):
        run(options, 1, open_llm=Removing)

    class Shortening(FakeLLM):
        def __init__(self, comm, on_step):
            super().__init__(comm, on_step)
            os.truncate(options.inputs[0], 100)

    write_lines(tmp_path / "in.jsonl",
                [{"id": f"r{i}", "prompt": f"p{i}", "max_tokens": 1} for i in range(RECORDS)])
    with pytest.raises(RequestError, match="the input has changed while the job ran"):
        run(replace(options, directory=f"{options.directory}2"), 1, open_llm=Shortening)


def test_lines_that_are_added_while_the_job_runs_are_left_for_another(options):
    class Lengthening(FakeLLM):
        def __init__(self, comm, on_step):
            super().__init__(comm, on_step)
            with open(options.inputs[0], "a") as file:
                file.write('{"id": "new", "prompt": "x"}\n' * 2)

    assert run(options, open_llm=Lengthening)[0] == 0
    check_complete(options)
    with pytest.raises(RequestError, match="the id 'new' is in line 41"):
        run(options)


def test_a_start_that_fails_says_that_it_ended(options, monkeypatch):
    def full(path, data):
        raise journal.cannot_write(path, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "write_atomically", full)
        with pytest.raises(OutputError, match="manifest.json cannot be written: No space"):
            run(options, 2)
    assert "No space" in json_lines(options, "attempt-1.jsonl")[1]["error"]
    assert run(options)[0] == 0


def test_the_others_wait_for_the_input_as_long_as_it_takes(options, monkeypatch):
    prepare, announce = job_module.prepare_job, job_module.announce

    def slow(*args):
        time.sleep(1.5)
        return prepare(*args)

    def announce_with_a_deadline(comm, *args):
        usual = comm.timeout
        comm.timeout = 1.0 if comm.rank else usual  # of the one that waits, and only here
        try:
            return announce(comm, *args)
        finally:
            comm.timeout = usual

    monkeypatch.setattr(job_module, "prepare_job", slow)
    monkeypatch.setattr(job_module, "announce", announce_with_a_deadline)
    assert run(options, 2)[0] == 0


@pytest.mark.parametrize("error", [CheckpointError, CapacityError])
def test_a_model_that_one_replica_cannot_load(options, error):
    made = []

    def open_llm(comm, on_step):
        made.append(comm)
        if len(made) == 2:
            raise error("a damaged disk")
        return FakeLLM(comm, on_step)

    with pytest.raises(error, match="a damaged disk"):
        run(options, 3, open_llm=open_llm)
    assert run(options)[0] == 0


@pytest.mark.parametrize("exception", [ZeroDivisionError("a bug"), CommError("the network is gone")])
def test_a_rank_that_breaks_down_in_a_step(options, exception):
    def on_step(rank, number):
        if (rank, number) == (1, 2):
            raise exception

    with pytest.raises((ZeroDivisionError, CutpError)):
        run(options, 3, on_step=on_step)
    assert run(options, 2)[0] == 0
    check_complete(options)


def test_results_without_a_manifest(options):
    run(options)
    os.remove(f"{options.directory}/manifest.json")
    with pytest.raises(OutputError, match="holds results but no manifest.json"):
        run(options)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "inputs": 5}'])
def test_a_damaged_manifest(options, content):
    run(options)
    Path(options.directory, "manifest.json").write_text(content)
    with pytest.raises(OutputError, match="manifest.json is damaged"):
        run(options)


def test_a_directory_that_cannot_be_made(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(replace(options, directory=str(tmp_path / "file" / "out")), 2)


def test_a_directory_that_another_host_does_not_see(options, monkeypatch):
    from cutp.batch import setup

    monkeypatch.setattr(setup, "_PATIENCE_SECONDS", 0.3)

    class Late:
        """A directory that is not there at first, and in which the file of this start appears late or never."""

        def __init__(self, appears):
            self.calls, self.appears = 0, appears

        def listdir(self, path):
            self.calls += 1
            if self.calls == 1:
                raise FileNotFoundError(path)
            return ["attempt-0.jsonl", f"attempt-{1 if self.appears and self.calls > 2 else 9}.jsonl"]

    monkeypatch.setattr(setup, "os", Late(False))
    with pytest.raises(OutputError, match="must lie on a file system that all hosts share"):
        run(options, 2)
    monkeypatch.setattr(setup, "_PATIENCE_SECONDS", 20.0)
    monkeypatch.setattr(setup, "os", Late(True))
    assert run(replace(options, directory=f"{options.directory}2"))[0] == 0
