"""What is done and what is left is read from the files alone, whatever was torn off them and in whatever order."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutp.batch.directory import JobDirectory
from cutp.batch.inputs import find_files
from cutp.batch.journal import to_line
from cutp.batch.prepare import JobOptions, prepare_job
from cutp.batch.records import key_of
from cutp.batch.scan import scan_input
from cutp.batch.status import job_status
from cutp.errors import OutputError, RequestError
from tests.batch.fake_llm import write_lines, write_model

# The last two have keys that begin and end with a zero byte.
IDS = ["a", "b", 1, "1", "ä\n", "in.jsonl:7", 2**70, "\0", *(
    next(i for i in range(start, 10**5) if key_of(i)[at] == 0) for start, at in ((2, 0), (100, -1)))]


def prepared(folder, **options):
    job = prepare_job(JobOptions(str(folder / "model"), [str(folder / "in.jsonl")], str(folder / "out"), {}, seed=1,
                                 **options), {}, lambda text: None)
    job.attempt.finish({})
    return job


@pytest.fixture(scope="module")
def job_folder():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_lines(folder / "in.jsonl", [{"id": identity, "prompt": "x"} for identity in IDS])
        yield folder


def line_of(identity):
    if isinstance(identity, str) and len(identity) % 2:
        return {"id": "batch_req_x", "custom_id": identity, "response": {"body": {}}, "error": None}
    return {"id": identity, "text": "y"}


FILES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.lists(st.sampled_from(IDS), max_size=5),
                           st.integers(0, 60)), max_size=5, unique_by=lambda f: f[:2])


@settings(deadline=None, max_examples=60)
@given(files=FILES, errors=FILES, max_fails=st.integers(1, 3))
def test_pending_is_what_has_no_whole_line(job_folder, files, errors, max_fails):
    out = job_folder / "out"
    for path in out.glob("*") if out.exists() else ():
        path.unlink()
    prepared(job_folder)
    done, failures = set(), []
    for kind, chosen in (("part", files), ("errors", errors)):
        for replica, attempt, ids, torn in chosen:
            rows = [line_of(i) if kind == "part" else {"id": i, "error": {"code": "request"}} for i in ids]
            data = b"".join(map(to_line, rows))
            data = data[: max(0, len(data) - torn)]
            JobDirectory(out).file(kind, replica, attempt).write_bytes(data)
            whole = ids[: data.count(b"\n")]
            done |= {key_of(i) for i in whole} if kind == "part" else set()
            failures += [key_of(i) for i in whole] if kind == "errors" else []
    (out / "attempt-4.jsonl").write_text(json.dumps({"attempt": 4}) + "\n" + json.dumps({"ended": 1}) + "\n")
    status = job_status(str(out))  # before the torn lines are dropped
    job = prepared(job_folder, max_fails=max_fails)
    keys = [key_of(i) for i in IDS]
    expected = [key not in done and failures.count(key) < max_fails for key in keys]
    assert job.pending.tolist() == expected and job.done == len(done & set(keys))
    assert job.settled == len(IDS) - job.done - sum(expected)
    failed = len(set(failures) - done)
    assert (status["done"], status["failed"], status["remaining"]) == (len(done), failed, len(IDS) - len(done) - failed)
    for path in out.glob("*.jsonl"):
        assert path.read_bytes()[-1:] in (b"", b"\n")
    assert [record.id for record in job.read_records(None)] == [i for i, e in zip(IDS, expected, strict=True) if e]


def test_damaged_lines_run_again(job_folder):
    out = job_folder / "out"
    for path in out.glob("*") if out.exists() else ():
        path.unlink()
    prepared(job_folder)
    (out / "part-0.1.jsonl").write_bytes(to_line(line_of("a")) + b'\0\0{"id": "b"}\n{"text": "x"}\n' +
                                         to_line(line_of(1)))
    said = []
    assert len(JobDirectory(out).done_keys(said.append)) == 2
    assert said == [f"line {number} of {out}/part-0.1.jsonl is damaged and left out" for number in (2, 3)]
    assert prepared(job_folder).pending.sum() == len(IDS) - 2


def test_other_files_do_not_count(job_folder, tmp_path):
    for name in ("part-0.jsonl", "part-0.1.jsonl.bak", "xpart-0.1.jsonl", "part-a.1.jsonl", "part-0.1.json"):
        (tmp_path / name).write_bytes(to_line({"id": "a"}))
    assert JobDirectory(tmp_path).files("part") == [] and len(JobDirectory(tmp_path).done_keys()) == 0
    for name in ("part-10.2.jsonl", "part-2.2.jsonl", "part-0.10.jsonl", "part-5.1.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for _, path in JobDirectory(tmp_path).files("part")] == [
        "part-5.1.jsonl", "part-2.2.jsonl", "part-10.2.jsonl", "part-0.10.jsonl"]
    with pytest.raises(OutputError, match="cannot be read"):
        JobDirectory(tmp_path / "none").files("part")


def test_scan(tmp_path):
    files = [write_lines(tmp_path / "a.jsonl", [{"id": 1, "prompt": "x"}, "", "oops", {"id": "2", "prompt": "x"}]),
             write_lines(tmp_path / "b.txt", ["one", "two"])]
    scan = scan_input(find_files(files))
    identities = [1, ["a.jsonl", 3], "2", "b.txt:1", "b.txt:2"]
    assert scan.keys.tolist() == np.array([key_of(i) for i in identities], "S16").tolist()
    assert [(f["name"], f["records"], f["text"]) for f in scan.files] == [("a.jsonl", 3, False), ("b.txt", 2, True)]
    assert (scan.bad, scan.records) == (1, 5) and "line 3 of a.jsonl is not JSON" in str(scan.first_bad)


def test_scan_holds_no_text(tmp_path):
    import tracemalloc

    path = tmp_path / "in.txt"
    count = 15_000
    path.write_bytes(b"x" * 400 + b"\n" + (b"y" * 400 + b"\n") * (count - 1))
    files = find_files([str(path)])
    tracemalloc.start()
    scan = scan_input(files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scan.records == count and peak < 100 * count + 4e6  # the file has 6 MB


@pytest.mark.parametrize("other", ["b", "sub/a"])
def test_duplicates_in_several_files(tmp_path, other):
    (tmp_path / "sub").mkdir()
    one = write_lines(tmp_path / "a.jsonl", [{"id": i, "prompt": "x"} for i in range(5)])
    two = write_lines(tmp_path / f"{other}.jsonl", [{"id": i, "prompt": "x"} for i in (7, 3, 4)])
    with pytest.raises(RequestError) as raised:
        scan_input(find_files([one, two]))
    names = (one, two) if other == "sub/a" else ("a.jsonl", "b.jsonl")
    lines = {3: (4, 2), 4: (5, 3)}
    assert any(str(raised.value).startswith(f"the id {i} is in line {a} of {names[0]} and in line {b} of {names[1]} "
                                            "(and 1 more) (") for i, (a, b) in lines.items())


def test_text_files_of_one_name(tmp_path):
    (tmp_path / "sub").mkdir()
    paths = [write_lines(tmp_path / name, ["x"]) for name in ("a.txt", "sub/a.txt")]
    with pytest.raises(RequestError, match="the id 'a.txt:1' is in line 1 of .*/a.txt and in line 1 of .*/sub/a.txt"):
        scan_input(find_files(paths))
