"""The fields of config.json that every decoder-only family shares, checked."""

from __future__ import annotations

from dataclasses import dataclass

from cutp.checkpoint.config import MAX_SIZE, ModelConfig
from cutp.errors import ConfigError, ModelConfigError
from cutp.models.rope_config import rope_parameters
from cutp.nn.rope_parameters import RopeParameters

# A type that stretches the table serves factor times the positions it was trained on.
_STRETCHED = ("linear", "dynamic", "yarn", "llama3", "longrope")
# Many times what real models have; the layers are built before the checkpoint can show that it does not hold them.
_MAX_LAYERS = 2000


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder-only transformer, by their Hugging Face names."""

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
    def read(cls, config: ModelConfig) -> DecoderConfig:
        """The sizes in `config`; ModelConfigError names the file, the key and the value that cannot be."""
        hidden_size = config.positive_int("hidden_size")
        n_heads = config.positive_int("num_attention_heads")
        n_kv_heads = config.positive_int("num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise ModelConfigError(f"{config.path}: num_attention_heads {n_heads} is not a multiple of "
                                   f"num_key_value_heads {n_kv_heads}")
        head_dim = config.positive_int("head_dim", hidden_size // n_heads)
        if "head_dim" not in config and hidden_size % n_heads:
            raise ModelConfigError(f"{config.path}: hidden_size {hidden_size} is not a multiple of "
                                   f"num_attention_heads {n_heads}, and there is no head_dim")
        n_layers = config.positive_int("num_hidden_layers")
        if n_layers > _MAX_LAYERS:
            raise config.error("num_hidden_layers", f"at most {_MAX_LAYERS}")
        sizes = cls(
            hidden_size=hidden_size,
            intermediate_size=config.positive_int("intermediate_size"),
            num_hidden_layers=n_layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            vocab_size=config.positive_int("vocab_size"),
            max_position_embeddings=config.positive_int("max_position_embeddings", 2048),
            rms_norm_eps=config.positive_float("rms_norm_eps", 1e-6),
            hidden_act=config.string("hidden_act", "silu"),
            tie_word_embeddings=config.boolean("tie_word_embeddings", False),
            rope=rope_parameters(config),
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
    def max_tensor_parallel(self) -> int:
        """The largest tensor-parallel size: every rank needs a head, a feed-forward channel and a vocabulary row."""
        return min(self.num_attention_heads, self.intermediate_size, self.vocab_size)

    def check_tensor_parallel(self, size: int) -> None:
        """ConfigError naming the sizes that work, unless `size` is one of them."""
        if not 1 <= size <= self.max_tensor_parallel:
            raise ConfigError(
                f"tensor-parallel size {size} does not fit this model: it has {self.num_attention_heads} attention "
                f"heads, {self.intermediate_size} feed-forward channels and {self.vocab_size} tokens to divide",
                hint=f"sizes 1 to {self.max_tensor_parallel} work")
