"""The loop that turns requests into results: schedule, run, score, sample, finish."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine.pending_tokens import PendingTokens
from cutp.engine.request import Request
from cutp.engine.runner import ModelRunner
from cutp.engine.sampler import Sampler
from cutp.engine.scheduler import Chunk, Scheduler
from cutp.engine.stats import EngineStats
from cutp.errors import CapacityError, CutpError

Event = tuple[Request, str]


class EngineCore:
    """Runs requests on one replica of a model, step by step.

    Every rank of the replica makes the same calls with equal requests, and so takes the same steps. Requests may be
    added and cancelled between steps.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, sampler: Sampler, comm: Communicator):
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.comm = comm
        self.stats = EngineStats()
        # The step that was started and whose tokens have not been taken.
        self._ahead: PendingTokens | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check_capacity(self, tokens: int, name: str) -> None:
        """CapacityError when a request that may reach `tokens` tokens could not be served even alone."""
        pool = self.scheduler.pool
        if pool.pages_for(tokens) > pool.num_pages:
            raise CapacityError(f"{name} may reach {tokens} tokens; the cache holds {pool.num_pages * pool.page_size}",
                                hint="lower max_tokens")

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.stats.requests_added += 1

    def cancel(self, request: Request) -> str:
        """Drops a request that has not finished; returns the text it held back."""
        text = request.cancel()
        self.scheduler.cancel(request)
        self.stats.requests_cancelled += 1
        return text

    def close(self) -> None:
        """Gives up what the runner holds beside the model."""
        self.runner.close()

    def step(self) -> list[Event]:
        """One forward pass; (request, text that is new) for every request that has new tokens, in the order of arrival
        of the requests, and (request, "") for one that generates nothing and is done.

        An error that is not cutp's own is announced to the other ranks before it is raised, so none of them waits for
        this one. After any error the requests are dropped and the engine is ready for others.
        """
        try:
            with self.runner.step():
                return self._step()
        except BaseException as error:
            if not isinstance(error, CutpError):
                self.comm.fail(error)
            self.scheduler.clear()
            self._ahead = None
            raise

    def _step(self) -> list[Event]:
        begin = time.perf_counter()
        plan = self.scheduler.schedule()
        for request in plan.admitted:
            if request.params is not None:
                self.sampler.admit(request)
        ready = time.perf_counter()
        events = self._run(plan.chunks)
        for request, _ in events:
            if request.finish_reason is not None:
                # One that lost its pages while its last token was drawn waits again.
                self.scheduler.cancel(request)
                self.stats.requests_finished += 1
        self.stats.count_step(plan, ready - begin, time.perf_counter() - begin)
        return events

    def _run(self, chunks: Sequence[Chunk]) -> list[Event]:
        """Runs the chunks, or starts them where the runner works ahead of the host; events of what has ended."""
        before, self._ahead = self._ahead, None
        following = None
        if before is not None:
            following = self.runner.start_decode(chunks, self.scheduler.tables, self.sampler, before)
        events = [] if before is None else self._arrived(before)
        if following is None:
            # Some of the requests may have ended with the tokens that have just arrived.
            chunks = [chunk for chunk in chunks if chunk.request.finish_reason is None]
            following = self.runner.start_decode(chunks, self.scheduler.tables, self.sampler) if chunks else None
        if following is not None:
            chunks = [chunk for chunk in chunks if chunk.request.finish_reason is None]
            self.scheduler.advance(chunks)
            for chunk in chunks:
                chunk.request.expect()
            self._ahead = following
            return events
        return _joined(events + self._run_now(chunks)) if chunks else events

    def _arrived(self, step: PendingTokens) -> list[Event]:
        """The events of a step that was started before; requests that have ended meanwhile have none."""
        tokens = step.tokens()
        pairs = [(request, token) for request, token in zip(step.requests, tokens, strict=True)
                 if request.finish_reason is None and request.ahead]
        return self._taken([request for request, _ in pairs], [token for _, token in pairs])

    def _run_now(self, chunks: Sequence[Chunk]) -> list[Event]:
        layers = sorted({layer for chunk in chunks if chunk.request.states for layer in chunk.request.states.layers})
        hidden, states = self.runner.run(chunks, self.scheduler.tables, layers)
        self._collect_prompts(chunks, hidden, dict(zip(layers, states, strict=True)))
        self.scheduler.advance(chunks)
        return self._sample(chunks, hidden)

    def _collect_prompts(self, chunks: Sequence[Chunk], hidden: list[np.ndarray], states: dict) -> None:
        """Log-probabilities and hidden states of prompt tokens, for the requests that want them."""
        rows, targets, owners, top = [], [], [], 0
        first_row = 0
        for chunk in chunks:
            request = chunk.request
            if request.scores is not None:
                wanted = request.scores.rows(chunk.start, chunk.stop)
                rows.extend(position - chunk.start + first_row for position in wanted)
                targets.extend(request.scores.target(position) for position in wanted)
                owners.extend([request.scores] * len(wanted))
                top = max(top, request.scores.top or 0)
            if request.states is not None:
                last_row = first_row + chunk.stop - chunk.start
                request.states.add(chunk.start, chunk.stop,
                                   [states[layer][first_row:last_row] for layer in request.states.layers])
            first_row += chunk.stop - chunk.start
        if rows:
            scored = self.runner.prompt_logprobs(hidden, np.array(rows), np.array(targets), top)
            for scores, target, score in zip(owners, targets, scored, strict=True):
                scores.add(target, *score)

    def _sample(self, chunks: Sequence[Chunk], hidden: list[np.ndarray]) -> list[Event]:
        """The next token of every request whose last token was computed; the end of those that generate nothing."""
        events: list[Event] = []
        requests, rows, row = [], [], -1
        for chunk in chunks:
            row += chunk.stop - chunk.start
            if not chunk.completes:
                continue
            if chunk.request.params is None:
                chunk.request.finish_reason = "length"
                events.append((chunk.request, ""))
            else:
                requests.append(chunk.request)
                rows.append(row)
        if requests:
            logits = self.runner.logits(hidden, np.array(rows))
            tokens = self.sampler.sample(logits, requests).tolist()
            self.sampler.record_logprobs(logits, requests, tokens)
            events.extend(self._taken(requests, tokens))
            events.sort(key=lambda event: event[0].id)
        return events

    def _taken(self, requests: Sequence[Request], tokens: Sequence[int]) -> list[Event]:
        """Each request takes its next token."""
        self.stats.generated_tokens += len(requests)
        return [(request, request.append(int(token))) for request, token in zip(requests, tokens, strict=True)]


def _joined(events: Sequence[Event]) -> list[Event]:
    """One event a request: it may have a token of the step before, which has just arrived, and one of this step."""
    texts: dict[Request, str] = {}
    for request, text in events:
        texts[request] = texts.get(request, "") + text
    return sorted(texts.items(), key=lambda event: event[0].id)
