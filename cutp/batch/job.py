"""A corpus job on all ranks: meet, hand out records, work until the next meeting; until all is done or time is up.

At a meeting every rank tells every other what it has finished and whether it must stop or has failed; from these equal
numbers all compute the same decision. Only texts go another way: rank 0 reads them and sends each replica its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cutp.batch.hand_out import Window, deal, plan, shares
from cutp.batch.journal import Journal
from cutp.batch.prepare import JobOptions, PreparedJob, prepare_job
from cutp.batch.progress import JobCounts, Progress, Rates, peak_memory
from cutp.batch.records import Record
from cutp.batch.replica import ReplicaWorker
from cutp.batch.results import ResultWriter, error_line
from cutp.batch.setup import JobFacts, announce, check_directory, take_time_limit
from cutp.batch.stop import EXIT_STOPPED, StopFlag
from cutp.engine.loading import EngineOptions
from cutp.errors import CutpError

if TYPE_CHECKING:
    from cutp.engine.llm import LLM
    from cutp.engine.replicas import Replicas

EXIT_WITH_ERRORS = 6
_SYNC_SECONDS = 10.0


def run_job(options: JobOptions, replicas: Replicas, stop: StopFlag, progress: Progress,
            open_llm: Callable[[], AbstractContextManager[LLM]]) -> int:
    """Runs the job, or what is left of it, and returns the exit code: 0, 6 (there are error records) or 75 (stopped).

    Collective over `replicas.comm`. open_llm: makes this replica's LLM. Raises what `prepare_job` and the LLM raise,
    OutputError when results cannot be written, all on every rank alike.
    """
    comm = replicas.comm
    job, facts = announce(comm, lambda: prepare_job(options, {"ranks": comm.size, "replicas": replicas.count},
                                                    progress.say))
    result: dict[str, Any] = {}
    try:
        check_directory(comm, options.directory, facts)
        take_time_limit(comm, options, stop)
        if facts.pending:
            code, counts = _work(options, replicas, stop, progress, open_llm, job, facts)
        else:
            counts = JobCounts(facts.done, facts.settled, 0)
            code = EXIT_WITH_ERRORS if counts.failed else 0
            progress.say(f"nothing is left to do: {counts.done} of {counts.records} records are done, "
                         f"{counts.failed} failed")
        result = {"exit": code, **counts.to_dict()}
        return code
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        progress.close()
        if job is not None:
            job.attempt.finish(result)


def _work(options: JobOptions, replicas: Replicas, stop: StopFlag, progress: Progress, open_llm: Callable,
          job: PreparedJob | None, facts: JobFacts) -> tuple[int, JobCounts]:
    comm = replicas.comm
    began = time.monotonic()
    if comm.rank == 0 and job.done + job.settled:
        progress.say(f"attempt {facts.attempt}: {job.done} of {job.records} records are done, {facts.pending} to do")
    reason = next(filter(None, comm.host.all_gather_json(stop.reason)), None)
    if reason is not None:
        return EXIT_STOPPED, _say_stopped(progress, reason, JobCounts(facts.done, facts.settled, facts.pending))
    with comm.host.agree("loading the model"):
        llm = open_llm()
    with llm:
        loop = _Loop(options, replicas, stop, progress, llm, job, facts, time.monotonic() - began)
        return loop.run()


def _say_stopped(progress: Progress, reason: str, counts: JobCounts) -> JobCounts:
    progress.say(f"stopped early ({reason}): {counts.done} of {counts.records} records are done, {counts.remaining} "
                 "left; the same command goes on from here")
    return counts


class _Loop:
    """What one rank knows while the job runs."""

    def __init__(self, options: JobOptions, replicas: Replicas, stop: StopFlag, progress: Progress, llm: LLM,
                 job: PreparedJob | None, facts: JobFacts, load_seconds: float):
        self._options, self._replicas, self._stop, self._progress = options, replicas, stop, progress
        self._llm, self._job, self._facts, self._load_seconds = llm, job, facts, load_seconds
        self._is_first = replicas.group.rank == 0
        self._journals: list[Journal] = []
        results, errors, self._metrics = (self._journal(kind) for kind in ("part", "errors", "metrics"))
        token_text = None if llm.tokenizer is None else lambda token: llm.tokenizer.decode([token], False)
        self._worker = ReplicaWorker(llm, ResultWriter(options.model, facts.created, token_text), results, errors)
        self._window = Window(job.read_records(self._bad_line)) if job is not None else None
        # Requests that run at once: a guess, until some had to wait.
        self._slots = EngineOptions().max_running
        self._target, self._between = plan(self._slots, 0, 0.0)
        self._finished = 0
        self._counts = JobCounts(facts.done, facts.settled, facts.pending)
        self._rates, self._job_rates, self._job_tokens = Rates(), Rates(), (0, 0)
        self._began = self._last_report = self._last_sync = time.monotonic()

    def run(self) -> tuple[int, JobCounts]:
        self._progress.start(self._counts)
        while True:
            reason = self._meet()
            if reason is not None:
                break
            until = time.monotonic() + self._between
            while self._llm.has_unfinished and not self._due(until):
                self._worker.step()
            self._now_and_then()
        return self._end(reason)

    def _meet(self) -> str | None:
        """Tells and hears where the job stands, and takes new records. Returns why the job ends, else None."""
        comm = self._replicas.comm
        everyone = comm.host.all_gather_json(self._state())
        for rank, state in enumerate(everyone):
            if state["error"] is not None:
                error = CutpError.from_dict({**state["error"], "rank": rank if comm.size > 1 else None})
                comm.host.agreed_error = error
                raise error
        firsts = [everyone[rank] for rank in self._replicas.first_ranks]
        done, failed = (sum(state[name] for state in firsts) for name in ("done", "failed"))
        self._counts = JobCounts(self._facts.done + done, self._facts.settled + failed,
                                 self._facts.pending - done - failed)
        self._job_tokens = tuple(sum(state[name] for state in firsts) for name in ("prompt_tokens", "generated_tokens"))
        self._progress.update(self._counts)
        stops = [state["stop"] for state in everyone if state["stop"] is not None]
        available, outstanding = everyone[0]["available"], [state["outstanding"] for state in firsts]
        if available == 0 and not any(outstanding):
            return "done"
        if stops:
            return stops[0]
        if self._options.stop_on_error and failed:
            return "error"
        finished = max(state["finished"] for state in firsts)
        self._target, self._between = plan(max(state["slots"] for state in firsts), finished, self._between)
        self._take(shares(available, outstanding, self._target))
        return None

    def _state(self) -> dict[str, Any]:
        """What this rank tells the others."""
        worker = self._worker
        available = 0
        if self._window is not None and worker.error is None:
            try:
                available = self._window.available(self._target * self._replicas.count)
            except CutpError as error:
                worker.error = error
        state = {"stop": self._stop.reason, "error": worker.error and worker.error.to_dict(), "available": available}
        if self._is_first:
            finished, self._finished = worker.done + worker.failed - self._finished, worker.done + worker.failed
            stats = self._llm.stats()
            self._slots = stats["running"] if stats["waiting"] else max(self._slots, stats["running"])
            state |= {"outstanding": worker.outstanding, "done": worker.done, "failed": worker.failed,
                      "finished": finished, "slots": self._slots, "prompt_tokens": stats["prompt_tokens"],
                      "generated_tokens": stats["generated_tokens"]}
        return state

    def _take(self, counts: list[int]) -> None:
        """Brings this replica's records here and adds them to its requests."""
        comm, firsts, mine = self._replicas.comm, self._replicas.first_ranks, self._replicas.index
        records: list[Record] = []
        if self._window is not None:
            hands = deal(self._window.take(sum(counts)), counts)
            for replica, hand in enumerate(hands):
                if replica == mine:
                    records = hand
                elif hand:
                    comm.host.send_json([record.to_json() for record in hand], firsts[replica])
        elif self._is_first and counts[mine]:
            records = [Record.from_json(value) for value in comm.host.recv_json(0)]
        self._worker.add(counts[mine], records)

    def _due(self, until: float) -> bool:
        """Whether this replica goes to the next meeting: as soon as one of its ranks wants to."""
        group, worker = self._replicas.group, self._worker
        due = time.monotonic() >= until or self._stop.reason is not None or worker.error is not None \
            or (self._options.stop_on_error and worker.failed > 0)
        return due if group.size == 1 else any(group.host.all_gather_bytes(b"1" if due else b""))

    def _now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._last_sync >= _SYNC_SECONDS:
            self._last_sync = now
            self._worker.sync()
            if self._job is not None and self._job.attempt.superseded():
                self._stop.give_up("a later start of the job")
        if now - self._last_report >= self._options.interval:
            self._last_report = now
            self._report()

    def _report(self, *, last: bool = False) -> None:
        """A line of metrics of this replica, and what rank 0 says of the job; the last one gives rates over all."""
        if self._job is not None:
            rates = (self._job_rates.overall if last else self._job_rates.advance)(*self._job_tokens)
            self._progress.report(self._counts, rates, last=last)
        if self._is_first and self._worker.error is None:
            try:
                self._metrics.append(self._metrics_line(last))
            except CutpError as error:
                self._worker.error = error

    def _metrics_line(self, last: bool) -> dict[str, Any]:
        stats = self._llm.stats()
        rates = (self._rates.overall if last else self._rates.advance)(stats["prompt_tokens"],
                                                                       stats["generated_tokens"])
        return {"time": round(time.time(), 3), "elapsed_s": round(time.monotonic() - self._began, 3),
                "load_s": round(self._load_seconds, 3), "replica": self._replicas.index,
                "ranks": self._replicas.group.size, "prompt_tokens": stats["prompt_tokens"],
                "generated_tokens": stats["generated_tokens"], "prompt_tokens_per_s": round(rates[0], 2),
                "generated_tokens_per_s": round(rates[1], 2), "running": stats["running"],
                "waiting": stats["waiting"], "last": last, "done": self._worker.done, "failed": self._worker.failed,
                "outstanding": self._worker.outstanding, **peak_memory(), "job": self._counts.to_dict()}

    def _end(self, reason: str) -> tuple[int, JobCounts]:
        """Makes all lines durable, on all ranks or with an error on all, and says how it ended."""
        self._report(last=True)
        with self._replicas.comm.host.agree("writing the results"):
            if self._worker.error is not None:
                raise self._worker.error
            for journal in self._journals:
                journal.close()
        counts = self._counts
        if reason == "done":
            return (EXIT_WITH_ERRORS if counts.failed else 0), counts
        if reason == "error":
            self._progress.say("stopped at the first error record; see errors.*.jsonl")
            return EXIT_WITH_ERRORS, counts
        return EXIT_STOPPED, _say_stopped(self._progress, reason, counts)

    def _journal(self, kind: str) -> Journal | None:
        if not self._is_first:
            return None
        self._journals.append(Journal(self._facts.file(self._options.directory, kind, self._replicas.index)))
        return self._journals[-1]

    def _bad_line(self, identity, openai, line, error) -> None:
        self._worker.write_error(error_line(identity, openai, line, error))
