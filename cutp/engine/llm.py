"""`LLM`: a model loaded over a communicator, ready for prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cutp.array.device import DeviceRef, select_device
from cutp.array.dtypes import compute_dtype, dtype_name
from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import load_config
from cutp.checkpoint.files import resolve_model
from cutp.checkpoint.generation_config import load_generation_config
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.comm.device_group import DeviceGroup
from cutp.comm.launch import as_communicator
from cutp.engine.core import EngineCore
from cutp.engine.intake import Intake
from cutp.engine.memory import check_weights_fit, plan_cache_pages
from cutp.engine.outputs import GenerationOutput, ScoreOutput
from cutp.engine.runner import ModelRunner
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.scheduler import Scheduler
from cutp.errors import CapacityError, ClosedError, ConfigError
from cutp.kv_cache.paged import PageAllocator, PagedKVCache
from cutp.kv_cache.params import PAGE_SIZE
from cutp.models.load import check_weights, load_weights
from cutp.models.registry import find_family

# Tokens of one forward pass, and requests that run at once. On the CPU larger passes gain nothing.
MAX_BATCH_TOKENS = 512
MAX_RUNNING = 64

log = logging.getLogger("cutp")

Params = SamplingParams | Sequence[SamplingParams] | None
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model on all ranks of a communicator, tensor-parallel.

    model: a directory in Hugging Face layout, a repository id in the local Hugging Face cache, or None for the
    bundled model. comm: None (the ranks the launcher started), an mpi4py communicator (which is duplicated) or a
    `cutp.Communicator`. tp: the tensor-parallel size, which must be the size of the communicator. device: "auto",
    "cpu" or "cuda". dtype: "float32", "bfloat16" or "float16", the dtype results are rounded to; default float32 on
    the CPU. max_len: the longest request in tokens; default what the model was made for. progress: called on rank 0
    as progress(bytes done, bytes in all) while weights are read.

    Construction and every method are collective: all ranks call them, in the same order. Rank 0's input counts, the
    others pass None or the same; results are equal on all ranks. Use it as a context manager, or call `close()`.

    Raises CheckpointError (and its kinds) for the model, ConfigError for an option, CapacityError for memory,
    CommError for communication; the same error on every rank.
    """

    def __init__(self, model: str | os.PathLike | None = None, comm: Any = None, tp: int | None = None,
                 device: str = "auto", dtype: Any = None, max_len: int | None = None, *,
                 progress: Callable[[int, int], None] | None = None):
        self._core: EngineCore | None = None
        self._under_way: Generator | None = None
        self.comm, self._owns_comm = as_communicator(comm)
        try:
            with self.comm.host.agree("loading the model"):
                self._load(model, tp, select_device(device), compute_dtype(dtype or "float32"), max_len, progress)
            with self.comm.host.agree("taking memory for the cache"):
                self._make_engine()
        except BaseException:
            self.close()
            raise

    def _load(self, model, tp: int | None, device: DeviceRef, dtype: np.dtype, max_len: int | None, progress) -> None:
        size = self.comm.size
        self.path = resolve_model(model)
        config = load_config(self.path)
        family = find_family(config)
        sizes = family.sizes(config)
        sizes.check_tensor_parallel(size if tp is None else tp)
        if tp is not None and tp != size:
            raise ConfigError(f"tp={tp}, but there are {size} ranks", hint=f"start {tp} ranks, or leave tp out")
        self.max_len = _check_max_len(max_len, sizes.context_length)
        self.dtype = dtype
        self.tokenizer = Tokenizer.load(self.path)
        defaults = load_generation_config(self.path, config)
        if defaults.repetition_penalty not in (None, 1.0) and self.is_root:
            log.warning("%s asks for repetition_penalty %s, which is not applied", self.path / "generation_config.json",
                        defaults.repetition_penalty)
        self._intake = Intake(self.comm, self.tokenizer, ChatTemplate.load(self.path), defaults, sizes.vocab_size,
                              self.max_len)
        self.model = family.build(config, DeviceGroup([device] * size, self.comm), dtype, PAGE_SIZE)
        with Checkpoint(self.path) as checkpoint:
            check_weights(self.model, checkpoint, family)
            check_weights_fit(self.model, self.comm)
            load_weights(self.model, checkpoint, family, self._progress(progress))

    def _progress(self, progress: Callable[[int, int], None] | None) -> Callable[[int], None] | None:
        if progress is None or not self.is_root:
            return None
        total = sum(weight.local_bytes for _, weight in self.model.named_weights())
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        return advance

    def _make_engine(self) -> None:
        params = self.model.kv_params
        pages = plan_cache_pages(params, self.max_len, self.comm)
        try:
            cache = PagedKVCache.allocate(params, pages, self.comm.size, self.comm.rank)
        except MemoryError:
            raise CapacityError(f"there is no memory for a cache of {pages * params.page_size} tokens",
                                hint="set a smaller max_len") from None
        scheduler = Scheduler(PageAllocator(pages, params.page_size), MAX_BATCH_TOKENS, MAX_RUNNING)
        self._core = EngineCore(ModelRunner(self.model, cache, self.comm), scheduler, self.comm)

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, whose input counts."""
        return self.comm.rank == 0

    @property
    def tp(self) -> int:
        """The tensor-parallel size."""
        return self.comm.size

    def generate(self, prompts: str | Sequence | None = None, params: Params = None) -> list[GenerationOutput]:
        """Continues every prompt; all are processed together. Results come in the order of the prompts.

        prompts: one prompt or a sequence; a prompt is text or token ids. params: one SamplingParams for all, or one
        each. Raises RequestError (on all ranks, before any work) for a prompt or parameter that cannot be served.
        """
        return self._finished(self._stream(self._open().generation(prompts, params)))

    def chat(self, conversations: Messages | Sequence[Messages] | None = None,
             params: Params = None) -> list[GenerationOutput]:
        """Answers conversations, rendered with the checkpoint's chat template.

        A conversation is a list of {"role", "content"} messages. Raises RequestError as `generate` does, and when the
        model has no chat template.
        """
        return self._finished(self._stream(self._open().chat(conversations, params)))

    def stream(self, prompts: str | Sequence | None = None, params: Params = None, *,
               chat: bool = False) -> Iterator[tuple[int, str, GenerationOutput | None]]:
        """`generate` (or `chat`) as it happens: yields (prompt index, new text, the result once it is complete).

        Every rank must exhaust the iterator, or leave it at the same place: the next call of any method ends it. The
        text is "" for a model without a tokenizer.
        """
        intake = self._open()
        return self._stream(intake.chat(prompts, params) if chat else intake.generation(prompts, params))

    def score(self, texts: str | Sequence | None = None, *, names: Sequence[str] | None = None) -> list[ScoreOutput]:
        """The log-probability of every token of every text (or token-id sequence), given the tokens before it.

        names: what errors call each text (default "prompt 0", ...). Raises RequestError (on all ranks, before any
        work) for a text that cannot be scored.
        """
        requests = self._open().scoring(texts, names)
        for _ in self._run(requests):
            pass
        return [request.score_output() for request in requests]

    def close(self) -> None:
        """Frees the model and the duplicated communicator; safe to call twice."""
        self._leave()
        self._core = self.model = self._intake = None
        if self._owns_comm:
            self.comm.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._owns_comm:
            self.comm.__exit__(kind, error, traceback)  # tells the other ranks that this one is gone
        self.close()

    def __repr__(self) -> str:
        return f"LLM({str(self.path)!r}, tp={self.tp}, dtype={dtype_name(self.dtype)!r}, max_len={self.max_len})"

    def _open(self) -> Intake:
        if self._core is None:
            raise ClosedError("the LLM is closed")
        return self._intake

    def _stream(self, requests) -> Iterator[tuple[int, str, GenerationOutput | None]]:
        return ((request.index, piece, request.generation_output() if request.finish_reason else None)
                for request, piece in self._run(requests))

    def _run(self, requests) -> Generator:
        self._core.check_capacity(requests)
        self._leave()
        self._under_way = self._core.run(requests)
        return self._under_way

    def _leave(self) -> None:
        """Ends a stream that was not exhausted, so that its requests do not run on beside others."""
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None

    @staticmethod
    def _finished(events: Iterator[tuple[int, str, GenerationOutput | None]]) -> list[GenerationOutput]:
        results = {index: result for index, _, result in events if result is not None}
        return [results[index] for index in sorted(results)]


def _check_max_len(max_len: int | None, context_length: int) -> int:
    if max_len is None:
        return context_length
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
        raise ConfigError(f"max_len must be a positive number of tokens, not {max_len!r}")
    return max_len
