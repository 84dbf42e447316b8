"""Running the checks: on all ranks, one after the other, whatever happens in any of them on any rank."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cutp.comm.communicator import Communicator
from cutp.doctor.check import Check, Job
from cutp.doctor.deadline import HungError, within
from cutp.doctor.report import FAIL, Finding, Report, by_value, fail, ranks_text, warn
from cutp.errors import CommError, CutpError, PeerFailedError

# How much longer a collective check may take than its communicator waits: the time to say what happened.
_LAST_WORDS_SECONDS = 10.0
_HUNG = "hung"


def examine(
    comm: Communicator, checks: Sequence[Check], timeout: float, say: Callable[[Finding], None] = lambda finding: None,
    found: Sequence[Finding] = (),
) -> Report:
    """The report on the job of `comm`; collective, and the same on all ranks. Raises no errors of checks.

    timeout: seconds that a check may take on a rank. say: called with each finding as soon as it is there.
    found: what is known already, the same on all ranks; checks of the same names are not run.
    """
    began = time.monotonic()
    report = Report(comm.hosts, list(found))
    usual = comm.timeout
    # A rank may come that much later than the others: after a check that hung there.
    comm.timeout = 2 * timeout + 2 * _LAST_WORDS_SECONDS
    job = Job(comm)
    # What must not be built upon -> the check that found out.
    failed = {finding.name: finding.name for finding in found if finding.status == FAIL}
    known = {finding.name for finding in found}
    for check in checks:
        if check.name in known:
            continue
        try:
            finding, hung = _examine_one(job, check, timeout, failed)
        except CommError as error:
            # Who is missing is in the message; nothing can be compared any more.
            finding, hung = fail(check.name, f"the ranks cannot talk to each other: {error.message}",
                                 error.hint or "see what the missing rank does"), True
            report.broken = True
        if finding is None:
            continue
        if finding.status == FAIL:
            failed[check.name] = check.name
        if hung:
            report.stuck = True
            # What hung may hold a lock of the driver, in which every later check would hang as well.
            failed.update(dict.fromkeys(check.needs, check.name))
        report.findings.append(finding)
        say(finding)
        if report.broken:
            break
    comm.timeout = usual
    report.seconds = time.monotonic() - began
    return report


def _examine_one(job: Job, check: Check, timeout: float, failed: dict[str, str]) -> tuple[Finding | None, bool]:
    """(the finding, None if there is nothing to check; whether some rank hangs). CommError if ranks are missing."""
    if not check.applies(job):
        return None, False
    cause = next((failed[name] for name in check.needs if name in failed), None)
    if cause is not None:
        return warn(check.name, f"not checked, because of what was found about {cause}", f"mend {cause} first"), False
    if check.collective:
        job.group = job.comm.split(0)
        job.group.timeout = timeout
    try:
        mine = _probed(job, check, timeout)
        answers = job.comm.host.all_gather_json(mine)
    finally:
        if job.group is not None:
            job.group.close()
            job.group = None
    hung = any(_HUNG in answer for answer in answers)
    if any("facts" not in answer for answer in answers):
        return _not_probed(check.name, answers), hung
    job.facts[check.name] = facts = [answer["facts"] for answer in answers]
    try:
        return check.judge(job, facts), hung
    except Exception as error:
        return fail(check.name, f"what was found cannot be judged: {_text(error)}", _REPORT), hung


_REPORT = "this is an error in cutp doctor: please report it with the output of --json"


def _probed(job: Job, check: Check, timeout: float) -> dict[str, Any]:
    """{"facts"} of this rank, or {"error", "fix"}, with "hung" if the probe still runs."""
    group = job.group

    def work() -> Any:
        # As JSON here already, where an error can be reported.
        return json.loads(json.dumps(check.probe(job)))

    try:
        if not check.collective:
            return {"facts": within(timeout, work)}
        # The communicator has its own deadline, and its errors say more; the thread is for what hangs elsewhere.
        facts = within(timeout + _LAST_WORDS_SECONDS, work) if _threads_may_use_mpi() else work()
        return {"facts": facts}
    except (Exception, SystemExit) as error:
        if group is not None:
            group.fail(error)  # so that the others do not wait for this rank
        if isinstance(error, CutpError):
            return {"error": error.message, "fix": error.hint, "of_peer": isinstance(error, PeerFailedError)}
        if isinstance(error, HungError):
            return {"error": str(error), _HUNG: True,
                    "fix": "--timeout sets the limit in seconds; see what this host is waiting for"}
        return {"error": _text(error), "fix": None}


def _not_probed(name: str, answers: list[dict[str, Any]]) -> Finding:
    """The FAIL for ranks whose probes raised or hung."""
    bad = [rank for rank, answer in enumerate(answers) if "facts" not in answer]
    # What the others say of a rank that failed adds nothing to what it says itself.
    own = [rank for rank in bad if not answers[rank].get("of_peer")] or bad
    groups = by_value([answers[rank]["error"] for rank in own])
    texts = [f"{ranks_text(own[index] for index in where)}: {text}" for text, where in groups.items()]
    fixes = list(dict.fromkeys(answers[rank]["fix"] for rank in own if answers[rank]["fix"]))
    return fail(name, "; ".join(texts), "; ".join(fixes) or "see the message", own)


def _threads_may_use_mpi() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is None or not mpi.Is_initialized() or mpi.Query_thread() >= mpi.THREAD_MULTIPLE


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
