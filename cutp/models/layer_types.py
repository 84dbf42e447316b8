"""Which layers of a model attend through a window: `layer_types` of config.json."""

from __future__ import annotations

from collections.abc import Callable

from cutp.checkpoint.config import ModelConfig
from cutp.errors import ModelConfigError, UnsupportedModelError

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: ModelConfig, num_layers: int, default: Callable[[int], bool]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer, as the file lists them.

    default: whether layer i is SLIDING in a file without a list. Raises ModelConfigError for a list of another length,
    UnsupportedModelError for another kind of layer.
    """
    kinds = config.strings("layer_types", None)
    if kinds is None:
        return tuple(SLIDING if default(i) else FULL for i in range(num_layers))
    if len(kinds) != num_layers:
        raise config.error("layer_types", f"a list of {num_layers} entries, one a layer")
    for index, kind in enumerate(kinds):
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(f"{config.path}: layer_types names {kind!r} for layer {index}, which is not "
                                        "implemented here", hint=f"known kinds: {FULL}, {SLIDING}")
    return kinds


def layer_windows(config: ModelConfig, num_layers: int, window: int | None,
                  default: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer in tokens, None for full attention; arguments and errors as in `layer_types`.

    window: that of the SLIDING layers; ModelConfigError when there are some and it is None.
    """
    kinds = layer_types(config, num_layers, default)
    if window is None and SLIDING in kinds:
        raise ModelConfigError(f"{config.path}: layer {kinds.index(SLIDING)} is of kind {SLIDING}, but no "
                               "sliding_window is in use", hint="correct layer_types, sliding_window or "
                               "use_sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)
