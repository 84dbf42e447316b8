"""A request's text as it grows: whole characters only, ended by the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from cutp.checkpoint.detokenizer import Detokenizer


class TextStream:
    """Turns tokens into text and watches for stop strings, also across token borders."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()):
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = max((len(text) for text in self._stop), default=1) - 1
        self._emitted = 0
        self._watch = True
        self.text = ""
        self.stopped = False

    def push(self, token_id: int, *, watch: bool = True) -> str:
        """Adds a token; returns the text that is now certain. `stopped` is set when a stop string appeared.

        watch: whether stop strings that this token completes end the text; one that is passed over stays in it.
        """
        self._watch = watch
        return self._extend(self._detokenizer.push(token_id), self._held)

    def finish(self) -> str:
        """The rest of the text, once no token follows; it belongs to the last token."""
        if self.stopped:
            return ""
        return self._extend(self._detokenizer.flush(), 0)

    def _extend(self, piece: str, held: int) -> str:
        old = len(self.text)
        self.text += piece
        # One that ends in the new piece; those that ended before it have ended the text, or were passed over.
        found = [at for stop in self._stop if (at := self.text.find(stop, max(0, old + 1 - len(stop)))) >= 0]
        if not self._watch:
            found = []
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
            held = 0
        certain = max(self._emitted, len(self.text) - held)
        new = self.text[self._emitted : certain]
        self._emitted = certain
        return new
