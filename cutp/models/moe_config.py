"""The sizes of a mixture of experts, as config.json names them."""

from __future__ import annotations

from collections.abc import Sequence

from cutp.checkpoint.config import ModelConfig
from cutp.errors import ModelConfigError

# Several times what real models have; the layers are built before the checkpoint can show that it does not hold them.
_MAX_EXPERTS = 100_000


def expert_counts(config: ModelConfig, experts: int, per_token: int,
                  keys: Sequence[str] = ("num_local_experts", "num_experts")) -> tuple[int, int]:
    """(number of experts, experts a token uses). experts, per_token: what the family has for absent keys.

    keys: the names that the number of experts may have. Transformers 4 wrote `num_experts` for some families where
    transformers 5 writes `num_local_experts`; either is read. ModelConfigError when they contradict each other, or for
    more experts a token than there are.
    """
    counts = {key: config.positive_int(key) for key in keys if key in config}
    if len(set(counts.values())) > 1:
        found = " contradicts ".join(f"{key} {count}" for key, count in reversed(counts.items()))
        raise ModelConfigError(f"{config.path}: {found}", hint="correct the file, or fetch it again")
    key, count = next(iter(counts.items()), (keys[0], experts))
    if count * config.positive_int("num_hidden_layers") > _MAX_EXPERTS:
        raise config.error(key, f"at most {_MAX_EXPERTS} for all layers together")
    used = config.positive_int("num_experts_per_tok", per_token)
    if used > count:
        raise config.error("num_experts_per_tok", f"at most {count}, the number of experts")
    return count, used
