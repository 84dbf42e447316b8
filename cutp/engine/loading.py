"""From a model directory to an engine that is ready for requests."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cutp.array.device import DeviceRef
from cutp.checkpoint.chat_template import ChatTemplate
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import load_config
from cutp.checkpoint.generation_config import GenerationDefaults, load_generation_config
from cutp.checkpoint.tokenizer import Tokenizer
from cutp.comm.device_group import DeviceGroup
from cutp.engine.core import EngineCore
from cutp.engine.memory import check_weights_fit, plan_cache_pages
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
from cutp.models.registry import find_family
from cutp.nn.distributed_transformer import DistributedTransformer

log = logging.getLogger("cutp")


@dataclass(frozen=True)
class EngineOptions:
    """Limits of an engine.

    max_batch_tokens: tokens of one forward pass. max_running: requests that run at once. kv_tokens: tokens the cache
    holds; None takes what is useful and free. prefix_cache: whether requests with equal beginnings share their pages.
    """

    max_batch_tokens: int = 512
    max_running: int = 256
    kv_tokens: int | None = None
    prefix_cache: bool = True

    @staticmethod
    def of(given: Mapping[str, Any]) -> EngineOptions:
        """The options in `given`; ConfigError for one that does not exist or cannot be."""
        names = [each.name for each in fields(EngineOptions)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"LLM has no option {unknown[0]!r}", hint=f"the options are {', '.join(names)}")
        options = EngineOptions(**given)
        options.check()
        return options

    def check(self) -> None:
        """ConfigError naming the first option that cannot be."""
        for name in ("max_batch_tokens", "max_running", "kv_tokens"):
            value = getattr(self, name)
            if value is None and name == "kv_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache must be true or false, not {self.prefix_cache!r}")


@dataclass
class LoadedModel:
    """A model with its weights, and what its directory says about tokens and sampling."""

    path: Path
    model: DistributedTransformer
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: GenerationDefaults
    max_len: int
    dtype: np.dtype

    @property
    def share_prefix(self) -> bool:
        """Whether keys and values of a token depend on the tokens before it alone, and not on the request's length."""
        ropes = [getattr(module, "rope", None) for module in self.model.modules()]
        return not any(rope is not None and rope.length_dependent for rope in ropes)


def load_model(path: Path, replicas: Replicas, device: DeviceRef, dtype: np.dtype, max_len: int | None,
               progress: Callable[[int, int], None] | None) -> LoadedModel:
    """The model at `path`, divided over the ranks of this replica; every rank reads its own slices.

    progress: called as progress(bytes done, bytes in all). Raises what `LLM` raises.
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
    model = family.build(config, DeviceGroup([device] * replicas.group.size, replicas.group), dtype, PAGE_SIZE)
    with Checkpoint(path) as checkpoint:
        check_weights(model, checkpoint, family)
        check_weights_fit(model, replicas.comm)
        load_weights(model, checkpoint, family, _advance(model, progress))
    return LoadedModel(path, model, tokenizer, ChatTemplate.load(path), defaults, max_len, dtype)


def make_core(loaded: LoadedModel, replicas: Replicas, options: EngineOptions) -> EngineCore:
    """The engine of one replica; collective over all replicas, whose caches are equally large."""
    model, group = loaded.model, replicas.group
    params = model.kv_params
    pages = plan_cache_pages(params, loaded.max_len, options.kv_tokens, replicas)
    # A secret of this engine: nobody can make up tokens whose hash is that of other tokens.
    salt = replicas.comm.host.broadcast_bytes(secrets.token_bytes(16) if replicas.comm.rank == 0 else None)
    try:
        cache = PagedKVCache.allocate(params, pages, group.size, group.rank)
    except MemoryError:
        raise CapacityError(f"there is no memory for a cache of {pages * params.page_size} tokens",
                            hint="set a smaller max_len or kv_tokens") from None
    pool = PagePool(pages, params.page_size)
    prefix_cache = PrefixCache(pool, salt) if options.prefix_cache and loaded.share_prefix else None
    scheduler = Scheduler(pool, max_batch_tokens=options.max_batch_tokens, max_running=options.max_running,
                          max_len=loaded.max_len, prefix_cache=prefix_cache)
    runner = ModelRunner(model, cache, group)
    sampler = Sampler(runner.vocab_start, runner.vocab_stop, options.max_running, group)
    return EngineCore(runner, scheduler, sampler, replicas.comm)


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
