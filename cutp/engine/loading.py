"""From a model directory to an engine that is ready for requests."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cutp.array.cuda import device_info
from cutp.array.cuda_memory import CudaMemory
from cutp.array.device import DeviceRef
from cutp.array.dtypes import compute_dtype
from cutp.array.graph import Stream
from cutp.array.scratch import Memory
from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import load_config
from cutp.checkpoint.generation_config import GenerationDefaults, load_generation_config
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.comm.device_group import DeviceGroup
from cutp.engine.core import EngineCore
from cutp.engine.device_runner import DeviceRunner
from cutp.engine.device_sampler import DeviceSampler
from cutp.engine.memory import DevicePlan, check_weights_fit, parse_bytes, plan_cache_pages, plan_device_memory
from cutp.engine.replicas import Replicas
from cutp.engine.runner import ModelRunner
from cutp.engine.sampler import Sampler
from cutp.engine.scheduler import Scheduler
from cutp.errors import CapacityError, ConfigError
from cutp.kv_cache.page_pool import PagePool
from cutp.kv_cache.paged import PagedKVCache
from cutp.kv_cache.params import PAGE_SIZE
from cutp.kv_cache.prefix_cache import PrefixCache
from cutp.models.load import check_weights, load_weights
from cutp.models.random_weights import randomize_weights
from cutp.models.registry import ModelFamily, find_family
from cutp.models.weight_reader import LoadReport
from cutp.nn.device_limits import fit_to_kernels
from cutp.nn.distributed_transformer import DistributedTransformer
from cutp.nn.storage import DeviceStorage

# Bytes of weights from which on the time to read them is of interest.
_WORTH_TELLING = 10**9
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 512, 8192

log = logging.getLogger("cutp")


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    max_batch_tokens: tokens of one forward pass (default 512 on the CPU, where more gains nothing, 8192 on a GPU).
    max_running: requests that run at once. kv_tokens: tokens the cache holds, or kv_memory: bytes it takes on each
    rank, as a number or a text like "20GB"; without either it takes what is useful and free. prefix_cache: whether
    requests with equal beginnings share their pages. random_weights: made up instead of read, to measure with; the
    directory needs nothing but config.json. use_graphs: whether a GPU decodes by captured graphs; the results do not
    depend on it. batch_invariant: on a GPU, the bits of a request's results do not depend on the requests that run
    beside it, for some speed; a request that was preempted is computed anew, and may differ.
    """

    max_batch_tokens: int | None = None
    max_running: int = 256
    kv_tokens: int | None = None
    kv_memory: int | str | None = None
    prefix_cache: bool = True
    random_weights: bool = False
    use_graphs: bool = True
    batch_invariant: bool = False

    @staticmethod
    def of(given: Mapping[str, Any]) -> EngineOptions:
        """The options in `given`; ConfigError for one that does not exist or cannot be."""
        names = [each.name for each in fields(EngineOptions)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"LLM has no option {unknown[0]!r}", hint=f"the options are {', '.join(names)}")
        options = EngineOptions(**given)
        options.check()
        if options.kv_memory is None:
            return options
        return replace(options, kv_memory=parse_bytes(options.kv_memory, "kv_memory"))

    def completed(self, device: DeviceRef) -> EngineOptions:
        """The options with what is left open filled in for `device`. ConfigError for what it cannot do."""
        if self.batch_invariant and device.is_cpu():
            raise ConfigError("batch_invariant is for GPUs; on the CPU, products depend on their number of rows",
                              hint="leave it out, or set max_running=1 and max_batch_tokens to the longest prompt")
        if self.max_batch_tokens is not None:
            return self
        return replace(self, max_batch_tokens=_CPU_BATCH_TOKENS if device.is_cpu() else _GPU_BATCH_TOKENS)

    def check(self) -> None:
        """ConfigError naming the first option that cannot be."""
        for name in ("max_batch_tokens", "max_running", "kv_tokens"):
            value = getattr(self, name)
            if value is None and name != "max_running":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if self.kv_tokens is not None and self.kv_memory is not None:
            raise ConfigError("kv_tokens and kv_memory both say how large the cache is; give one of them")
        for name in ("prefix_cache", "random_weights", "use_graphs", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")


@dataclass
class LoadedModel:
    """A model, and what its directory says about tokens and sampling. memory: of its GPU; None on the CPU.

    checkpoint: open until the weights have been read, None if they are made up. report: how fast they were read.
    """

    path: Path
    family: ModelFamily
    model: DistributedTransformer
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    max_len: int
    dtype: np.dtype
    checkpoint: Checkpoint | None
    memory: Memory | None = None
    plan: DevicePlan | None = None
    report: LoadReport | None = None

    @property
    def share_prefix(self) -> bool:
        """Whether keys and values of a token depend on the tokens before it alone, and not on the request's length."""
        ropes = [getattr(module, "rope", None) for module in self.model.modules()]
        return not any(rope is not None and rope.length_dependent for rope in ropes)

    def storage(self) -> AbstractContextManager:
        """Within it, weights are held where this model's are."""
        return nullcontext() if self.memory is None else DeviceStorage(self.memory).use()


def open_model(path: Path, replicas: Replicas, device: DeviceRef, dtype: np.dtype | None, max_len: int | None,
               options: EngineOptions) -> LoadedModel:
    """The model at `path`, divided over the ranks of this replica, once its directory has been found to be in order;
    its weights are still to be read.

    dtype: None for the default: float32 on the CPU; on a GPU what config.json names if that has 16 bits, else bfloat16.
    Raises what `LLM` raises.
    """
    config = load_config(path)
    family = find_family(config)
    sizes = family.sizes(config)
    sizes.check_tensor_parallel(replicas.group.size)
    max_len = _check_max_len(max_len, sizes.context_length)
    tokenizer = Tokenizer.load(path)
    defaults = load_generation_config(path, config)
    if replicas.comm.rank == 0:
        for sentence in defaults.not_applied:
            log.warning("%s asks for %s, which is not applied", path / "generation_config.json", sentence)
    if dtype is None:
        dtype = compute_dtype(_default_dtype(device, config.torch_dtype))
    model = family.build(config, DeviceGroup([device] * replicas.group.size, replicas.group), dtype, PAGE_SIZE)
    checkpoint = None if options.random_weights else Checkpoint(path)
    if checkpoint is not None:
        check_weights(model, checkpoint, family)
    memory = CudaMemory(device.id) if device.is_gpu() else None
    if memory is None:
        check_weights_fit(model, replicas.comm)
    else:
        with DeviceStorage(memory).use():
            fit_to_kernels(model)
    return LoadedModel(path, family, model, tokenizer, ChatTemplate.load(path), defaults, max_len, dtype, checkpoint,
                       memory)


def plan_memory(loaded: LoadedModel, replicas: Replicas, options: EngineOptions, sharers: int) -> None:
    """On a GPU, decides before anything is read how its memory is used; collective. See `plan_device_memory`."""
    if loaded.memory is None:
        return
    with loaded.storage():
        loaded.plan = plan_device_memory(
            loaded.model, loaded.max_len, options.kv_tokens, options.kv_memory, replicas, loaded.memory,
            max_batch_tokens=options.max_batch_tokens, max_running=options.max_running, sharers=sharers)
    if replicas.comm.rank == 0:
        log.info("rank 0 (%s): %s", replicas.comm.hosts[0], loaded.plan)


def read_weights(loaded: LoadedModel, replicas: Replicas, progress: Callable[[int, int], None] | None) -> None:
    """Every rank reads its own slices. progress: called as progress(bytes done, bytes in all)."""
    advance = _advance(loaded.model, progress)
    with loaded.storage():
        if loaded.checkpoint is None:
            randomize_weights(loaded.model, progress=advance)
            return
        with loaded.checkpoint as checkpoint:
            loaded.report = load_weights(loaded.model, checkpoint, loaded.family, advance)
        loaded.checkpoint = None
    if replicas.comm.rank == 0 and loaded.report.bytes > _WORTH_TELLING:
        report = loaded.report
        log.info("rank 0 (%s): read %.1f GB of weights in %.2f s, %.1f GB/s", replicas.comm.hosts[0],
                 report.bytes / 1e9, report.seconds, report.gb_per_second)


def make_core(loaded: LoadedModel, replicas: Replicas, options: EngineOptions) -> EngineCore:
    """The engine of one replica; collective over all replicas, whose caches are equally large."""
    model, group = loaded.model, replicas.group
    params = model.kv_params
    if loaded.plan is not None:
        pages = loaded.plan.pages
    else:
        pages = plan_cache_pages(params, loaded.max_len, options.kv_tokens, replicas, options.kv_memory)
    # A secret of this engine: nobody can make up tokens whose hash is that of other tokens.
    salt = replicas.comm.host.broadcast_bytes(secrets.token_bytes(16) if replicas.comm.rank == 0 else None)
    try:
        cache = PagedKVCache.allocate(params, pages, group.size, group.rank, loaded.memory)
    except CapacityError:
        raise
    except MemoryError:
        raise CapacityError(f"there is no memory for a cache of {pages * params.page_size} tokens",
                            hint="set a smaller max_len or kv_tokens") from None
    pool = PagePool(pages, params.page_size)
    prefix_cache = PrefixCache(pool, salt) if options.prefix_cache and loaded.share_prefix else None
    scheduler = Scheduler(pool, max_batch_tokens=options.max_batch_tokens, max_running=options.max_running,
                          max_len=loaded.max_len, prefix_cache=prefix_cache)
    if loaded.memory is None:
        runner = ModelRunner(model, cache, group)
        sampler = Sampler(runner.vocab_start, runner.vocab_stop, options.max_running, group)
    else:
        runner = DeviceRunner(model, cache, group, loaded.memory, Stream(), max_running=options.max_running,
                              max_pages=pool.pages_for(loaded.max_len),
                              multiprocessors=device_info().multiprocessors, use_graphs=options.use_graphs,
                              batch_invariant=options.batch_invariant)
        sampler = DeviceSampler(runner.vocab_start, runner.vocab_stop, options.max_running, group, loaded.memory)
    return EngineCore(runner, scheduler, sampler, replicas.comm)


def _default_dtype(device: DeviceRef, saved: str | None) -> str:
    if device.is_cpu():
        return "float32"
    return saved if saved in ("bfloat16", "float16") else "bfloat16"


def _check_max_len(max_len: int | None, context_length: int) -> int:
    if max_len is None:
        return context_length
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
        raise ConfigError(f"max_len must be a positive number of tokens, not {max_len!r}")
    return max_len


def _advance(model: DistributedTransformer, progress: Callable[[int, int], None] | None):
    """A function of the bytes just read that calls `progress` with the totals, or None."""
    if progress is None:
        return None
    total = sum(weight.local_bytes for _, weight in model.named_weights())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance
