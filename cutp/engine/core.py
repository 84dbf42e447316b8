"""The loop that turns requests into results: schedule, run, score, sample, finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cutp.comm.communicator import Communicator
from cutp.engine.request import Request
from cutp.engine.runner import ModelRunner
from cutp.engine.sampler import record_logprobs, sample_next
from cutp.engine.scheduler import Chunk, Scheduler
from cutp.errors import CapacityError, CutpError


class EngineCore:
    """Runs requests on one model. Every rank runs the same loop on equal requests, and so takes the same steps."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, comm: Communicator):
        self.runner = runner
        self.scheduler = scheduler
        self.comm = comm

    def check_capacity(self, requests: Sequence[Request]) -> None:
        """CapacityError when a request could not be served even alone."""
        allocator = self.scheduler.allocator
        for request in requests:
            if allocator.pages_for(request.max_total) > allocator.num_pages:
                raise CapacityError(f"prompt {request.index} may reach {request.max_total} tokens; the cache holds "
                                    f"{allocator.num_pages * allocator.page_size}", hint="lower max_tokens")

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, str]]:
        """Runs the requests to their end; yields (request, text that is new) for every generated token.

        An error that is not cutp's own is announced to the other ranks before it is raised, so none of them waits for
        this one. Whatever happens, the requests are dropped and the engine is ready for others.
        """
        for request in requests:
            self.scheduler.add(request)
        try:
            while self.scheduler.has_work:
                yield from self._step(self.scheduler.schedule())
        except (CutpError, GeneratorExit):
            raise
        except BaseException as error:
            self.comm.fail(error)
            raise
        finally:
            self.scheduler.clear()

    def _step(self, chunks: Sequence[Chunk]) -> list[tuple[Request, str]]:
        hidden = self.runner.run(chunks)
        rows = np.cumsum([0] + [chunk.stop - chunk.start for chunk in chunks])
        self._score(chunks, rows[:-1], hidden)
        for chunk in chunks:
            chunk.request.cached = chunk.stop
        complete = [(chunk.request, row - 1) for chunk, row in zip(chunks, rows[1:], strict=True) if chunk.completes]
        events = self._sample([(request, row) for request, row in complete if not request.is_score], hidden)
        for request, _ in complete:
            if request.is_score or request.finish_reason is not None:
                self.scheduler.finish(request)
        return events

    def _score(self, chunks: Sequence[Chunk], first_rows: np.ndarray, hidden: list[np.ndarray]) -> None:
        """Log-probabilities of the prompt tokens that the chunks of scored requests predict."""
        rows, targets, owners = [], [], []
        for chunk, first in zip(chunks, first_rows, strict=True):
            if chunk.request.is_score:
                ids = chunk.request.tokens(chunk.start + 1, min(chunk.stop + 1, chunk.request.length))
                rows.extend(range(first, first + len(ids)))
                targets.extend(ids)
                owners.extend([chunk.request] * len(ids))
        if rows:
            values = self.runner.target_logprobs(hidden, np.array(rows), np.array(targets))
            for request, value in zip(owners, values.tolist(), strict=True):
                request.prompt_logprobs.append(value)

    def _sample(self, complete: list[tuple[Request, int]], hidden: list[np.ndarray]) -> list[tuple[Request, str]]:
        """The next token of every request whose last token was computed, at the given row."""
        if not complete:
            return []
        requests = [request for request, _ in complete]
        logits = self.runner.logits(hidden, np.array([row for _, row in complete]))
        tokens = sample_next(logits, self.runner.vocab_start, requests, self.comm)
        record_logprobs(logits, self.runner.vocab_start, requests, tokens, self.comm)
        return [(request, request.append(token)) for request, token in zip(requests, tokens, strict=True)]
