"""Prepared requests over the replicas: dealt out, run, and brought together again, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cutp.checkpoint.detokenizer import Detokenizer
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.engine.core import EngineCore, Event
from cutp.engine.outputs import GenerationOutput, StreamEvent
from cutp.engine.prompt_wishes import PromptScores, PromptStates
from cutp.engine.replicas import Assignment, Replicas
from cutp.engine.request import Request
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.text_stream import TextStream


class Workload:
    """The requests of one `LLM`.

    Requests come in *batches*: a call that runs to its end, a stream, or (batch 0) requests that are added one by one.
    All ranks hold the same account of what is unfinished; each runs what its replica was dealt.
    """

    def __init__(self, core: EngineCore, replicas: Replicas, tokenizer: Tokenizer | None,
                 eos_token_ids: Sequence[int], share_prefix: bool):
        self.core = core
        self.replicas = replicas
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._share_prefix = share_prefix
        self._assignment = Assignment(replicas.count)
        self._next_request = 0
        self._next_batch = 1
        self._next_number = 0
        # Samples that have not finished, (batch, key) -> number; equal on all ranks.
        self._open: dict[tuple[int, int | str], int] = {}
        # This replica's requests of each batch that goes on step by step, and events that nobody has asked for yet.
        self._mine: dict[int, list[Request]] = {}
        self._waiting_events: list[tuple[int, Event]] = []
        self._backlog: dict[int, list[StreamEvent]] = {}
        self._batch_of: dict[int, int] = {}

    # -- generation, step by step ------------------------------------------------------------------

    def start(self, prepared: Sequence[dict]) -> int:
        """Adds prompts, keyed by their place, as a new batch; returns its number."""
        batch = self._next_batch
        self._next_batch += 1
        for key, each in enumerate(prepared):
            self.add(batch, key, each)
        return batch

    def add(self, batch: int, key: int | str, prepared: dict) -> None:
        """Adds one prompt to `batch`."""
        samples = prepared["params"]["n"]
        self._open[batch, key] = samples
        replica = self._assignment.place((batch, key), samples * prepared["reach"])
        for request in self._samples(key, prepared, mine=replica == self.replicas.index):
            self._mine.setdefault(batch, []).append(request)
            self._batch_of[request.id] = batch
            self.core.add(request)

    def next_key(self) -> int:
        """The lowest number that no unfinished request of batch 0 has, above all that were given out."""
        while (0, self._next_number) in self._open:
            self._next_number += 1
        self._next_number += 1
        return self._next_number - 1

    def is_open(self, batch: int, key: int | str | None = None) -> bool:
        """Whether `batch`, or one prompt of it, has samples that have not finished."""
        if key is not None:
            return (batch, key) in self._open
        return any(number == batch for number, _ in self._open) or bool(self._backlog.get(batch))

    def step(self, batch: int) -> list[StreamEvent]:
        """One step of every replica that has work; the events of `batch`. Others' events wait until they are asked for.
        """
        if not self._backlog.get(batch):
            local = self._waiting_events
            self._waiting_events = []
            if self.core.has_work:
                local = local + [(self._batch_of[request.id], (request, text)) for request, text in self._guarded_step()
                                 if request.id in self._batch_of]
            for number, event in self._everywhere(local):
                self._backlog.setdefault(number, []).append(event)
        return self._backlog.pop(batch, [])

    def cancel(self, batch: int, key: int | str | None = None) -> None:
        """Ends one prompt of `batch`, whose result so far comes with the next step; or all, without results."""
        for request in list(self._mine.get(batch, ())):
            if (key is None or request.key == key) and request.finish_reason is None:
                text = self.core.cancel(request)
                if key is not None:
                    self._waiting_events.append((batch, (request, text)))
                else:
                    self._forget(batch, request)
        if key is None:
            self._assignment.done([place for place in self._open if place[0] == batch])
            self._open = {place: count for place, count in self._open.items() if place[0] != batch}
            self._backlog.pop(batch, None)
            self._mine.pop(batch, None)

    # -- calls that run to their end ---------------------------------------------------------------

    def generate(self, prepared: Sequence[dict]) -> list[GenerationOutput]:
        """Results in the order of the prompts, the samples of each side by side."""
        requests: list[Request] = []
        for key, replica in enumerate(self._deal([p["params"]["n"] * p["reach"] for p in prepared])):
            requests += self._samples(key, prepared[key], mine=replica == self.replicas.index)
        self._run(requests)
        found = [[request.key, request.sample_index, request.generation_output()] for request in requests]
        if self.replicas.count > 1:
            found = [[key, sample, GenerationOutput.from_dict(output)] for key, sample, output in
                     self._merged([[key, sample, output.to_dict()] for key, sample, output in found])]
        return [output for _, _, output in sorted(found, key=lambda each: each[:2])]

    def score(self, prepared: Sequence[dict]) -> list[tuple[list[float], list[bool]]]:
        """(log-probabilities, whether each token is the likeliest) of the scored tokens of each {"ids", "first"}."""
        requests = []
        for key, replica in enumerate(self._deal([len(each["ids"]) for each in prepared])):
            ids, first = prepared[key]["ids"], prepared[key]["first"]
            request_id = self._take_id()
            if replica == self.replicas.index and first < len(ids):
                # The last token is only predicted, so it is not fed; it still counts to the length of the text.
                reach = min(len(ids), self.core.scheduler.max_len)
                requests.append(Request(request_id, key, None, ids[:-1], reach, share_prefix=self._share_prefix,
                                        scores=PromptScores(first - 1, ids[first:])))
        self._run(requests)
        results: list[tuple[list[float], list[bool]]] = [([], [])] * len(prepared)
        for key, logprobs, greedy in self._merged([[r.key, r.scores.logprobs, r.scores.greedy] for r in requests]):
            results[key] = (logprobs, greedy)
        return results

    def hidden_states(self, prepared: dict) -> list[np.ndarray | None]:
        """float32 arrays as `HiddenStatesOutput` describes them; None where this rank is not to have one."""
        dealt = self._deal([len(ids) for ids in prepared["prompts"]])
        requests: dict[int, Request] = {}
        for key, (ids, replica) in enumerate(zip(prepared["prompts"], dealt, strict=True)):
            request_id = self._take_id()
            if replica == self.replicas.index:
                states = PromptStates(prepared["layers"], prepared["pool"], len(ids))
                requests[key] = Request(request_id, key, None, ids, len(ids), share_prefix=self._share_prefix,
                                        states=states)
        self._run(list(requests.values()))
        return [self._hand_over(requests.get(key), self.replicas.first_ranks[replica], prepared["gather"])
                for key, replica in enumerate(dealt)]

    # -- how it is done -------------------------------------------------------------------------------

    def _samples(self, key: int | str, prepared: dict, mine: bool) -> list[Request]:
        """One request a sample; none, but their numbers are used up, where another replica has them."""
        params = SamplingParams.from_dict(prepared["params"])
        ids = [self._take_id() for _ in range(params.n)]
        return [self._request(ids[i], key, i, prepared, params) for i in range(params.n)] if mine else []

    def _request(self, request_id: int, key: int | str, sample: int, prepared: dict, params: SamplingParams) -> Request:
        stream = scores = None
        if self._tokenizer is not None:
            stream = TextStream(Detokenizer(self._tokenizer, prepared["ids"]), params.stop)
        if params.prompt_logprobs is not None:
            scores = PromptScores(0, prepared["ids"][1:], params.prompt_logprobs)
        return Request(request_id, key, prepared["text"], prepared["ids"], prepared["reach"], params, sample,
                       params.end_token_ids(self._eos_token_ids), stream, scores, share_prefix=self._share_prefix,
                       cache_salt=prepared.get("cache_salt", "").encode())

    def _take_id(self) -> int:
        self._next_request += 1
        return self._next_request - 1

    def _deal(self, work: Sequence[int]) -> list[int]:
        """The replica of each of several requests that run together: the longest are dealt first."""
        places = Assignment(self.replicas.count)
        replicas = [0] * len(work)
        for key in sorted(range(len(work)), key=lambda key: -work[key]):
            replicas[key] = places.place(key, work[key])
        return replicas

    def _run(self, requests: Sequence[Request]) -> None:
        """Steps until all of `requests` are done; what happens to others meanwhile waits for their own step."""
        left = {id(request) for request in requests}
        for request in requests:
            self.core.add(request)
        while left:
            for request, text in self._guarded_step():
                if request.id in self._batch_of:
                    self._waiting_events.append((self._batch_of[request.id], (request, text)))
                elif request.finish_reason is not None:
                    left.discard(id(request))

    def _guarded_step(self) -> list[Event]:
        try:
            return self.core.step()
        except BaseException:
            # The core has dropped all requests.
            for table in (self._open, self._mine, self._backlog, self._batch_of):
                table.clear()
            self._waiting_events = []
            self._assignment = Assignment(self.replicas.count)
            raise

    def _everywhere(self, local: Sequence[tuple[int, Event]]) -> list[tuple[int, StreamEvent]]:
        """The events of all replicas, in the order of the requests; ends the account of those that are done."""
        found = []
        for batch, (request, text) in local:
            output = request.generation_output() if request.finish_reason is not None else None
            found.append([request.id, batch, StreamEvent(request.key, text, output, request.sample_index)])
            if output is not None:
                self._forget(batch, request)
        if self.replicas.count > 1:
            rows = [[number, batch, [*event[:2], event.output and event.output.to_dict(), event.sample_index]]
                    for number, batch, event in found]
            found = []
            for number, batch, (key, text, output, sample) in self._merged(rows):
                output = output and GenerationOutput.from_dict(output)
                found.append([number, batch, StreamEvent(key, text, output, sample)])
            found.sort(key=lambda row: row[0])
        for _, batch, event in found:
            place = (batch, event.index)
            if event.output is not None and place in self._open:
                self._open[place] -= 1
                if not self._open[place]:
                    del self._open[place]
                    self._assignment.done([place])
        return [(batch, event) for _, batch, event in found]

    def _forget(self, batch: int, request: Request) -> None:
        self._batch_of.pop(request.id, None)
        if batch in self._mine:
            self._mine[batch].remove(request)
            if not self._mine[batch]:
                del self._mine[batch]

    def _merged(self, rows: list) -> list:
        """The rows of all replicas, one replica after another; JSON-safe."""
        if self.replicas.count == 1:
            return rows
        gathered = self.replicas.comm.host.all_gather_json(rows if self.replicas.group.rank == 0 else [])
        return [row for part in gathered for row in part]

    def _hand_over(self, request: Request | None, owner: int, gather: str) -> np.ndarray | None:
        """The states of a request that the replica whose first rank is `owner` has run, on the ranks `gather` names."""
        comm = self.replicas.comm
        array = None if request is None else request.states.result()
        if self.replicas.count > 1 and gather == "all":
            return comm.broadcast(array, root=owner)
        if gather == "root" and owner != 0:
            if comm.rank == owner:
                comm.send(array, 0)
            elif comm.rank == 0:
                return comm.recv(owner)
        return None if gather == "root" and comm.rank != 0 else array
