"""Weights that are made up, to measure a model of any shape without a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from cutp import settings
from cutp.models.weight_reader import Fill, Read, fill_weights
from cutp.models.weight_source import positions
from cutp.nn.module import Module, Weight

_STD = 0.02
# Rows of a matrix are pieces of one pattern, each a little further on, until they begin again.
_PERIOD, _STEP = 4096, 61


def randomize_weights(model: Module, seed: int = 0, progress: Callable[[int], None] | None = None) -> None:
    """Fills `model`, in the storage in use, with small normal values; the weights of norms are around 1.

    A weight's values depend on seed, name and place in the whole tensor, so ranks hold shares of the same model,
    however many they are. progress: as in `load_weights`.
    """
    for module in model.modules():
        module.materialize()
    named = list(model.named_weights())
    longest = max((max(weight.shape) for _, weight in named), default=1)
    pattern = np.random.default_rng(seed).standard_normal(_PERIOD * (_STEP + 1) + longest, np.float32) * _STD
    patterns: dict[np.dtype, np.ndarray] = {}
    fills = []
    for name, weight in named:
        if weight.dtype not in patterns:
            patterns[weight.dtype] = pattern.astype(weight.dtype)
        fills.append(Fill(weight, _reader(name, weight, patterns[weight.dtype])))
    fill_weights(fills, settings.load_threads(), progress)


def _reader(name: str, weight: Weight, pattern: np.ndarray) -> Read:
    first = zlib.crc32(name.encode()) % _PERIOD
    is_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith(".weight")

    def read(rows: tuple[int, int], buffer: np.ndarray) -> np.ndarray:
        index = positions(weight, rows)
        if len(index) == 1:
            values = pattern[first + index[0]]
            return values.astype(np.float32) + 1 if is_norm else values
        columns = slice(None) if len(index[1]) == weight.shape[1] else index[1]
        result = np.empty((len(index[0]), len(index[1])), pattern.dtype)
        for row, at in zip(result, first + index[0] % _PERIOD * _STEP, strict=True):
            row[...] = pattern[at : at + weight.shape[1]][columns]
        return result

    return read
