"""The fields of config.json that every decoder-only family shares, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cutp.checkpoint.config import MAX_SIZE, REQUIRED, ModelConfig
from cutp.errors import ConfigError, ModelConfigError, UnsupportedModelError
from cutp.models.rope_config import rope_parameters
from cutp.nn.rope_parameters import RopeParameters

# A type that stretches the table serves factor times the positions it was trained on.
_STRETCHED = ("linear", "dynamic", "yarn", "llama3", "longrope")
# Many times what real models have; the layers are built before the checkpoint can show that it does not hold them.
_MAX_LAYERS = 2000


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder-only transformer, by their Hugging Face names.

    A family that has more sizes, or divides other things among ranks, subclasses it: see `read` and `divided`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope: RopeParameters

    @classmethod
    def read(cls, config: ModelConfig, defaults: Mapping[str, Any] | None = None, **given: Any) -> Self:
        """The sizes in `config`; ModelConfigError names the file, the key and the value that cannot be.

        UnsupportedModelError where attention is not causal, or for an unknown rotary type.

        defaults: by field name (and `rope_theta`, `partial_rotary_factor`), what the family's Hugging Face class has
        for a key that is absent; Llama's are the fallback. given: fields that the family has read by itself, because
        it spells them differently or because a subclass adds them; they are taken as they are.
        """
        absent = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
                  "tie_word_embeddings": False, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **(defaults or {})}

        def field(key: str, read, default: Any = REQUIRED) -> Any:
            return given.pop(key) if key in given else read(key, absent.get(key, default))

        if not config.boolean("is_causal", True):
            raise UnsupportedModelError(f"{config.path} has is_causal false: attention to later tokens is not "
                                        "implemented")
        hidden_size = field("hidden_size", config.positive_int)
        n_heads = field("num_attention_heads", config.positive_int)
        # A null is not an absent key here: it always means as many as there are query heads.
        has_null = "num_key_value_heads" in config.raw and "num_key_value_heads" not in config
        n_kv_heads = n_heads if has_null else field("num_key_value_heads", config.positive_int, n_heads)
        if n_heads % n_kv_heads:
            raise ModelConfigError(f"{config.path}: num_attention_heads {n_heads} is not a multiple of "
                                   f"num_key_value_heads {n_kv_heads}")
        head_dim = field("head_dim", config.positive_int, None)
        if head_dim is None:
            head_dim = hidden_size // n_heads
            if hidden_size % n_heads:
                raise ModelConfigError(f"{config.path}: hidden_size {hidden_size} is not a multiple of "
                                       f"num_attention_heads {n_heads}, and there is no head_dim")
        n_layers = field("num_hidden_layers", config.positive_int)
        if n_layers > _MAX_LAYERS:
            raise config.error("num_hidden_layers", f"at most {_MAX_LAYERS}")
        rope = given.pop("rope", None) or rope_parameters(
            config, default_theta=absent["rope_theta"], default_partial_rotary_factor=absent["partial_rotary_factor"])
        sizes = cls(
            hidden_size=hidden_size,
            intermediate_size=field("intermediate_size", config.positive_int),
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            vocab_size=field("vocab_size", config.positive_int),
            max_position_embeddings=field("max_position_embeddings", config.positive_int),
            rms_norm_eps=field("rms_norm_eps", config.positive_float),
            hidden_act=field("hidden_act", config.string),
            tie_word_embeddings=field("tie_word_embeddings", config.boolean),
            rope=rope,
            **given,
        )
        if sizes._positions > MAX_SIZE:
            raise ModelConfigError(f"{config.path}: rotary factor {sizes.rope.factor:g} gives over 2**31 positions")
        return sizes

    @property
    def context_length(self) -> int:
        """Tokens a request may have by default: the trained length, times the factor of a scaled rotary table."""
        return int(self._positions)

    @property
    def _positions(self) -> float:
        original = self.rope.original_max_position_embeddings
        if self.rope.rope_type not in _STRETCHED or self.rope.factor is None:
            return self.max_position_embeddings
        trained = original if original is not None else self.max_position_embeddings
        return max(self.max_position_embeddings, trained * self.rope.factor)

    @property
    def divided(self) -> dict[str, int]:
        """What is dealt out to the ranks, and how many there are: every rank needs at least one of each."""
        return {"attention heads": self.num_attention_heads, "feed-forward channels": self.intermediate_size,
                "tokens": self.vocab_size}

    @property
    def max_tensor_parallel(self) -> int:
        """The largest tensor-parallel size; every smaller one works too."""
        return min(self.divided.values())

    def check_tensor_parallel(self, size: int) -> None:
        """ConfigError naming the sizes that work, unless `size` is one of them."""
        if not 1 <= size <= self.max_tensor_parallel:
            *others, last = (f"{count} {what}" for what, count in self.divided.items())
            raise ConfigError(f"tensor-parallel size {size} does not fit this model: it has {', '.join(others)} and "
                              f"{last} to divide", hint=f"sizes 1 to {self.max_tensor_parallel} work")
