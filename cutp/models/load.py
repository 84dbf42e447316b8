"""From a checkpoint to a model whose weights are this rank's slices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from cutp import settings
from cutp.checkpoint.checkpoint import Checkpoint
from cutp.errors import CheckpointError
from cutp.models.registry import ModelFamily
from cutp.models.weight_reader import Fill, LoadReport, fill_weights
from cutp.models.weight_source import WeightSource, WholeTensor
from cutp.nn.module import Module, Weight

log = logging.getLogger("cutp")


def load_weights(model: Module, checkpoint: Checkpoint, family: ModelFamily,
                 progress: Callable[[int], None] | None = None) -> LoadReport:
    """Reads every weight of `model` from `checkpoint` into the storage in use, only the parts its shards hold.

    The checkpoint has passed `check_weights`. progress: called with the bytes of what has been read, in the dtypes of
    the weights; they add up to the sum of `Weight.local_bytes`.
    """
    began, before = time.perf_counter(), checkpoint.bytes_read
    for module in model.modules():
        module.materialize()
    fills = [_fill(weight, _source(family, name), checkpoint) for name, weight in model.named_weights()]
    fill_weights(fills, settings.load_threads(), progress)
    return LoadReport(checkpoint.bytes_read - before, time.perf_counter() - began)


def _fill(weight: Weight, source: WeightSource, checkpoint: Checkpoint) -> Fill:
    return Fill(weight, lambda rows, buffer: source.read(checkpoint, weight, rows, buffer), source.in_pieces)


def check_weights(model: Module, checkpoint: Checkpoint, family: ModelFamily) -> None:
    """Holds names, shapes and dtypes of `checkpoint` against `model`, from the headers alone.

    Every rank reads the same headers and finds the same fault. Raises MissingTensorError, ShapeMismatchError,
    UnsupportedModelError (a dtype), CheckpointError (a tensor that the layer it belongs to has no place for).
    """
    wanted: set[str] = set()
    for name, weight in model.named_weights():
        wanted.update(_source(family, name).check(checkpoint, weight.shape))
    _check_leftovers(wanted, checkpoint, family)


def _source(family: ModelFamily, name: str) -> WeightSource:
    found = family.checkpoint_name(name)
    return WholeTensor(found) if isinstance(found, str) else found


def _check_leftovers(wanted: set[str], checkpoint: Checkpoint, family: ModelFamily) -> None:
    """A tensor that nobody reads is an error where it would change a layer the model has, else a warning."""
    layers = {name.rpartition(".")[0] for name in wanted}
    leftover = [name for name in checkpoint.names() if name not in wanted and not name.endswith(family.ignored)
                and name != "lm_head.weight"]  # a tied head is sometimes stored a second time
    for name in leftover:
        if name.rpartition(".")[0] in layers:
            raise CheckpointError(f"{checkpoint.directory} holds tensor {name!r}, but config.json describes that layer "
                                  "without it", hint="compare config.json with the checkpoint")
    # DeepSeek-V3 and others: layers for multi-token prediction, known by their `eh_proj`, guess further tokens from the
    # model's result and do not change it.
    prediction = tuple(name.removesuffix("eh_proj.weight") for name in leftover if name.endswith(".eh_proj.weight"))
    if prediction:
        log.info("%s: the layers for multi-token prediction (%s) are not used", checkpoint.directory,
                 ", ".join(prefix.rstrip(".") for prefix in prediction))
        leftover = [name for name in leftover if not name.startswith(prediction)]
    if leftover:
        log.warning("%s: %d tensors are not part of the model and were ignored: %s%s", checkpoint.directory,
                    len(leftover), ", ".join(leftover[:3]), ", ..." if len(leftover) > 3 else "")
