"""Weights stored as 8-bit floating-point numbers with a scale for every block, as DeepSeek released its models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cutp.checkpoint.checkpoint import Checkpoint
from cutp.checkpoint.config import ModelConfig
from cutp.errors import UnsupportedModelError
from cutp.models.weight_source import WholeTensor, check_tensor, positions
from cutp.nn.module import Weight

BLOCK_SIZE = 128  # rows and columns that share a scale


@dataclass(frozen=True)
class BlockScaledTensor:
    """A tensor called `name` of the weight's own shape, which may be quantized.

    It is if there is a `name`_scale_inv, float32 [ceil(out / 128), ceil(in / 128)]; then `name` holds E4M3 numbers, and
    a weight is its number times the scale of its block, a float32 product (DeepSeek-V3, 2024, section 3.3.2).
    """

    name: str
    in_pieces: ClassVar[bool] = True

    def check(self, checkpoint: Checkpoint, shape: tuple[int, ...]) -> Iterable[str]:
        """See `WeightSource.check`."""
        if self._scales not in checkpoint:
            check_tensor(checkpoint, self.name, shape)
            return [self.name]
        check_tensor(checkpoint, self.name, shape, ("float8_e4m3fn",))
        check_tensor(checkpoint, self._scales, tuple(-(-n // BLOCK_SIZE) for n in shape))
        return [self.name, self._scales]

    def read(self, checkpoint: Checkpoint, weight: Weight, rows: tuple[int, int] | None = None,
             buffer: np.ndarray | None = None) -> np.ndarray:
        """See `WeightSource.read`. All scales are read: there are few."""
        values = WholeTensor(self.name).read(checkpoint, weight, rows, buffer)
        if self._scales not in checkpoint:
            return values
        scales = checkpoint.read(self._scales).astype(np.float32)
        result = values.astype(np.float32)
        result *= scales[np.ix_(*(index // BLOCK_SIZE for index in positions(weight, rows)))]
        return result

    @property
    def _scales(self) -> str:
        return f"{self.name}_scale_inv"


def check_block_size(config: ModelConfig) -> None:
    """UnsupportedModelError when config.json has quantized weights with other blocks than `BlockScaledTensor` reads."""
    quantization = config.section("quantization_config", None)
    if quantization is None:
        return
    found = quantization.raw.get("weight_block_size")
    if found != [BLOCK_SIZE, BLOCK_SIZE]:
        raise UnsupportedModelError(f"{config.path} describes weights quantized in blocks of {found!r}; only "
                                    f"{[BLOCK_SIZE] * 2} is implemented", hint="use the unquantized checkpoint")
