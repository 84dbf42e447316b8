"""Tokens that a GPU draws while the host goes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cutp.array.scratch import Mark
from cutp.comm.communicator import Communicator
from cutp.engine.request import Request
from cutp.errors import CutpError


@dataclass
class PendingTokens:
    """A step that was started: `host` has the next token of each of `requests` once `arrived` is reached."""

    requests: list[Request]
    host: np.ndarray
    arrived: Mark
    comm: Communicator

    def tokens(self) -> np.ndarray:
        """int64 [B], once they have arrived."""
        self.comm.wait(self.arrived)
        return checked_tokens(self.host)


def checked_tokens(tokens: np.ndarray) -> np.ndarray:
    """The tokens; CutpError where a row had none, as `cutp.ops.sampling.sample` raises it."""
    if (tokens < 0).any():
        raise CutpError(f"the logits of row {int(np.argmax(tokens < 0))} are NaN or all -inf",
                        hint="the model's weights or its dtype do not suit; try float32")
    return tokens
