"""An engine without a model, for tests of everything around it; and running jobs with it in threads."""

from __future__ import annotations

import io
import json
from pathlib import Path

from cutp import run_threads
from cutp.batch.job import run_job
from cutp.batch.prepare import JobOptions
from cutp.batch.progress import Progress
from cutp.batch.stop import StopFlag
from cutp.engine.outputs import GenerationOutput, StreamEvent
from cutp.engine.replicas import split_replicas
from cutp.engine.sampling_params import SamplingParams
from cutp.errors import CapacityError, CommError, CutpError, RequestError


class FakeLLM:
    """Has the calls of `LLM` that a job makes; a request takes max_tokens steps and its text says what it was.

    Prompts with "refuse" and "too large" in them are refused. on_step: called before every step with the number of
    steps so far. A list `added` remembers the prompts in the order in which they came, on the first rank.
    """

    tokenizer = None
    max_running = 10**6

    def __init__(self, comm, on_step=lambda number: None):
        self._comm = comm
        self._open: list[list] = []
        self._steps = 0
        self._generated = 0
        self._on_step = on_step
        self.added: list[str] = []
        self.closed = False

    def add_request(self, prompt=None, params=None, *, request_id=None, chat=False):
        value = None if self._comm.rank else [prompt, params.to_dict(), request_id, chat]
        prompt, params, request_id, chat = self._comm.host.broadcast_json(value)
        if "refuse" in str(prompt):
            raise RequestError("prompt 0 is refused")
        if "too large" in str(prompt):
            raise CapacityError("prompt 0 does not fit")
        params = SamplingParams.from_dict(params)
        self.added.append(prompt)
        for sample in range(params.n):
            self._open.append([request_id, prompt, params, sample, 0])
        return request_id

    def step(self):
        self._on_step(self._steps)
        self._comm.host.barrier()
        self._steps += 1
        running = self._open[: self.max_running]
        self._generated += len(running)
        events = []
        for row in running:
            row[4] += 1
        for request_id, prompt, params, sample, steps in running:
            output = None
            if steps >= params.max_tokens:
                text = f"{prompt} {params.seed} {sample}"
                output = GenerationOutput(request_id, str(prompt), (1, 2), (3,) * steps, text, "length", params.seed,
                                          None, sample)
            events.append(StreamEvent(request_id, "", output, sample))
        self._open = [row for row in self._open if row[4] < row[2].max_tokens]
        return events[::-1]

    @property
    def has_unfinished(self):
        return bool(self._open)

    def stats(self):
        return {"prompt_tokens": 2 * len(self.added), "generated_tokens": self._generated,
                "running": min(len(self._open), self.max_running),
                "waiting": max(0, len(self._open) - self.max_running)}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True


def write_model(directory: Path) -> str:
    """A directory that is as much of a model as a job without a real engine looks at."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "none"}')
    (directory / "model.safetensors").write_bytes(b"weights")
    return str(directory)


def write_lines(path: Path, lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def run(options: JobOptions, ranks: int = 1, tp: int = 1, *, on_step=lambda rank, number: None, stop_at=None,
        open_llm=FakeLLM, llms=None):
    """(exit code, what rank 0 said) of a job on `ranks` threads.

    stop_at: (rank, step) at which that rank gets a signal. llms: a dict that receives each rank's FakeLLM.
    """
    said = io.StringIO()

    def rank_main(comm):
        replicas = split_replicas(comm, tp)
        stop = StopFlag()

        def stepping(number):
            if stop_at == (comm.rank, number):
                stop.give_up("a test")
            on_step(comm.rank, number)

        def make():
            llm = open_llm(replicas.group, stepping)
            if llms is not None:
                llms[comm.rank] = llm
            return llm

        try:
            return run_job(options, replicas, stop, Progress(comm.rank == 0, said), make)
        except CutpError as error:
            # All ranks know of it, so that none has to be told when this one leaves.
            assert error is comm.host.agreed_error or isinstance(error, CommError)
            raise
        finally:
            replicas.close()

    codes = run_threads(ranks, rank_main)
    assert len(set(codes)) == 1
    return codes[0], said.getvalue()


def results(directory) -> dict:
    """{id: line} of all result lines; none may be there twice."""
    found = {}
    for path in sorted(Path(directory).glob("part-*.jsonl")):
        for line in path.read_text().splitlines():
            value = json.loads(line)
            name = value.get("custom_id", value.get("id"))
            assert name not in found
            found[name] = value
    return found


def errors(directory) -> list[dict]:
    return [json.loads(line) for path in sorted(Path(directory).glob("errors.*.jsonl"))
            for line in path.read_text().splitlines()]
