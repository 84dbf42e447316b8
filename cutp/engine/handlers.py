"""What the calls of an `LLM` do: rank 0 prepares their input, and then every rank handles them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cutp.engine.calls import Call
from cutp.engine.intake import Intake
from cutp.engine.outputs import HiddenStatesOutput, PerplexityOutput, ScoreOutput, StreamEvent
from cutp.engine.workload import Workload
from cutp.errors import RequestError

# The batch of requests that are added one by one.
ADDED = 0


class Handlers:
    """The calls by name. stream: the batch that is being streamed, None if there is none; left: the last one that was
    left before its end."""

    def __init__(self, work: Workload, intake: Intake):
        self._work = work
        self._intake = intake
        self.stream: int | None = None
        self.left = 0
        self._by_name: dict[str, Callable[[Any], Any]] = {
            "generate": work.generate, "stream": self._start_stream, "stream step": self._stream_step,
            "add_request": self._add, "cancel": lambda key: work.cancel(ADDED, key),
            "step": lambda _: work.step(ADDED), "score": self._score, "perplexity": self._perplexity,
            "hidden_states": self._hidden_states,
        }

    def handle(self, call: Call) -> Any:
        """The result of a call, on every rank."""
        if call.leave and self.stream is not None:
            self._work.cancel(self.stream)
            self.left, self.stream = self.stream, None
        return self._by_name[call.name](call.value)

    def prepare(self, name: str, value: Any) -> Any:
        """Rank 0's work on the input of a call; RequestError where it cannot be served."""
        if name in ("generate", "stream"):
            return self._intake.generation(value)
        if name == "add_request":
            [prepared] = self._intake.generation(value)
            if value["id"] is not None and self._work.is_open(ADDED, value["id"]):
                raise RequestError(f"an unfinished request has the id {value['id']!r}")
            return {**prepared, "id": value["id"], "cache_salt": value["cache_salt"]}
        if name == "cancel":
            if not self._work.is_open(ADDED, value):
                raise RequestError(f"no unfinished request has the id {value!r}")
            return value
        prepare = {"score": self._intake.scoring, "perplexity": self._intake.rolling,
                   "hidden_states": self._intake.hidden_states}
        return prepare[name](value)

    def _start_stream(self, prepared: list[dict]) -> int:
        self.stream = self._work.start(prepared)
        return self.stream

    def _stream_step(self, _: Any) -> list[StreamEvent]:
        events = self._work.step(self.stream)
        if not self._work.is_open(self.stream):
            self.stream = None
        return events

    def _add(self, prepared: dict) -> int | str:
        key = self._work.next_key() if prepared["id"] is None else prepared["id"]
        self._work.add(ADDED, key, prepared)
        return key

    def _score(self, prepared: list[dict]) -> list[ScoreOutput]:
        outputs = []
        for index, (each, (logprobs, greedy)) in enumerate(zip(prepared, self._work.score(prepared), strict=True)):
            ids, first = each["ids"], each["first"]
            if each["pair"]:
                values = tuple(ids[first:]), tuple(logprobs), tuple(greedy), tuple(ids[:first])
            else:
                values = tuple(ids), (None, *logprobs), (None, *greedy)
            outputs.append(ScoreOutput(index, *values))
        return outputs

    def _perplexity(self, prepared: list[dict]) -> list[PerplexityOutput]:
        scored = iter(self._work.score([window for text in prepared for window in text["windows"]]))
        outputs = []
        for index, text in enumerate(prepared):
            values = [value for _ in text["windows"] for value in next(scored)[0]]
            outputs.append(PerplexityOutput(index, math.fsum(values), len(values), text["bytes"]))
        return outputs

    def _hidden_states(self, prepared: dict) -> list[HiddenStatesOutput]:
        arrays = self._work.hidden_states(prepared)
        return [HiddenStatesOutput(index, tuple(ids), tuple(prepared["layers"]), array)
                for index, (ids, array) in enumerate(zip(prepared["prompts"], arrays, strict=True))]
