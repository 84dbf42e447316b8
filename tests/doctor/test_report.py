"""Findings as text and as JSON."""

import json

import pytest

from cutp.doctor.report import EXIT_FAIL, Report, by_value, differences, fail, ok, ranks_text, warn


@pytest.mark.parametrize(("ranks", "text"), [
    ([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([5, 0, 1, 2], "ranks 0-2, 5"), ([0, 2], "ranks 0, 2"),
    ([7, 7], "rank 7"), ([0, 1, 3, 4], "ranks 0-1, 3-4")])
def test_ranks_as_text(ranks, text):
    assert ranks_text(ranks) == text


def test_lines():
    assert ok("mpi", "works").line() == "OK   mpi: works"
    assert warn("mpi", "slow", "buy another").line() == "WARN mpi: slow. Fix: buy another"
    assert fail("mpi", "several\n  lines", None).line() == "FAIL mpi: several lines"


def test_exit_codes_and_summary():
    assert EXIT_FAIL == 7
    findings = [ok("a", "x"), warn("b", "x", "y"), ok("c", "x")]
    report = Report(["h"], findings, 1.25)
    assert (report.exit_code, report.summary()) == (0, "2 OK, 1 WARN, 0 FAIL in 1.2 s")
    report = Report(["h"], [*findings, fail("d", "x", "y")])
    assert (report.exit_code, report.summary()) == (7, "2 OK, 1 WARN, 1 FAIL in 0.0 s")


def test_json():
    report = Report(("a", "b"), [ok("x", "fine"), fail("y", "bad", "mend it", [1])], 0.5)
    assert json.loads(json.dumps(report.to_dict())) == {
        "cutp": report.to_dict()["cutp"], "size": 2, "hosts": ["a", "b"], "exit_code": 7, "seconds": 0.5, "checks": [
            {"name": "x", "status": "OK", "message": "fine", "fix": None, "ranks": []},
            {"name": "y", "status": "FAIL", "message": "bad", "fix": "mend it", "ranks": [1]}]}


def test_differences():
    labels = {"a": "the A", "b": "the B"}
    assert differences([{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 4}], labels) is None
    text, ranks = differences([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"a": 9, "b": 2}], labels)
    assert text == "the A is 1 on ranks 0-2, 9 on rank 3; the B is 2 on ranks 0, 2-3, 3 on rank 1"
    assert ranks == [1, 3]
    assert by_value(["x", "y", "x"]) == {"x": [0, 2], "y": [1]}
