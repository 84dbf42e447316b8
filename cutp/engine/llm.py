"""`LLM`: a model loaded over a communicator, ready for prompts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cutp.array.dtypes import compute_dtype, dtype_name
from cutp.checkpoint.files import resolve_model
from cutp.comm.device_mapping import place_rank
from cutp.comm.launch import as_communicator
from cutp.engine.calls import CLOSE, Calls
from cutp.engine.handlers import ADDED, Handlers
from cutp.engine.intake import Intake, read_generation, read_scoring
from cutp.engine.loading import EngineOptions, LoadedModel, make_core, open_model, plan_memory, read_weights
from cutp.engine.memory import memory_report
from cutp.engine.outputs import (
    GenerationOutput,
    HiddenStatesOutput,
    PerplexityOutput,
    ScoreOutput,
    StreamEvent,
)
from cutp.engine.prompts import plain_names, plain_prompts
from cutp.engine.replicas import Replicas, check_tensor_parallel, split_replicas
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.workload import Workload
from cutp.errors import ClosedError, CommError, CutpError, RequestError

Params = SamplingParams | Sequence[SamplingParams] | None
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model on all ranks of a communicator: tensor-parallel groups of `tp` ranks, one replica of the model each.

    model: a directory in Hugging Face layout, a repository id in the local Hugging Face cache, or None for the
    bundled model. comm: None (the ranks the launcher started), an mpi4py communicator (which is duplicated) or a
    `cutp.Communicator`. tp: ranks a replica (default: all ranks); it must divide their number. device: "auto" (a GPU
    where there is one), "cpu", "cuda" (the GPU of this rank's number on its host, see `cutp.comm.device_mapping`) or
    "cuda:N". dtype: "float32", "bfloat16" or "float16", the dtype results are rounded to; default float32 on the CPU,
    on a GPU what config.json names if that has 16 bits, else bfloat16.
    max_len: the longest request in tokens; default what the model was made for. progress: called on rank 0 as
    progress(bytes done, bytes in all) while weights are read. options: see `EngineOptions`. load_report: bytes,
    seconds and gb_per_second of this rank's reading of weights; None if they are random.

    Construction and every method that computes are collective: all ranks call them, in the same order. Rank 0's input
    counts, the others pass None or the same; or they call `follow()` once, and then do what rank 0 calls. Results are
    equal on all ranks. Use it as a context manager, or call `close()`.

    Raises CheckpointError (and its kinds) for the model, ConfigError for an option, CapacityError for memory,
    CommError for communication; the same error on every rank.
    """

    def __init__(self, model: str | os.PathLike | None = None, comm: Any = None, tp: int | None = None,
                 device: str = "auto", dtype: Any = None, max_len: int | None = None, *,
                 progress: Callable[[int, int], None] | None = None, **options: Any):
        self._work: Workload | None = None
        self._replicas: Replicas | None = None
        self.comm, self._owns_comm = as_communicator(comm)
        try:
            with self.comm.host.agree("loading the model"):
                engine_options = EngineOptions.of(options)
                path = resolve_model(model)
                kind = compute_dtype(dtype) if dtype else None
                check_tensor_parallel(self.comm.size, tp)
            placement = place_rank(device, self.comm)
            engine_options = engine_options.completed(placement.device)
            self._replicas = split_replicas(self.comm, tp)
            with self.comm.host.agree("opening the model"):
                loaded = open_model(path, self._replicas, placement.device, kind, max_len, engine_options)
            if placement.device.is_gpu():
                # Before memory is planned: NCCL takes some of its own.
                self._replicas.group.connect_gpus()
            plan_memory(loaded, self._replicas, engine_options, placement.sharers)
            with self.comm.host.agree("reading the weights"):
                read_weights(loaded, self._replicas, progress if self.is_root else None)
            with self.comm.host.agree("taking memory for the cache"):
                core = make_core(loaded, self._replicas, engine_options)
        except BaseException:
            self._free()
            raise
        self._take(loaded, core)

    def _take(self, loaded: LoadedModel, core) -> None:
        self.path, self.model, self.tokenizer = loaded.path, loaded.model, loaded.tokenizer
        self.max_len, self.dtype = loaded.max_len, loaded.dtype
        self.on_gpu = loaded.memory is not None
        self.load_report = None if loaded.report is None else loaded.report.to_dict()
        intake = Intake(loaded.tokenizer, loaded.chat_template, loaded.defaults, loaded.model.vocab_size,
                        loaded.max_len, len(loaded.model.layers), core.check_capacity)
        self._work = Workload(core, self._replicas, loaded.tokenizer, loaded.defaults.eos_token_ids,
                              loaded.share_prefix)
        self._handlers = Handlers(self._work, intake)
        self._calls = Calls(self.comm, self._handlers.prepare)

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, whose input counts."""
        return self.comm.rank == 0

    @property
    def tp(self) -> int:
        """Ranks a replica: the tensor-parallel size."""
        return self._replicas.group.size

    @property
    def replicas(self) -> int:
        """How many replicas of the model run side by side."""
        return self._replicas.count

    def generate(self, prompts: str | Sequence | None = None, params: Params = None) -> list[GenerationOutput]:
        """Continues every prompt; all are processed together. Results come in the order of the prompts, the samples of
        a prompt (`SamplingParams.n`) side by side.

        prompts: one prompt or a sequence; a prompt is text or token ids. params: one SamplingParams for all, or one
        each. Raises RequestError (on all ranks, before any work) for a prompt or parameter that cannot be served.
        """
        return self._call("generate", lambda: read_generation(prompts, params), prompts is not None)

    def chat(self, conversations: Messages | Sequence[Messages] | None = None,
             params: Params = None) -> list[GenerationOutput]:
        """Answers conversations, rendered with the checkpoint's chat template.

        A conversation is a list of {"role", "content"} messages. Raises RequestError as `generate` does, and when the
        model has no chat template.
        """
        return self._call("generate", lambda: read_generation(conversations, params, chat=True),
                          conversations is not None)

    def stream(self, prompts: str | Sequence | None = None, params: Params = None, *,
               chat: bool = False) -> Iterator[StreamEvent]:
        """`generate` (or `chat`) as it happens: yields the events (prompt index, new text, the result once it is
        complete, sample index) of all prompts.

        Every rank must exhaust the iterator, or leave it at the same place: the next call of any other method ends it.
        The text is "" for a model without a tokenizer.
        """
        return self._events(self._call("stream", lambda: read_generation(prompts, params, chat), prompts is not None))

    def add_request(self, prompt: Any = None, params: SamplingParams | None = None, *, request_id: Any = None,
                    chat: bool = False, cache_salt: str = "") -> int | str:
        """Adds one prompt to what `step` works on; returns its id, on every rank.

        request_id: an integer or a string of your own that no unfinished request has; default: the next number.
        cache_salt: requests share the cache of equal beginnings only under equal salts.
        """
        def read() -> dict:
            _check_request_id(request_id)
            if not isinstance(cache_salt, str):
                raise RequestError(f"cache_salt must be a string, not {cache_salt!r}")
            value = read_generation([prompt], params, chat)
            return {**value, "id": request_id, "cache_salt": cache_salt}

        return self._call("add_request", read, prompt is not None)

    def step(self) -> list[StreamEvent]:
        """Runs one forward pass for the requests that were added; what is new, with the id as `index`.

        A request is done with the event that has an `output`. Without unfinished requests it returns at once.
        """
        return self._call("step")

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` still has events to bring; equal on all ranks."""
        return self._opened().is_open(ADDED)

    def cancel(self, request_id: int | str | None = None) -> None:
        """Ends a request that was added; its result so far, with finish_reason "cancelled", comes with the next `step`.

        Raises RequestError when no unfinished request has this id.
        """
        def read() -> int | str:
            _check_request_id(request_id)
            return request_id

        self._call("cancel", read, request_id is not None)

    def score(self, texts: str | Sequence | None = None, *, names: Sequence[str] | None = None) -> list[ScoreOutput]:
        """The log-probability of every token of every text, given the tokens before it.

        texts: one or a sequence; each is text, token ids, or a pair (context, continuation) of these, of which only
        the continuation is scored. names: what errors call each (default "prompt 0", ...). Raises RequestError (on all
        ranks, before any work) for a text that cannot be scored.
        """
        return self._call("score", lambda: read_scoring(texts, names), texts is not None)

    def perplexity(self, texts: str | Sequence | None = None, *, window: int | None = None,
                   names: Sequence[str] | None = None) -> list[PerplexityOutput]:
        """Scores texts of any length in rolling windows of `window` tokens (default max_len): see
        `cutp.engine.windows.rolling_windows`. Text gets no special tokens but the one before its first window.
        names: what errors call each text.
        """
        def read() -> dict:
            plain = plain_prompts(texts)
            return {"texts": plain, "window": _plain(window), "names": plain_names(names, len(plain))}

        return self._call("perplexity", read, texts is not None)

    def hidden_states(self, prompts: str | Sequence | None = None, *, layers: Sequence[int] = (-1,),
                      pool: str | None = None, gather: str = "all",
                      names: Sequence[str] | None = None) -> list[HiddenStatesOutput]:
        """Hidden states of every prompt, numbered as Hugging Face's `output_hidden_states`.

        layers: 0 (embeddings) .. L (after the final norm), or negative from the end. pool: None for all tokens,
        "last", "mean". gather: which ranks get the arrays: "all", "root" (rank 0), "none" (those that computed them).
        names: what errors call each prompt.
        """
        def read() -> dict:
            plain = plain_prompts(prompts)
            return {"prompts": plain, "layers": [_plain(layer) for layer in layers], "pool": _plain(pool),
                    "gather": _plain(gather), "names": plain_names(names, len(plain))}

        return self._call("hidden_states", read, prompts is not None)

    def embed(self, prompts: str | Sequence | None = None, *, layer: int = -1, pool: str = "mean",
              normalize: bool = True, names: Sequence[str] | None = None) -> np.ndarray:
        """One vector a prompt, float32 [prompts, dim]: the states of `layer`, pooled ("mean" or "last"), by default
        scaled to length 1.
        """
        outputs = self.hidden_states(prompts, layers=[layer], pool=pool, names=names)
        vectors = np.stack([output.array[0] for output in outputs]) if outputs else np.zeros((0, self.model.dim))
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors.astype(np.float32)

    def follow(self) -> None:
        """For ranks other than 0: does whatever rank 0 calls, until rank 0 closes; then this object is closed too.

        Rank 0 may take any time between its calls. What a call returns or refuses is known on rank 0 only.
        """
        self._opened()
        while True:
            try:
                call = self._calls.wait()
            except CommError:
                raise
            except CutpError:
                continue  # rank 0 has the same error, and goes on
            if call.name == CLOSE:
                return self._free()
            self._handlers.handle(call)

    def stats(self) -> dict[str, Any]:
        """Counters of this rank's replica since it was made (`EngineStats`), with what runs and waits now."""
        core = self._opened().core
        return {**asdict(core.stats), "running": len(core.scheduler.running), "waiting": len(core.scheduler.waiting)}

    def memory(self) -> dict[str, int]:
        """Bytes and tokens of this rank: weights, cache, pages in use; see `memory_report`."""
        return memory_report(self._opened().core)

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Not collective. RequestError without a tokenizer."""
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer.json")
        return self.tokenizer.encode(text, add_special_tokens=special_tokens)

    def close(self) -> None:
        """Frees the model and what this object made of the communicator; safe to call twice.

        Collective, like all calls; ranks that follow are released.
        """
        if self._work is not None and not self.comm.closed:
            # A rank that is gone, or that calls something else, finds out by itself; this one is done either way.
            with contextlib.suppress(CutpError):
                self._calls.begin(CLOSE)
        self._free()

    def _free(self) -> None:
        if self._work is not None:
            self._work.core.close()
        self._work = self.model = None
        if self._replicas is not None:
            self._replicas.close()
        if self._owns_comm:
            self.comm.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or (self._work is not None and self._calls.is_followed and not isinstance(error, CommError)):
            self.close()
            return
        if self._owns_comm:
            self.comm.__exit__(kind, error, traceback)  # tells the other ranks that this one is gone
        self._free()

    def __repr__(self) -> str:
        return f"LLM({str(self.path)!r}, tp={self.tp}, dtype={dtype_name(self.dtype)!r}, max_len={self.max_len})"

    # -- calls ---------------------------------------------------------------------------------------

    def _opened(self) -> Workload:
        if self._work is None:
            raise ClosedError("the LLM is closed")
        return self._work

    def _call(self, name: str, read: Callable[[], Any] | None = None, given: bool = True) -> Any:
        self._opened()
        leave = self._handlers.stream is not None and name != "stream step"
        return self._handlers.handle(self._calls.begin(name, read, given, leave=leave))

    def _events(self, batch: int) -> Generator[StreamEvent, None, None]:
        while self._work is not None and self._handlers.stream == batch:
            for event in self._call("stream step"):
                if self._work is None or self._handlers.left == batch:
                    return
                yield event


def _plain(value: Any) -> Any:
    """`value` as JSON can carry it between the ranks, to be judged on rank 0."""
    if isinstance(value, np.integer):
        return int(value)
    return value if isinstance(value, (int, str, type(None))) else repr(value)


def _check_request_id(request_id: Any) -> None:
    if request_id is not None and (isinstance(request_id, bool) or not isinstance(request_id, (int, str))):
        raise RequestError(f"request_id must be an integer or a string, not {request_id!r}")
