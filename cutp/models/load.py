"""From a checkpoint to a model whose weights are this rank's slices."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cutp.checkpoint.checkpoint import Checkpoint
from cutp.errors import CheckpointError, ShapeMismatchError, UnsupportedModelError
from cutp.models.registry import ModelFamily
from cutp.nn.module import Module

log = logging.getLogger("cutp")

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def load_weights(model: Module, checkpoint: Checkpoint, family: ModelFamily,
                 progress: Callable[[int], None] | None = None) -> None:
    """Reads every weight of `model` from `checkpoint`, only the parts its shards hold.

    The checkpoint has passed `check_weights`. progress: called with the bytes of each weight that has been read.
    """
    for module in model.modules():
        module.materialize()
    for name, weight in model.named_weights():
        weight.store(checkpoint.read(family.checkpoint_name(name), weight.axis, weight.ranges))
        if progress is not None:
            progress(weight.local_bytes)


def check_weights(model: Module, checkpoint: Checkpoint, family: ModelFamily) -> None:
    """Holds names, shapes and dtypes of `checkpoint` against `model`, from the headers alone.

    Every rank reads the same headers and finds the same fault. Raises MissingTensorError, ShapeMismatchError,
    UnsupportedModelError (a dtype), CheckpointError (a tensor that the layer it belongs to has no place for).
    """
    wanted = {family.checkpoint_name(name): weight for name, weight in model.named_weights()}
    for name, weight in wanted.items():
        info = checkpoint.info(name)
        if tuple(info.shape) != weight.shape:
            raise ShapeMismatchError(f"tensor {name!r} in {checkpoint.directory} has shape {list(info.shape)}, "
                                     f"config.json describes {list(weight.shape)}")
        if info.dtype.name not in _FLOATS:
            raise UnsupportedModelError(f"tensor {name!r} in {checkpoint.directory} holds {info.dtype.name} values; "
                                        f"weights must be one of {', '.join(_FLOATS)}")
    _check_leftovers(set(wanted), checkpoint, family)


def _check_leftovers(wanted: set[str], checkpoint: Checkpoint, family: ModelFamily) -> None:
    """A tensor that nobody reads is an error where it would change a layer the model has, else a warning."""
    layers = {name.rpartition(".")[0] for name in wanted}
    leftover = [name for name in checkpoint.names() if name not in wanted and not name.endswith(family.ignored)
                and name != "lm_head.weight"]  # a tied head is sometimes stored a second time
    for name in leftover:
        if name.rpartition(".")[0] in layers:
            raise CheckpointError(f"{checkpoint.directory} holds tensor {name!r}, but config.json describes that layer "
                                  "without it", hint="compare config.json with the checkpoint")
    if leftover:
        log.warning("%s: %d tensors are not part of the model and were ignored: %s%s", checkpoint.directory,
                    len(leftover), ", ".join(leftover[:3]), ", ..." if len(leftover) > 3 else "")
