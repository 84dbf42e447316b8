"""Rolling windows over a text that is longer than the model's context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def rolling_windows(ids: Sequence[int], prefix: int | None, window: int) -> Iterator[tuple[list[int], int]]:
    """(token ids, first scored token) of windows in which every token of `ids` is scored once.

    A window feeds at most `window` tokens to the model, so it holds one more: its last token is only predicted. The
    first window begins with `prefix` (without one the first token of the text cannot be predicted and is left out).
    Full windows follow each other with one token of context; the last one reaches back as far as it can, so that its
    tokens have all the context there is (the rule of the language model evaluation harness).
    """
    ids = list(ids) if prefix is None else [prefix, *ids]
    scored = 1
    while scored < len(ids):
        end = min(len(ids), scored + window)
        begin = max(0, end - window - 1)
        yield ids[begin:end], scored - begin
        scored = end
