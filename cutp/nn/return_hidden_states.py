"""Which hidden states a forward pass returns beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from cutp.errors import ConfigError


class ReturnHiddenStates(Enum):
    """NONE: nothing. LAST: the last token of each request, [B, dim]. ALL: every token, [T, dim]. ALL_NORMALIZED: the
    same after the final norm. SELECTED_LAYERS: every token after each of the chosen layers, a list of [T, dim].

    All but ALL_NORMALIZED are the residual stream, before the final norm.
    """

    NONE = "none"
    LAST = "last"
    ALL = "all"
    ALL_NORMALIZED = "all_normalized"
    SELECTED_LAYERS = "selected_layers"


def check_selected_layers(mode: ReturnHiddenStates, layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """`layers` as a tuple; ConfigError unless they are there exactly when `mode` needs them, and exist."""
    if (mode is ReturnHiddenStates.SELECTED_LAYERS) != bool(layers):
        raise ConfigError(f"hidden_state_layers is {list(layers)}; it goes with SELECTED_LAYERS and with nothing else")
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_layers:
            raise ConfigError(f"hidden_state_layers names layer {index!r}; the layers are 0 .. {num_layers - 1}")
    return tuple(layers)
