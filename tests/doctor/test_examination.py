"""Whatever a check does on any rank, there is one finding, the same on all ranks, and nobody waits for long."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from cutp import Communicator, run_threads
from cutp.doctor import examination as room
from cutp.doctor.check import Check
from cutp.doctor.deadline import HungError, within
from cutp.doctor.examination import examine
from cutp.doctor.report import fail, ok
from cutp.errors import ConfigError, PeerFailedError

N = 3


@pytest.fixture
def hang():
    """Something that hangs until the end of the test."""
    over = threading.Event()
    yield over.wait
    over.set()


def good(name, **options):
    return Check(name, lambda job: job.rank, lambda job, facts: ok(name, f"{facts}"), **options)


def on_rank_1(act):
    return Check("odd", lambda job: act() if job.rank == 1 else job.rank, lambda job, facts: ok("odd", f"{facts}"))


def run(*checks, timeout=20, timeout_of_rank_1=None, found=(), n=N):
    """The findings, which all ranks agree on; and rank 0's report."""
    def body(comm):
        said = []
        limit = timeout_of_rank_1 if comm.rank == 1 and timeout_of_rank_1 else timeout
        report = examine(comm, checks, limit, said.append, found)
        assert report.findings == [*found, *said]
        return report

    reports = run_threads(n, body, timeout=30)
    assert all((r.findings, r.stuck) == (reports[0].findings, reports[0].stuck) for r in reports)
    return reports[0]


def test_facts_of_all_ranks_in_order():
    later = Check("later", lambda job: job.facts["first"][job.rank] * 2, lambda job, facts: ok("later", f"{facts}"))
    report = run(good("first"), later)
    assert [f.message for f in report.findings] == ["[0, 1, 2]", "[0, 2, 4]"]
    assert (report.exit_code, report.stuck, report.broken, len(report.hosts)) == (0, False, False, N)
    assert 0 < report.seconds < 20


def test_alone():
    with Communicator.single() as comm:
        before = comm.timeout
        report = examine(comm, [good("one"), good("two", collective=True)], 5)
        assert [f.line() for f in report.findings] == ["OK   one: [0]", "OK   two: [0]"] and comm.timeout == before


