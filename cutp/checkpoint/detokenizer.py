"""Text of a growing token sequence, piece by piece, at a cost per token that does not grow with its length.

Two ways, by the tokenizer's decoder. A byte-level decoder is a plain map from tokens to bytes, so the bytes go through
an incremental UTF-8 decoder. Every other decoder is asked to decode a short window: enough of what came before that
its rules for the start of a text (such as dropping a leading space) do not apply to the new token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from cutp.checkpoint.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_UTF8 = 4


class Detokenizer:
    """Incremental decoding of the tokens that follow `prompt_ids`.

    The pieces returned by `push` and `flush`, joined, are what `decode(prompt + generated)` has beyond
    `decode(prompt)`. Two cases differ on purpose: a character whose bytes begin in the prompt and end in the
    generated tokens is given whole, and text already returned stays as it was when later byte tokens of the same run
    turn out to be invalid (the library would then replace all characters of the run). A decoder that mixes ByteLevel
    with other steps may get a different number of U+FFFD for bytes that are not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        """O(1) in the length of the prompt."""
        kinds = _decoder_kinds(tokenizer.decoder_settings)
        way = _ByteLevel if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"] else _Window
        self._way = way(tokenizer, skip_special_tokens, kinds)
        self._way.start(prompt_ids)

    def push(self, token_id: int) -> str:
        """New text made certain by `token_id`; empty while a character is incomplete."""
        return self._way.push(token_id)

    def flush(self) -> str:
        """The rest at the end of the sequence: U+FFFD for an incomplete character, otherwise empty."""
        return self._way.flush()


class _ByteLevel:
    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, kinds: list[str]):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def start(self, prompt_ids: Sequence[int]) -> None:
        # Each token has at least a byte, so the tail of an incomplete character lies in the last few tokens.
        tail = _last(prompt_ids, lambda i: bool(self._bytes(i)), _LONGEST_UTF8)
        data = b"".join(self._bytes(i) for i in tail)
        for back in range(1, min(_LONGEST_UTF8, len(data)) + 1):
            if data[-back] & 0xC0 != 0x80:  # the first byte of the last character
                self._decoder.decode(data[-back:])
                break

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[c] for c in token)
        except KeyError:  # an added token, kept as plain text
            return token.encode("utf-8")


class _Window:
    """`context` decodes to some text, all of it returned already; `run` are tokens whose text is not certain yet."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, kinds: list[str]):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_fallback = "ByteFallback" in kinds
        self._holds_replacement = "ByteLevel" in kinds  # among other steps, so it cannot be bypassed
        self._context: list[int] = []
        self._run: list[int] = []
        self._run_is_bad = False

    def start(self, prompt_ids: Sequence[int]) -> None:
        count = 8
        while True:
            whole = count >= len(prompt_ids)
            tail = [i for i in prompt_ids[-count:] if i not in self._skipped]
            while not whole and tail and 0x80 <= (self._byte(tail[0]) or 0) < 0xC0:
                tail = tail[1:]  # the window must not begin inside a character
            if whole or self._decode(tail):
                break
            count *= 2
        run = self._incomplete_tail(tail)
        self._context, self._run = tail[: len(tail) - len(run)], run

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        byte = self._byte(token_id)
        if byte is not None:
            return self._push_byte(token_id)
        piece = "" if self._holds_replacement else self.flush()
        self._run_is_bad = False
        self._run.append(token_id)
        text = self._beyond(self._run)
        if self._holds_replacement and text.endswith(REPLACEMENT) and len(self._run) < _LONGEST_UTF8:
            return piece
        self._commit(self._run)
        self._run = []
        return piece + text

    def flush(self) -> str:
        run, self._run = self._run, []
        if not run:
            return ""
        # The library gives one replacement character for each byte of a run that is not UTF-8.
        return self._beyond(run) if self._holds_replacement else REPLACEMENT * len(run)

    def _push_byte(self, token_id: int) -> str:
        if self._run_is_bad:
            return REPLACEMENT
        self._run.append(token_id)
        try:
            bytes(self._byte(i) for i in self._run).decode("utf-8")
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data":
                return ""
            self._run_is_bad = True
            return self.flush()
        text = self._beyond(self._run)
        self._commit(self._run)
        self._run = []
        return text

    def _commit(self, ids: list[int]) -> None:
        if self._decode(ids):
            self._context = list(ids)
        elif not self._decode(self._context):
            self._context = [*self._context, *ids]
        # else: `ids` show nothing of their own at the start of a text, so the old context serves as well.

    def _incomplete_tail(self, ids: list[int]) -> list[int]:
        for back in range(1, min(_LONGEST_UTF8, len(ids) + 1)):
            byte = self._byte(ids[-back])
            if byte is None or byte < 0x80:
                break
            if byte >= 0xC0:
                try:
                    bytes(self._byte(i) for i in ids[-back:]).decode("utf-8")
                except UnicodeDecodeError as e:
                    return ids[-back:] if e.reason == "unexpected end of data" else []
                break
        return []

    def _beyond(self, ids: list[int]) -> str:
        base, full = self._decode(self._context), self._decode(self._context + ids)
        if full.startswith(base):
            return full[len(base) :]
        same = next((i for i, (a, b) in enumerate(zip(base, full, strict=False)) if a != b), min(len(base), len(full)))
        return full[same:]

    def _byte(self, token_id: int) -> int | None:
        if not self._byte_fallback:
            return None
        match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return int(match[1], 16) if match else None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


def _decoder_kinds(settings: dict | None) -> list[str]:
    if not settings:
        return []
    if settings.get("type") == "Sequence":
        return [kind for part in settings.get("decoders", ()) for kind in _decoder_kinds(part)]
    return [settings.get("type", "")]


def _last(ids: Sequence[int], wanted, count: int) -> list[int]:
    """The last `count` ids for which `wanted` holds, in order."""
    found: list[int] = []
    for i in range(len(ids) - 1, -1, -1):
        if wanted(ids[i]):
            found.append(ids[i])
            if len(found) == count:
                break
    return found[::-1]


def _byte_alphabet() -> dict[str, int]:
    # GPT-2 writes each byte as one visible character: itself where it is printable Latin-1, else the next from U+0100.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_alphabet()
