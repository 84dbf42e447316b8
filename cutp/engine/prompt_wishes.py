"""What may be wanted of a prompt's own tokens, collected while the prompt runs through the model in chunks.

Nothing is collected twice: after a preemption a request is computed again only from `next_position` on, or from
an earlier token whose rows are then passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cutp.engine.outputs import TokenLogprobs


class PromptWish(Protocol):
    @property
    def next_position(self) -> int:
        """The first position whose hidden state is still wanted; beyond the prompt once nothing is."""


class PromptScores:
    """Log-probabilities of given tokens.

    targets: the tokens at positions first + 1, first + 2, ..., each predicted by the hidden state before it. top: how
    many of the likeliest tokens are wanted beside each in `entries`; None for no entries.
    """

    def __init__(self, first: int, targets: Sequence[int], top: int | None = None):
        self.first = first
        self.targets = targets
        self.top = top
        self.logprobs: list[float] = []
        self.greedy: list[bool] = []
        self.entries: list[TokenLogprobs] = []

    @property
    def next_position(self) -> int:
        return self.first + len(self.logprobs)

    def rows(self, start: int, stop: int) -> range:
        """Positions of the chunk start .. stop - 1 that are wanted; they come in order, without a gap."""
        return range(max(start, self.next_position), min(stop, self.first + len(self.targets)))

    def target(self, position: int) -> int:
        """The token that the hidden state at `position` predicts."""
        return self.targets[position - self.first]

    def add(self, target: int, logprob: float, greedy: bool, likeliest: Sequence[tuple[int, float]]) -> None:
        """Takes the score of the next target; likeliest: tokens at its place, at least as many as are wanted."""
        self.logprobs.append(logprob)
        self.greedy.append(greedy)
        if self.top is not None:
            self.entries.append(TokenLogprobs(target, logprob, tuple(likeliest[: self.top])))


class PromptStates:
    """Hidden states of the prompt's tokens.

    layers: in the numbering of `HiddenStatesOutput`. pool: None for all tokens, "last" or "mean". length: tokens.
    """

    def __init__(self, layers: Sequence[int], pool: str | None, length: int):
        self.layers = tuple(layers)
        self.pool = pool
        self._length = length
        self._next = 0
        self._parts: list[np.ndarray] = []
        self._sum: np.ndarray | None = None

    @property
    def next_position(self) -> int:
        return max(self._next, self._length - 1) if self.pool == "last" else self._next

    def add(self, start: int, stop: int, states: Sequence[np.ndarray]) -> None:
        """Takes the rows of the chunk start .. stop - 1: one array [stop - start, dim] a layer."""
        begin = max(start, self.next_position)
        if begin < stop:
            rows = np.stack([layer[begin - start :].astype(np.float32) for layer in states])
            if self.pool == "mean":
                # In float64, so that the mean of a long text does not depend on how it was cut into chunks.
                part = rows.sum(axis=1, dtype=np.float64)
                self._sum = part if self._sum is None else self._sum + part
            else:
                self._parts.append(rows)
        self._next = max(self._next, stop)

    def result(self) -> np.ndarray:
        """float32 [layers, tokens, dim], or [layers, dim] when pooled."""
        if self.pool == "mean":
            return (self._sum / self._length).astype(np.float32)
        rows = np.concatenate(self._parts, axis=1)
        return rows[:, -1] if self.pool == "last" else rows