def test_an_exception_on_one_rank():
    report = run(on_rank_1(lambda: 1 // 0), good("next"))
    first, second = report.findings
    assert first.status == "FAIL" and first.ranks == (1,) and first.fix
    assert first.message == "rank 1: ZeroDivisionError: integer division or modulo by zero"
    assert second.message == "[0, 1, 2]" and report.exit_code == 7 and not report.stuck


def raising(error):
    raise error


def test_errors_of_cutp_bring_their_fix():
    [finding] = run(on_rank_1(lambda: raising(ConfigError("no good", hint="try this")))).findings
    assert (finding.message, finding.fix) == ("rank 1: no good", "try this")


def test_equal_errors_are_said_once():
    check = Check("all", lambda job: raising(OSError("gone")) if job.rank else 1, lambda job, facts: ok("all", ""))
    [finding] = run(check).findings
    assert finding.message == "ranks 1-2: OSError: gone" and finding.ranks == (1, 2)


def test_not_even_an_exit_ends_a_rank():
    [finding] = run(on_rank_1(lambda: raising(SystemExit(3)))).findings
    assert finding.status == "FAIL" and finding.message == "rank 1: SystemExit: 3"


def test_facts_that_are_no_json():
    [finding] = run(on_rank_1(lambda: {1, 2})).findings
    assert finding.status == "FAIL" and "not JSON serializable" in finding.message and finding.ranks == (1,)


def test_a_judge_that_raises():
    check = Check("bad judge", lambda job: 1, lambda job, facts: facts["x"])
    report = run(check, good("next"))
    assert report.findings[0].status == "FAIL" and "TypeError" in report.findings[0].message
    assert "please report" in report.findings[0].fix and report.findings[1].status == "OK"


def test_a_hang_on_one_rank(hang):
    began = time.monotonic()
    report = run(on_rank_1(lambda: hang(60)), good("next"), timeout_of_rank_1=0.8)
    assert time.monotonic() - began < 20
    first, second = report.findings
    assert first.message == "rank 1: no answer within 0.8 s" and "--timeout" in first.fix and first.ranks == (1,)
    assert second.message == "[0, 1, 2]" and report.stuck and not report.broken


def test_what_hangs_is_not_tried_again(hang):
    checks = [good("gpu"), good("kernel", needs=("gpu",)), good("host")]
    stuck = replace(on_rank_1(lambda: hang(60)), name="copy", needs=("gpu",))
    report = run(checks[0], stuck, *checks[1:], timeout_of_rank_1=0.8)
    assert [(f.name, f.status) for f in report.findings] == [("gpu", "OK"), ("copy", "FAIL"), ("kernel", "WARN"),
                                                            ("host", "OK")]
    assert report.findings[2].message == "not checked, because of what was found about copy"


def test_needs_and_applies():
    bad = Check("bad", lambda job: 1, lambda job, facts: fail("bad", "no", "mend"))
    calls = []
    never = Check("never", calls.append, calls.append, needs=("good", "bad"))
    report = run(good("good"), bad, never, good("silent", applies=lambda job: False), good("on", needs=("good",)))
    assert [f.name for f in report.findings] == ["good", "bad", "never", "on"] and not calls
    assert report.findings[2].line() == ("WARN never: not checked, because of what was found about bad. "
                                         "Fix: mend bad first")


def test_what_is_known_is_not_checked():
    known = fail("a", "known before", "mend")
    report = run(good("a"), good("b", needs=("a",)), good("c"), found=[known])
    assert [(f.name, f.status) for f in report.findings] == [("a", "FAIL"), ("b", "WARN"), ("c", "OK")]


def reduce(job):
    return float(job.group.all_reduce(np.float32([job.rank]))[0])


def collective(act):
    return Check("sum", lambda job: act(job) if job.rank == 1 else reduce(job),
                 lambda job, facts: ok("sum", f"{facts}"), collective=True)


def test_a_collective_check_has_a_group_of_its_own():
    report = run(collective(reduce), good("next"))
    assert [f.message for f in report.findings] == ["[3.0, 3.0, 3.0]", "[0, 1, 2]"]


def test_an_exception_in_a_collective_check_wakes_the_others():
    began = time.monotonic()
    report = run(collective(lambda job: 1 // 0), good("next"), collective(reduce))
    assert time.monotonic() - began < 10
    assert report.findings[0].message == "rank 1: ZeroDivisionError: integer division or modulo by zero"
    assert report.findings[0].ranks == (1,)
    assert [f.message for f in report.findings[1:]] == ["[0, 1, 2]", "[3.0, 3.0, 3.0]"]


def test_a_hang_in_a_collective_check(hang, monkeypatch):
    monkeypatch.setattr(room, "_LAST_WORDS_SECONDS", 0.5)
    began = time.monotonic()
    report = run(collective(lambda job: hang(60)), good("next"), timeout=0.8)
    assert time.monotonic() - began < 20
    first, second = report.findings
    assert "all_reduce" in first.message and "rank 1 (host " in first.message and "rank 1: no answer" in first.message
    assert second.status == "OK" and report.stuck


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come(missing, monkeypatch):
    monkeypatch.setattr(room, "_LAST_WORDS_SECONDS", 0.1)
    reports, over = {}, threading.Barrier(N)

    def body(comm):
        if comm.rank == missing:
            over.wait(20)
            return
        reports[comm.rank] = examine(comm, [good("a"), good("b")], 0.4)
        over.wait(20)

    began = time.monotonic()
    run_threads(N, body, timeout=30)
    assert time.monotonic() - began < 10
    assert sorted(reports) == sorted({0, 1, 2} - {missing})
    for report in reports.values():
        [finding] = report.findings
        assert finding.status == "FAIL" and finding.message.startswith("the ranks cannot talk to each other: ")
        assert report.broken and report.stuck and report.exit_code == 7
    # A slow rank may be missed as well, and be named first.
    assert any(f"rank {missing} (host " in report.findings[0].message for report in reports.values())


def test_a_slow_rank_is_waited_for():
    check = on_rank_1(lambda: time.sleep(0.8))

    def body(comm):
        return [finding.status for finding in examine(comm, [check], 5).findings]

    assert run_threads(N, body, timeout=0.2) == [["OK"]] * N


def test_peers_of_a_failed_rank_add_nothing():
    def act(job):
        raise PeerFailedError("failed on host x: y") if job.rank else ValueError("mine")

    [finding] = run(Check("c", act, lambda job, facts: ok("c", ""))).findings
    assert finding.message == "rank 0: ValueError: mine" and finding.ranks == (0,)


def test_within(hang):
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(HungError, match="no answer within 0.05 s"):
        within(0.05, lambda: hang(20))
